"""Launches every kernel twice under a driver that records launches: a script in a process of its own.

Prints JSON: kernel -> whether the second launch (bound) hands the driver exactly what the first (through
Triton's own binding) did, and whether an unaligned tensor chose another binary.
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

from backbench.backends.interface import (
    AttentionSpec,
    Batch,
    Device,
    Rotary,
    Rotation,
    SamplingBatch,
)
from backbench.backends.quantization import SCHEMES, quantize
from backbench.backends.triton.attention import TritonRunner
from backbench.backends.triton.configs import GemmConfig
from backbench.backends.triton.elementwise import embed_launch, gate_launch, norm_launch, rotate_launch
from backbench.backends.triton.fused_rounding import rounded_gate_launch, rounded_norm_launch
from backbench.backends.triton.fused_write import kv_write_launch, rotate_and_write_launch
from backbench.backends.triton.gemm import product_launch
from backbench.backends.triton.launch import Launch, Place
from backbench.backends.triton.quantized import Rows, product_launches, rounding_launch, writing_launch
from backbench.backends.triton.quantized_configs import Kernel, Tile
from backbench.backends.triton.quantized_weight import pack_weight
from backbench.backends.triton.sampling import sample_launches

LAUNCHES: list[tuple[Any, ...]] = []
SPEC = AttentionSpec(32, 8, 128, torch.bfloat16, torch.bfloat16, 64, 128**-0.5)
DEVICE = Device("nvidia", "sm90", "H100", 132, 2**36, 227 * 1024, torch.device("cpu"))
ROWS, VOCABULARY = 3, 4000


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


def quantized_launches(place: Place, x: torch.Tensor, out: torch.Tensor) -> list[Launch]:
    """Products by a four-bit and an eight-bit weight, rows rounded, parts added, weights written out."""
    dense = torch.ones(out.shape[1], x.shape[1], dtype=x.dtype)
    packed = pack_weight(quantize(dense, SCHEMES["int4-g32"]), DEVICE.torch_device)
    eight = pack_weight(quantize(dense, SCHEMES["fp8"]), DEVICE.torch_device)
    codes, scale = torch.zeros(x.shape, dtype=torch.float8_e4m3fn), torch.zeros(len(x))
    vector, wide = Kernel(0, 4, 4, spans=1), Kernel(16, 64, 4, 2, split=2, swap=True, early=True)
    one, some = Rows(x[:1]), Rows(x)
    return [
        *product_launches(place, one, packed, None, out[:1], vector),
        *product_launches(place, some, packed, None, out, wide),
        *product_launches(place, some, packed, None, out, Tile(16, 64, 4, 2)),
        *product_launches(place, Rows(codes[:1], scale[:1]), eight, None, out[:1], vector),
        product_launches(place, Rows(codes, scale), eight, None, out, wide)[0],
        rounding_launch(place, x, "fp8-token", None, codes, scale),
        rounded_norm_launch(place, x, x, x[0], 1e-6, "fp8-token", codes, scale),
        rounded_gate_launch(place, x, "fp8-token", codes[:, :128], scale),
        writing_launch(place, packed, dense),
        writing_launch(place, eight, dense),
    ]


def every_launch() -> list[Launch]:
    """One launch of every kernel, each with a tensor first."""
    place = Place.of(DEVICE)
    runner = TritonRunner(SPEC, DEVICE)
    cache = runner.new_cache(8)
    q = torch.zeros(3, SPEC.q_heads, SPEC.head_dim, dtype=SPEC.dtype)
    prompt = torch.zeros(15, SPEC.q_heads, SPEC.head_dim, dtype=SPEC.dtype)
    x, weight = torch.zeros(ROWS, 256, dtype=SPEC.dtype), torch.zeros(256, dtype=SPEC.dtype)
    ids, floats = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS)
    head = torch.zeros(SPEC.head_dim, dtype=SPEC.dtype)
    rotation = Rotation(Rotary(torch.zeros(64, SPEC.head_dim), SPEC.head_dim), head, head)
    qkv = torch.zeros(ROWS, (SPEC.q_heads + 2 * SPEC.kv_heads) * SPEC.head_dim, dtype=SPEC.dtype)
    k = torch.zeros(ROWS, SPEC.kv_heads, SPEC.head_dim, dtype=SPEC.dtype)
    logits = torch.zeros(ROWS, VOCABULARY, dtype=SPEC.dtype)
    sampling = SamplingBatch(floats, ids.int(), floats, floats, ids, all_greedy=False, any_filter=True)
    greedy = SamplingBatch(floats, ids.int(), floats, floats, ids)
    products = torch.zeros(ROWS, 48, dtype=SPEC.dtype)
    matrix = torch.zeros(48, 256, dtype=SPEC.dtype)
    return [
        runner.decode_launch(q, cache, make_batch(1), torch.empty_like(q)),
        runner.prefill_launch(prompt, cache, make_batch(5), torch.empty_like(prompt)),
        kv_write_launch(place, cache, k, k, ids),
        rotate_and_write_launch(place, qkv, ids, rotation, cache, ids, SPEC, q),
        rotate_launch(place, qkv, ids, rotation, SPEC, q, k),
        norm_launch(place, x, weight, 1e-6, torch.empty_like(x), x),
        embed_launch(place, ids, x, torch.empty_like(x)),
        gate_launch(place, x, torch.empty(ROWS, 128, dtype=SPEC.dtype)),
        product_launch(place, x[:1], matrix, None, products[:1], GemmConfig(0, 4, 64, 4, 1)),
        product_launch(place, x, matrix, matrix[0], products, GemmConfig(16, 16, 64, 4, 2)),
        product_launch(place, x, matrix, matrix[0], products, GemmConfig(16, 16, 64, 4, 2, split=4)),
        *quantized_launches(place, x, products),
        *sample_launches(place, logits, sampling, ids),
        sample_launches(place, logits, greedy, ids)[0],
    ]


def main() -> None:
    driver.set_active(Recorder())
    found = {}
    for launch in every_launch():
        first_argument = launch.arguments[0]
        shifted = torch.zeros(first_argument.numel() + 1, dtype=first_argument.dtype)[1:]
        LAUNCHES.clear()
        launch.start()
        launch.start()
        launch._replace(arguments=(shifted.view(first_argument.shape), *launch.arguments[1:])).start()
        first, second, unaligned = LAUNCHES
        equal = len(first) == len(second) and all(map(same, first, second))
        found[launch.kernel.__name__] = {"equal": equal, "other_binary": unaligned[4] is not first[4]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
