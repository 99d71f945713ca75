"""Does a comparison hold what it says, with real runs on this CPU: a backend against itself.

    python benchmarks/compare_cpu.py [--out runs/compare-cpu] [--cases equal busy] [--times 20] [--repeat 8]

    equal   sdpa against sdpa, in turns: nothing differs
    busy    the same beside one spinning process a core: its runs are disturbed, and no verdict rests on them

Prints one line a comparison: what it concluded, how many pairs were left out, and how many of the ratios were
called better or worse; at the end the share of those, which is to be at most 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from gate_cpu import ROOT, spinning


def bench(*arguments: str) -> str:
    """What a command that ends well prints."""
    command = [sys.executable, "-m", "backbench", *arguments]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)}: exit code {done.returncode}: {done.stderr}")
    return done.stdout


def compare(case: str, out: Path, seed: int, asked: argparse.Namespace) -> tuple[int, int]:
    """One comparison: its ratios with a verdict, and those of them called better or worse."""
    series = ["run", "-w", "synthetic", "-b", "sdpa,sdpa", "--num-requests", str(asked.requests)]
    if not (out / "experiment.json").exists():
        repeat = ["--repeat", str(asked.repeat), "--seed", str(seed), "--no-report", "-o", str(out)]
        with spinning((os.cpu_count() or 1) if case == "busy" else 0):
            bench(*series, *repeat)
    found = json.loads(bench("compare", str(out), "--json"))
    words = [value for row in found["metrics"] for key, value in row.items() if key.endswith(" verdict")]
    judged = sum(word in ("better", "worse", "same") for word in words)
    called = sum(word in ("better", "worse") for word in words)
    left_out = len({line.split(" left out")[0] for line in found["left_out"]})
    print(
        f"{case}: {called} of {judged} called, {left_out} pairs left out: {found['conclusion']}", flush=True
    )
    return judged, called


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compare-cpu"))
    parser.add_argument("--cases", nargs="+", choices=["equal", "busy"], default=["equal", "busy"])
    parser.add_argument("--times", type=int, default=20, help="comparisons a case, each with its own seeds")
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--requests", type=int, default=12)
    asked = parser.parse_args()
    for case in asked.cases:
        each = [
            compare(case, asked.out / f"{case}-{index + 1}", 1000 * index, asked)
            for index in range(asked.times)
        ]
        judged, called = (sum(column) for column in zip(*each, strict=True))
        share = f"{called / judged:.1%}" if judged else "none judged"
        print(f"{case}: {called} of {judged} ratios called better or worse ({share})")


if __name__ == "__main__":
    main()
