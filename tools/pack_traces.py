"""Pack public traces into the small arrays of workloads/data. Figures only: no text is read or kept.

    python tools/pack_traces.py --azure-conv FILE --azure-code FILE --mooncake FILE --sharegpt-lengths FILE \\
        [--out workloads/data]

Formats are described in workloads/data/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from backbench.workloads.readers.azure import read_azure
from backbench.workloads.readers.mooncake import read_mooncake
from backbench.workloads.readers.text import read_csv

SHAREGPT_COLUMNS = ("num_prefill_tokens", "num_decode_tokens")


def pack_azure(source: Path, target: Path) -> None:
    """Gaps in 100 ns units (the trace's resolution), prompt and output tokens."""
    rows = list(read_azure(source))
    arrivals = np.array([row.arrival_ns for row in rows], dtype=np.int64)
    if (arrivals % 100).any():
        raise SystemExit(f"{source}: finer than 100 ns")
    np.savez_compressed(
        target,
        gap_100ns=narrow(np.diff(arrivals // 100, prepend=0), np.uint32),
        input_tokens=narrow(np.array([row.input_tokens for row in rows]), np.uint16),
        output_tokens=narrow(np.array([row.output_tokens for row in rows]), np.uint16),
    )


def pack_mooncake(source: Path, target: Path) -> None:
    """Times, lengths and, instead of ids, the tree they form.

    Ids are chained (an id has one predecessor) and numbered in order of appearance, so the last known id of
    each row gives all its known ones, and the rest are the next numbers. Checked here, row by row.
    """
    rows = list(read_mooncake(source))
    parents: list[int] = []
    tails = []
    for row in rows:
        count = len(parents)
        known = next((i for i, block_id in enumerate(row.block_ids) if block_id >= count), len(row.block_ids))
        chain = [-1, *row.block_ids]
        if any(parents[child] != parent for parent, child in zip(chain, row.block_ids[:known], strict=False)):
            raise SystemExit(f"{source}: a block id has two predecessors")
        if row.block_ids[known:] != tuple(range(count, count + len(row.block_ids) - known)):
            raise SystemExit(f"{source}: new block ids are not numbered in order")
        parents.extend(chain[known:-1])
        tails.append(chain[known])
    np.savez_compressed(
        target,
        tick_ms=narrow(np.diff([row.arrival_ns // 1_000_000 for row in rows], prepend=0), np.uint16),
        input_tokens=narrow(np.array([row.input_tokens for row in rows]), np.uint32),
        output_tokens=narrow(np.array([row.output_tokens for row in rows]), np.uint16),
        known_tail=narrow(np.array(tails), np.int32),
    )


def pack_sharegpt_lengths(source: Path, target: Path) -> None:
    """(prompt, output) token counts, one pair a conversation, in file order."""
    pairs = [
        [place.whole(name, row[name], 1) for name in SHAREGPT_COLUMNS]
        for place, row in read_csv(source, SHAREGPT_COLUMNS)
    ]
    lengths = np.array(pairs)
    np.savez_compressed(
        target, input_tokens=narrow(lengths[:, 0], np.uint16), output_tokens=narrow(lengths[:, 1], np.uint16)
    )


def narrow(values: np.ndarray, dtype: type) -> np.ndarray:
    """Cast, refusing values that do not fit."""
    cast = values.astype(dtype)
    if not np.array_equal(cast.astype(np.int64), values):
        raise SystemExit(f"values do not fit {np.dtype(dtype)}")
    return cast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    packers = {
        "azure-conv": pack_azure,
        "azure-code": pack_azure,
        "mooncake": pack_mooncake,
        "sharegpt-lengths": pack_sharegpt_lengths,
    }
    for name in packers:
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "workloads" / "data")
    arguments = vars(parser.parse_args())
    arguments["out"].mkdir(parents=True, exist_ok=True)
    for name, pack in packers.items():
        source = arguments[name.replace("-", "_")]
        if source is not None:
            target = arguments["out"] / f"{name}.npz"
            pack(source, target)
            print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
