"""The inline assembly that unpacks four-bit codes, followed instruction by instruction over every word."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backbench.backends import quantization
from backbench.backends.interface import Scheme
from backbench.backends.triton import codes
from backbench.backends.triton.quantized_weight import words_of

WORDS = torch.arange(2**16, dtype=torch.int64)
TWO = WORDS | (WORDS.flip(0) << 16)
"""Every word in either half of a register."""
FULL = 2**32 - 1


def halves(register: Tensor, dtype: torch.dtype) -> Tensor:
    """A register of two 16-bit floats as f64 [2, ...]."""
    both = torch.stack((register & 0xFFFF, register >> 16))
    return (both - 2**16 * (both >= 2**15)).to(torch.int16).view(dtype).double()


def register(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse, rounding once."""
    bits = values.to(dtype).view(torch.int16).long() & 0xFFFF
    return bits[0] | bits[1] << 16


def followed(assembly: str, inputs: dict[str, Tensor], dtype: torch.dtype, outputs: int = 4) -> list[Tensor]:
    """Outputs of the assembly's moves, shifts, logic and packed arithmetic."""
    held = dict(inputs)

    def value(name: str) -> Tensor:
        return torch.tensor(int(name, 16)) if name.startswith("0x") else held[name]

    for statement in assembly.strip("{} \n").replace("\n", " ").split(";"):
        name, _, rest = statement.strip().partition(" ")
        if not name or name == ".reg":
            continue
        out, *operands = (each.strip() for each in rest.split(","))
        if name in ("shl.b32", "shr.u32"):
            amount = int(operands[1])
            moved = value(operands[0]) << amount if name == "shl.b32" else value(operands[0]) >> amount
            held[out] = moved & FULL
            continue
        if name == "prmt.b32":
            assert operands[1] == "0"
            source, places = value(operands[0]), [int(digit, 16) for digit in operands[2][2:]]
            bytes_of = [source >> 8 * place & 0xFF if place < 4 else 0 * source for place in places]
            held[out] = sum(byte << 8 * j for j, byte in enumerate(reversed(bytes_of)))
            continue
        given = [value(each) for each in operands if each != "0xEA"]
        if name == "mov.b32":
            held[out] = given[0]
        elif name == "and.b32":
            held[out] = given[0] & given[1]
        elif name == "lop3.b32":
            assert operands[-1] == "0xEA"
            held[out] = (given[0] & given[1]) | given[2]
        else:
            packed = torch.broadcast_tensors(*given)
            a, b, *c = (halves(each, dtype) for each in packed)
            operation = name.partition(".")[0]
            result = a + b if operation == "add" else a * b + (c[0] if operation == "fma" else 0)
            held[out] = register(result, dtype)
    return [halves(held[f"${j}"], dtype) for j in range(outputs)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", [0, 8, 15])
def test_int4(dtype: torch.dtype, zero: int) -> None:
    assembly, magic = (codes.INT4_BF16, 128) if dtype == torch.bfloat16 else (codes.INT4_FP16, 1024)
    less = register(torch.full((2, 1), -float(magic + zero), dtype=torch.float64), dtype)
    inputs = {"$4": TWO, **{f"${5 + j}": less for j in range(4)}}
    for j, got in enumerate(followed(assembly.value, inputs, dtype)):
        for half, words in enumerate((TWO & 0xFFFF, TWO >> 16)):
            assert torch.equal(got[half], ((words >> 4 * j & 15) - zero).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp4(dtype: torch.dtype) -> None:
    assembly = codes.FP4_BF16 if dtype == torch.bfloat16 else codes.FP4_FP16
    every = torch.cartesian_prod(*[torch.arange(16)] * 4).to(torch.uint8)
    spans = every.repeat_interleave(32, 1)  # one row a combination: 32 columns a slice
    words = words_of(quantization.packed(spans), Scheme("fp4", group=32))[0, :, 0].long() & 0xFFFF
    both = words | words.flip(0) << 16
    numbers = quantization.fp4_values(every).double()
    for j, got in enumerate(followed(assembly.value, {"$4": both}, dtype)):
        assert torch.equal(got[0], numbers[:, j])
        assert torch.equal(got[1], numbers.flip(0)[:, j])


def test_scaled() -> None:
    """Every code by its own scale, rounded once."""
    numbers = torch.randn(8, 2, 100, generator=torch.Generator().manual_seed(0)).bfloat16().double()
    inputs = {f"${4 + j}": register(numbers[j], torch.bfloat16) for j in range(8)}
    for j, got in enumerate(followed(codes.SCALED.value, inputs, torch.bfloat16)):
        assert torch.equal(got, (numbers[j] * numbers[j + 4]).bfloat16().double())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_bytes(kind: str) -> None:
    every = torch.arange(256, dtype=torch.int64)
    codes_of = torch.cartesian_prod(every, every).to(torch.uint8)
    words = codes_of[:, 0].long() | codes_of[:, 1].long() << 8
    stored = codes_of.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    assembly = codes.INT8_BF16 if kind == "int8" else codes.FP8_BF16
    (got,) = followed(assembly.value, {"$1": words}, torch.bfloat16, outputs=1)
    for half in range(2):
        numbers = stored[:, half].double()
        real = ~numbers.isnan()
        assert torch.equal(got[half][real], numbers[real])


def test_times() -> None:
    """Every number by its own scale, rounded once."""
    numbers = torch.randn(2, 2, 100, generator=torch.Generator().manual_seed(0)).bfloat16().double()
    inputs = {f"${1 + j}": register(numbers[j], torch.bfloat16) for j in range(2)}
    (got,) = followed(codes.TIMES.value, inputs, torch.bfloat16, outputs=1)
    assert torch.equal(got, (numbers[0] * numbers[1]).bfloat16().double())
