"""Conformance matrices: `python benchmarks/check_backends.py torch sdpa triton flash` checks them here.

One file a backend and device goes to benchmarks/conformance/; what is wrong is printed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backends.conformance import check
from backends.device import detect


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backends", nargs="+")
    parser.add_argument("--level", choices=("quick", "full"), default="full")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "conformance")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    device = detect()
    place = "cpu" if device.vendor == "cpu" else device.arch
    for name in options.backends:
        start = time.perf_counter()
        matrix = check(name, device, level=options.level)
        print(f"{matrix.summary()} ({time.perf_counter() - start:.0f} s)", flush=True)
        for row in matrix.wrong:
            print(f"  {row.operation} {row.dtype} {row.case}: {row.detail}", flush=True)
        file = options.output / f"{re.sub('[^a-z0-9]+', '-', name)}-{place}.json"
        file.write_text(json.dumps(matrix.to_json(), indent=1) + "\n")


if __name__ == "__main__":
    main()
