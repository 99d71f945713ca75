"""FlashAttention rows: `python benchmarks/flash.py` checks the backend and writes benchmarks/parts/.

Needs a GPU that one of the family's libraries serves, and that library (`pip install flash-attn-4`). The
geometry, batches and method are those of benchmarks/attention.py. Times are taken on the backend's own
cache layout and on the Triton backend's, which a mix of the two shares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbench.backends import registry
from backbench.backends.conformance import ConformanceMatrix, check_backend
from backbench.backends.interface import Attention, Backend
from backbench.backends.interface.device import gpu
from backbench.backends.torch.attention import TorchCache
from benchmarks.attention import (
    DECODE_ROWS,
    HEAD_DIM,
    KV_HEADS,
    PREFILL_ROWS,
    Pool,
    causal_tflops,
    make_spec,
    measure,
)
from benchmarks.graph_timing import Row, write_rows


class TokenRows(Pool):
    """The pool in the layout of the torch, sdpa and flash backends."""

    def cache(self, block_size: int) -> TorchCache:
        return TorchCache(self._padded(self.keys), self._padded(self.values), block_size)

    @staticmethod
    def _padded(pool: Tensor) -> Tensor:
        """The spare last row that takes the writes of slot -1."""
        return torch.cat((pool, pool[:1])).view(-1, KV_HEADS, HEAD_DIM)


def conformance(attentions: dict[str, Attention], level: str, output: Path) -> Iterator[ConformanceMatrix]:
    """Check each attention, print what is wrong and keep the matrices."""
    for name, attention in attentions.items():
        backend = Backend(name, "", attention=attention)
        matrix = check_backend(backend, gpu(0), level=level, dtypes=[torch.bfloat16, torch.float16])
        print(
            matrix.summary(), *(f"  {row.case}: {row.detail}" for row in matrix.wrong), sep="\n", flush=True
        )
        file = output / f"conformance_{name.replace('=', '-').replace(',', '_').replace(':', '-')}.json"
        file.write_text(json.dumps(matrix.to_json(), indent=1) + "\n")
        yield matrix


def rows(attention: Attention, pool: Pool, block_size: int, label: str) -> Iterator[Row]:
    """Every row of the table for one layout and block size; a row that fails is printed, not written."""
    runner = attention.open(replace(make_spec(block_size), max_tokens=16384), gpu(0))
    jobs = [("decode", *row, 1) for row in DECODE_ROWS] + [("prefill", *row, row[1]) for row in PREFILL_ROWS]
    for kind, sequences, length, query in jobs:
        name = f"attention/{kind}/{sequences}x{length}/{label}"
        try:
            value, spread = measure(pool, runner, sequences, length, query)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:160]}", flush=True)
            continue
        if kind == "decode":
            rate = f"{sequences * length * 4 * KV_HEADS * HEAD_DIM / value / 1e6:.2f} TB/s"
        else:
            rate = f"{causal_tflops(sequences, length, value):.0f} TFLOP/s"
        print(f"{name}: {value:.1f} us, {rate}", flush=True)
        yield Row(name, value, "us", spread)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--backend", default="flash", help="flash, or one library of it: flash:fa4, flash:fa3"
    )
    parser.add_argument("--level", choices=("none", "quick", "full"), default="quick")
    parser.add_argument("--block-sizes", type=int, nargs="*", default=[16, 128])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "parts")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    attention = registry.load(options.backend).attention
    assert attention is not None
    print(attention.served_by(gpu(0)), flush=True)
    if options.level != "none":
        mixed = registry.load(f"prefill={options.backend},decode=triton").attention
        assert mixed is not None
        list(conformance({attention.name: attention, mixed.name: mixed}, options.level, options.output))
    found: list[Row] = []
    tag = options.backend.replace(":", "-")
    for block_size in options.block_sizes:
        found += rows(attention, TokenRows(), block_size, f"{tag}/block{block_size}")
        found += rows(attention, Pool(), block_size, f"{tag}-on-triton/block{block_size}")
        write_rows(options.output / f"{tag}.json", found)


if __name__ == "__main__":
    main()
