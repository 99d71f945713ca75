"""Runs attention twice under a driver that records launches: a script for tests, in a process of its own.

Prints JSON: per kind of batch, whether the second launch (bound) hands the driver exactly what the first
(through Triton's own binding) did, and whether an unaligned tensor chose another binary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from attention_aot import SPECS, make_device

from backbench.backends.interface import Batch
from backbench.backends.triton.attention import TritonRunner

LAUNCHES: list[tuple[Any, ...]] = []


class Recorder:
    """Stands for a Hopper GPU: compiles for it, loads nothing, keeps what is launched."""

    class launcher_cls:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.constants = source.constants

        def __call__(self, *arguments: Any) -> None:
            LAUNCHES.append(arguments)

    class utils:
        @staticmethod
        def load_binary(*_: Any) -> tuple[Any, ...]:
            return object(), object(), 32, 0, 1024

        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {"max_shared_mem": 227 * 1024}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def same(one: Any, other: Any) -> bool:
    """True for equal values and for tensors at the same address; Triton's lazy metadata is not compared."""
    if isinstance(one, torch.Tensor):
        return one.data_ptr() == other.data_ptr() and one.dtype == other.dtype
    if type(one).__name__ == "TensorDescriptor":
        return same(one.base, other.base) and one.block_shape == other.block_shape
    return type(one).__name__ == "LazyDict" or one == other


def make_batch(query: int) -> Batch:
    return Batch(
        query_start=torch.zeros(4, dtype=torch.int32),
        seq_lens=torch.zeros(3, dtype=torch.int32),
        block_table=torch.zeros(3, 4, dtype=torch.int32),
        slots=torch.zeros(3 * query, dtype=torch.int64),
        num_seqs=3,
        num_tokens=3 * query,
        num_decodes=3 if query == 1 else 0,
        max_query=query,
        max_len=64,
    )


def main() -> None:
    driver.set_active(Recorder())
    found = {}
    spec = SPECS["block64"]
    runner = TritonRunner(spec, make_device("sm90"))
    cache = runner.new_cache(8)
    for kind, query in (("decode", 1), ("prefill", 5)):
        batch = make_batch(query)
        q = torch.zeros(3 * query, spec.q_heads, spec.head_dim, dtype=spec.dtype)
        out = torch.empty_like(q)
        shifted = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
        LAUNCHES.clear()
        for query_tensor in (q, q, shifted):
            runner.run(query_tensor, cache, batch, out)
        first, second, unaligned = LAUNCHES
        equal = len(first) == len(second) and all(map(same, first, second))
        found[kind] = {"equal": equal, "other_binary": unaligned[4] is not first[4]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
