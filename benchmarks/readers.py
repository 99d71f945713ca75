"""How fast a trace of millions of rows streams, and in how much memory.

    python benchmarks/readers.py [--rows 5000000] [--keep FILE.csv] [--least 150000] [--most-mb 400]

Generates a file of the Azure form (a Poisson stream over a week, 7-digit fractions, log-normal lengths),
reads all of it in a process of its own, and prints as JSON: rows, seconds, rows a second and a second of CPU
time (which other work on the machine does not change), and the process's peak resident memory. Exit code 1
where it is slower than --least rows/s or larger than --most-mb.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

WEEK_S = 7 * 24 * 3600
START = datetime(2024, 5, 10, tzinfo=UTC)
WRITTEN = 200_000
"""Rows written together."""
READ = """
import json, resource, sys, time
from pathlib import Path
from backbench.workloads.readers.azure import read_azure
started, worked = time.perf_counter(), time.process_time()
rows = tokens = last_ns = 0
for row in read_azure(Path(sys.argv[1])):
    rows += 1
    tokens += row.input_tokens + row.output_tokens
    last_ns = row.arrival_ns
seconds, cpu_s = time.perf_counter() - started, time.process_time() - worked
peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
print(json.dumps({"rows": rows, "tokens": tokens, "last_s": last_ns / 1e9, "seconds": round(seconds, 2),
                  "rows_per_s": round(rows / seconds),
                  "rows_per_cpu_s": round(rows / cpu_s), "peak_resident_mb": round(peak_mb, 1)}))
"""


def generate(path: Path, rows: int, seed: int = 0) -> int:
    """Write the file; returns the sum of all its tokens."""
    draws = np.random.default_rng(seed)
    tenths_us = np.sort(draws.integers(WEEK_S * 10**7, size=rows))
    tokens = 0
    with path.open("w", newline="") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
        for first in range(0, rows, WRITTEN):
            times = tenths_us[first : first + WRITTEN]
            inputs = np.clip(draws.lognormal(6.5, 1.0, len(times)), 1, 16_000).astype(int)
            outputs = np.clip(draws.lognormal(4.8, 0.9, len(times)), 1, 2_000).astype(int)
            tokens += int(inputs.sum() + outputs.sum())
            seconds, fractions = np.divmod(times, 10**7)
            known: dict[int, str] = {}
            lines = []
            columns = (seconds.tolist(), fractions.tolist(), inputs.tolist(), outputs.tolist())
            for second, fraction, prompt, output in zip(*columns, strict=True):
                if second not in known:
                    known[second] = (START + timedelta(seconds=second)).strftime("%Y-%m-%d %H:%M:%S")
                lines.append(f"{known[second]}.{fraction:07d}+00:00,{prompt},{output}\n")
            file.writelines(lines)
    return tokens


def measure(path: Path) -> dict[str, float]:
    """Read the file in a new process, whose memory is its own."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--keep", type=Path, help="write the file here, and read it again where it is there")
    parser.add_argument("--least", type=float, default=150_000, help="rows a second")
    parser.add_argument("--most-mb", type=float, default=400, help="peak resident memory in MB")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = asked.keep or Path(folder) / "week.csv"
        tokens = None if path.exists() else generate(path, asked.rows)
        found = measure(path)
    if tokens is not None and (found["rows"], found["tokens"]) != (asked.rows, tokens):
        raise SystemExit(f"{asked.rows} rows of {tokens} tokens were written, but read were {found}")
    print(json.dumps(found))
    slow = found["rows_per_s"] < asked.least
    return int(slow or found["peak_resident_mb"] > asked.most_mb)


if __name__ == "__main__":
    sys.exit(main())
