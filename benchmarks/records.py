"""How long `bench list`, `bench compare` and `backbench.load` take over many stored runs.

python benchmarks/records.py RUN [--records 1000]

RUN, any run directory, is copied under other names, seeds and times; nothing is measured anew. Prints CPU
seconds, in which what else runs on the machine plays little part.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import backbench
from backbench.reports.record import RunDirectory, sign
from backbench.reports.record.experiment import Experiment, Listed

ARMS = 2


def copy(run: Path, into: Path, records: int) -> None:
    """`records` runs as an experiment of two arms, valid so that every one of them counts."""
    record = RunDirectory.open(run).read_record()
    listed = []
    for place in range(records):
        block, arm = divmod(place, ARMS)
        directory = RunDirectory(shutil.copytree(run, into / f"{place:04d}"))
        utc = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=place)).isoformat()
        about = {"uuid": f"{place}", "utc": utc, "seed": block}
        copied = replace(record, run=record.run | about, validity=[])
        directory.write_record(sign(directory, copied))
        listed.append(Listed(directory.path.name, "ab"[arm], block, block, f"{place}"))
    Experiment(into, ("a", "b"), records // ARMS, "bench run", tuple(listed)).write()


def bench(*arguments: str) -> float:
    """CPU seconds of a command, its start included."""
    before = getrusage(RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "backbench", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    after = getrusage(RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--records", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "x"
        copy(options.run, root, options.records)
        runs = sorted(str(path) for path in root.iterdir() if path.is_dir())
        for name, arguments in (
            ("list", ["list", folder]),
            ("compare, an arm a run", ["compare", *runs]),
            ("compare, two arms", ["compare", str(root)]),
            ("compare --json, two arms", ["compare", str(root), "--json"]),
        ):
            print(f"{name}: {bench(*arguments):.2f} s of CPU for {options.records} records")
        begun = time.process_time()
        backbench.load(root)
        print(f"load: {time.process_time() - begun:.2f} s of CPU for {options.records} records")


if __name__ == "__main__":
    main()
