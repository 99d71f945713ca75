"""A cache's bytes, two at a time, and int8 codes by themselves, as numbers."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from backbench.backends.triton.kernel_math import operand  # noqa: E402
from backbench.backends.triton.paired_decode import byte_pairs  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="assembles PTX"))


@triton.jit  # type: ignore[misc]
def _unpack(words, even, odd, PTX: tl.constexpr, SCALED: tl.constexpr):
    place = tl.arange(0, 64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    low, high = byte_pairs(tl.load(words + place), tl.load(even + place), PTX, SCALED)
    tl.store(even + place, low)
    tl.store(odd + place, high)


@triton.jit  # type: ignore[misc]
def _number(codes, out, WIDEN: tl.constexpr, PTX: tl.constexpr):
    place = tl.arange(0, 32)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + place, operand(tl.load(codes + place), tl.load(out + place), WIDEN, PTX))


ways = pytest.mark.parametrize("ptx", [False, pytest.param(True, marks=ON_GPU)])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@ways
@dtypes
def test_every_code_is_its_number(dtype: torch.dtype, ptx: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    words = torch.stack([codes, codes.flip(0)], dim=1).to(DEVICE).view(torch.int16)
    even, odd = torch.zeros(2, 256, dtype=dtype, device=DEVICE)
    _unpack[(1,)](words, even, odd, PTX=ptx, SCALED=False)
    wanted = codes.view(torch.float8_e4m3fn).float()
    wanted[[0x7F, 0xFF]] = torch.tensor([480.0, -480.0])
    for found in (even.float().cpu(), odd.float().cpu().flip(0)):
        assert torch.equal(found, wanted) and torch.equal(found.signbit(), wanted.signbit())


@ways
@dtypes
def test_every_int8_code_is_its_number(dtype: torch.dtype, ptx: bool) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8)
    words = torch.stack([codes, codes.flip(0)], dim=1).to(DEVICE).view(torch.int16)
    even, odd, alone = torch.zeros(3, 256, dtype=dtype, device=DEVICE)
    _unpack[(1,)](words, even, odd, PTX=ptx, SCALED=True)
    _number[(1,)](codes.to(DEVICE), alone, WIDEN=DEVICE.type == "cpu", PTX=ptx)
    for found in (even.cpu(), odd.cpu().flip(0), alone.cpu()):
        assert torch.equal(found.float(), codes.float())
