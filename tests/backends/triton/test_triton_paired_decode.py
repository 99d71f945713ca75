"""An fp8 cache's bytes, two at a time, as numbers."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from backbench.backends.triton.paired_decode import e4m3_pairs  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="assembles PTX"))


@triton.jit  # type: ignore[misc]
def _unpack(words, even, odd, PTX: tl.constexpr):
    place = tl.arange(0, 64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    low, high = e4m3_pairs(tl.load(words + place), tl.load(even + place), PTX)
    tl.store(even + place, low)
    tl.store(odd + place, high)


@pytest.mark.parametrize("ptx", [False, pytest.param(True, marks=ON_GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_code_is_its_number(dtype: torch.dtype, ptx: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    words = torch.stack([codes, codes.flip(0)], dim=1).to(DEVICE).view(torch.int16)
    even, odd = torch.zeros(2, 256, dtype=dtype, device=DEVICE)
    _unpack[(1,)](words, even, odd, PTX=ptx)
    wanted = codes.view(torch.float8_e4m3fn).float()
    wanted[[0x7F, 0xFF]] = torch.tensor([480.0, -480.0])
    for found in (even.float().cpu(), odd.float().cpu().flip(0)):
        assert torch.equal(found, wanted) and torch.equal(found.signbit(), wanted.signbit())
