"""Conformance matrices: `python benchmarks/check_backends.py torch sdpa triton flash` checks them here.

One file a backend and device goes to benchmarks/conformance/; what is wrong is printed. Several processes
divide the cases: most of the time goes into compiling kernels.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbench.backends.conformance import ConformanceMatrix, check
from backbench.backends.interface.device import detect


def check_share(name: str, level: str, workers: int, worker: int) -> ConformanceMatrix:
    """One process's cases."""
    return check(name, detect(), level=level, share=(worker, workers))


def whole(shares: list[ConformanceMatrix]) -> ConformanceMatrix:
    """The matrix whose cases were dealt out in turn."""
    rounds = zip_longest(*(share.rows for share in shares))
    return replace(shares[0], rows=tuple(row for row in chain(*rounds) if row is not None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backends", nargs="+")
    parser.add_argument("--level", choices=("quick", "full"), default="full")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "conformance")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    device = detect()
    place = "cpu" if device.vendor == "cpu" else device.arch
    context = multiprocessing.get_context("spawn")
    for name in options.backends:
        start = time.perf_counter()
        with context.Pool(options.workers) as pool:
            each = partial(check_share, name, options.level, options.workers)
            matrix = whole(pool.map(each, range(options.workers), chunksize=1))
        print(f"{matrix.summary()} ({time.perf_counter() - start:.0f} s)", flush=True)
        for row in matrix.wrong:
            print(f"  {row.operation} {row.dtype} {row.case}: {row.detail}", flush=True)
        file = options.output / f"{re.sub('[^a-z0-9]+', '-', name)}-{place}.json"
        file.write_text(json.dumps(matrix.to_json(), indent=1) + "\n")


if __name__ == "__main__":
    main()
