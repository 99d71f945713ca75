"""The skinny products against fp64, in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from backbench.backends.conformance import oracle
from backbench.backends.conformance.tolerance import complaint, deviation, limit
from backbench.backends.interface import Scheme, WeightSpec
from backbench.backends.triton import configs
from backbench.backends.triton.configs import (
    KERNEL_BUCKETS,
    ROW_BUCKETS,
    GemmConfig,
    ZeroBias,
    bucket,
    choose,
)
from backbench.backends.triton.gemm import multiply
from backbench.backends.triton.linear import TritonLinear
from backbench.backends.tuning.table import Entry

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VECTOR = GemmConfig(0, 4, 64, 4, 1)
MATRIX = GemmConfig(16, 16, 64, 4, 2)
WIDE = GemmConfig(16, 64, 64, 4, 2, swap=True)
SPLIT = GemmConfig(16, 16, 64, 4, 2, split=4)
WIDE_SPLIT = GemmConfig(16, 32, 64, 4, 2, swap=True, split=2)


def operands(rows: int, n: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, k), (n, k), (n,))
    tensors = [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]
    tensors[1] /= k**0.5
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("config", "rows", "n", "k"),
    [
        (VECTOR, 1, 42, 128),
        (VECTOR, 1, 40, 200),
        (MATRIX, 5, 40, 128),
        (MATRIX, 17, 40, 200),
        (WIDE, 3, 80, 128),
        (SPLIT, 5, 72, 192),
        (SPLIT, 16, 48, 128),
        (SPLIT, 3, 17, 96),
        (WIDE_SPLIT, 5, 72, 192),
        (WIDE_SPLIT, 9, 33, 40),
    ],
)
def test_product(config: GemmConfig, rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, weight, bias = operands(rows, n, k, dtype)
    exact = oracle.linear(x, weight, bias)
    reference = functional.linear(x, weight, bias)
    allowed = limit(deviation(reference, exact), exact, dtype)
    assert not complaint(deviation(multiply(x, weight, config, bias), exact), allowed)


def test_run_serves_every_row_count() -> None:
    linear = TritonLinear()
    for rows in (0, 1, 2, 16, 17, 65):
        x, weight, bias = operands(rows, 24, 32, torch.bfloat16)
        expected = functional.linear(x, weight, bias)
        # Two roundings to bf16 of outputs up to about 4; the interpreter cuts instead of rounding.
        torch.testing.assert_close(linear.run(x, weight, bias), expected, rtol=0, atol=2**-5)


def test_without_a_gpu_the_reason_names_alternatives() -> None:
    from backbench.backends.interface.device import cpu

    (reason,) = TritonLinear().refusals(WeightSpec("qkv", 64, 64, Scheme(), torch.float32), cpu())
    assert "--backend torch" in reason
    assert "--interpret" in reason


def test_buckets_hold_their_rows() -> None:
    for rows in range(1, ROW_BUCKETS[-1] + 1):
        size = bucket(rows)
        assert size is not None
        assert size >= rows
    assert bucket(ROW_BUCKETS[-1] + 1) is None


def test_a_bias_of_zeros_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made once, and a weight's own bias takes its place."""
    linear, generator = TritonLinear(), torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator, dtype=torch.bfloat16) for n in (96, 48))
    bias = torch.randn(48, generator=generator, dtype=torch.bfloat16)
    monkeypatch.setattr(configs, "choose", lambda *given: ZeroBias())
    assert torch.equal(linear.run(x, weight), torch.nn.functional.linear(x, weight))
    assert torch.equal(linear.run(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    made = linear._zero_bias(48, x)
    linear.run(x, weight)
    assert linear._zero_bias(48, x) is made
    assert linear._zero_bias(48, x.half()).dtype == torch.float16


def test_true_fp32_goes_to_the_library() -> None:
    assert choose("sm90", 132, 1, 4096, 4096, torch.float32) is None


MEASURED = [entry for entry in configs.table("sm90", 132).entries.values() if entry.operation == "gemm"]


def test_measured_launches_are_chosen_and_everything_else_follows_the_rule() -> None:
    assert choose("sm90", 132, 1, 28672, 4096, torch.bfloat16) == GemmConfig(0, 2, 2048, 4, 1)
    split = GemmConfig(16, 16, 512, 4, 3, lines=16, split=8)
    assert choose("sm90", 132, 9, 6144, 4096, torch.float16) == split
    assert choose("sm90", 132, 64, 1024, 2048, torch.bfloat16) is None
    assert choose("sm90", 114, 16, 28672, 4096, torch.bfloat16) == configs.written_product(
        "sm90", 16, 28672, 4096
    )


@pytest.mark.parametrize("entry", MEASURED, ids=lambda entry: entry.bucket)
def test_measured_launches_are_possible(entry: Entry) -> None:
    """A vector launch serves one row only; a matrix launch holds its bucket's rows in one tile."""
    size, n, k = (int(word[1:]) for word in entry.bucket.split())
    assert entry.bucket == configs.bucket_name(size, n, k)
    assert size in ROW_BUCKETS
    if entry.config is None:
        return
    config = configs.product(entry.config)
    if isinstance(config, ZeroBias):
        assert size > KERNEL_BUCKETS[-1]
        return
    assert n % 16 == 0
    assert k % config.block_k == 0
    assert (config.block_m == 0) == (size == 1) or config.block_m >= size
    shared = (config.block_n + config.block_m) * config.block_k * 2 * config.stages
    assert shared <= 227 * 1024


def test_odd_depths_go_to_the_library() -> None:
    assert configs.written_product("sm90", 1, 64, 65) is None
