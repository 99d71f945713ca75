"""A decoder layer's kernels around attention, in one graph: what products and overlapped launches are worth.

`python benchmarks/layers.py` prints microseconds a layer for each way to launch it, attention left out.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbench.backends.interface import AttentionSpec, Rotary, Rotation
from backbench.backends.triton import launch
from backbench.backends.triton.cache import PagedCache, new_cache
from backbench.backends.triton.fused_write import rotate_and_write
from backbench.backends.triton.linear import TritonLinear
from backbench.backends.triton.operations import TritonOperations
from backbench.backends.tuning.timing import graph_time_us
from benchmarks.graph_timing import Row, write_rows

EPS = 1e-6
TOLERANCE = 5e-2
"""Relative, in norm: layers of bf16 roundings grow apart; a wrong kernel is off by 1."""


@dataclass(frozen=True)
class Shape:
    """One model's layer."""

    hidden: int
    q_heads: int
    kv_heads: int
    inner: int
    layers: int
    """Layers in the timed graph; enough to exceed the cache."""


SHAPES = {"qwen3-8b": Shape(4096, 32, 8, 12288, 4), "qwen3-0.6b": Shape(1024, 16, 8, 3072, 28)}


@dataclass(frozen=True)
class Layer:
    """One layer's weights and cache."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    norm: Tensor
    head_norm: Tensor
    cache: PagedCache


class Stack:
    """Layers of one model, and the ways to run them on `rows` tokens."""

    def __init__(self, shape: Shape, rows: int, layers: int) -> None:
        torch.manual_seed(0)
        self.shape, self.rows = shape, rows
        d = 128
        self.spec = AttentionSpec(
            shape.q_heads, shape.kv_heads, d, torch.bfloat16, torch.bfloat16, 16, d**-0.5
        )
        heads = shape.q_heads + 2 * shape.kv_heads
        self.layers = [
            Layer(
                weight(heads * d, shape.hidden),
                weight(shape.hidden, shape.q_heads * d),
                weight(2 * shape.inner, shape.hidden),
                weight(shape.hidden, shape.inner),
                torch.ones(shape.hidden, dtype=torch.bfloat16, device="cuda"),
                torch.ones(d, dtype=torch.bfloat16, device="cuda"),
                new_cache(64, shape.kv_heads, 16, d, torch.bfloat16, torch.device("cuda")),
            )
            for _ in range(layers)
        ]
        self.rotary = Rotary(torch.randn(4096, d, device="cuda"), d)
        self.positions = torch.arange(rows, device="cuda")
        self.slots = torch.arange(rows, device="cuda") * 16
        self.x = torch.randn(rows, shape.hidden, dtype=torch.bfloat16, device="cuda")
        self.operations, self.linear = TritonOperations(), TritonLinear()

    def rotated(self, layer: Layer, qkv: Tensor) -> Tensor:
        """Queries [T, q_heads * d]; they stand in for attention's output."""
        rotation = Rotation(self.rotary, layer.head_norm, layer.head_norm, EPS)
        q = rotate_and_write(qkv, self.positions, rotation, layer.cache, self.slots, self.spec)
        return q.view(self.rows, -1)

    def separate(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Every operation its own launch."""
        residual, x = torch.zeros_like(self.x), self.x
        for layer in self.layers:
            x, residual = self.operations.add_rms_norm(x, residual, layer.norm, EPS)
            x = multiply(self.rotated(layer, multiply(x, layer.qkv)), layer.o)
            x, residual = self.operations.add_rms_norm(x, residual, layer.norm, EPS)
            x = multiply(self.operations.gate(multiply(x, layer.gate_up)), layer.down)
        return x + residual

    def ways(self) -> dict[str, Callable[[], Tensor]]:
        """Name -> one pass over the layers."""
        return {
            "library": lambda: self.separate(functional.linear),
            "skinny": lambda: self.separate(self.linear.run),
        }


def weight(n: int, k: int) -> Tensor:
    """A random bf16 weight on the device."""
    return torch.randn(n, k, dtype=torch.bfloat16, device="cuda") / k**0.5


def set_overlap(on: bool) -> None:
    """Use programmatic dependent launch or not."""
    launch.overlaps_launches = lambda device: on


def compile_one(job: tuple[str, int, bool]) -> str:
    """Run one way's kernels once in a worker process, so that they lie in the disk cache."""
    name, rows, on = job
    try:
        set_overlap(on)
        for run in Stack(SHAPES[name], rows, 1).ways().values():
            run()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{job}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "parts")
    options = parser.parse_args()
    jobs = list(itertools.product(SHAPES, options.rows, (True, False)))
    with multiprocessing.get_context("spawn").Pool(8) as workers:
        for problem in workers.imap_unordered(compile_one, jobs):
            if problem:
                print("compile:", problem)
    found = []
    for name, rows in itertools.product(SHAPES, options.rows):
        stack = Stack(SHAPES[name], rows, SHAPES[name].layers)
        exact = stack.separate(functional.linear).float()
        for way, run in stack.ways().items():
            for label, on in (("plain", False), ("overlapped", True)):
                set_overlap(on)
                error = float((run().float() - exact).norm() / exact.norm())
                if not error < TOLERANCE:
                    raise SystemExit(f"{name} m{rows} {way} {label}: relative difference {error:.1e}")
                time, spread = (value / len(stack.layers) for value in graph_time_us([run]))
                found.append(
                    Row(f"layer/{name}/m{rows}/{way}/{label}", round(time, 2), "us", round(spread, 2))
                )
                print(f"{found[-1].name:40} {time:8.2f} us a layer", flush=True)
    write_rows(options.output / "layers.json", found)


if __name__ == "__main__":
    main()
