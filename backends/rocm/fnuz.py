"""fp8 for gfx942: e4m3fn weights as e4m3fnuz without changing a value.

The MI300's format has one more exponent step: the same bits mean half the value, and 0x80, negative zero
elsewhere, is its NaN. So the bits stay, 0x80 becomes 0, and scales double. gfx950 reads e4m3fn itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbench.errors import BackendError


def to_fnuz(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(weight float8_e4m3fnuz, scale) whose product equals that of a float8_e4m3fn `weight` and `scale`.

    Raises:
        BackendError: the weight is of another dtype, or holds e4m3fn's NaN, which has no counterpart.
    """
    if weight.dtype != torch.float8_e4m3fn:
        raise BackendError(f"Only float8_e4m3fn weights become e4m3fnuz, not {weight.dtype}.")
    bits = weight.view(torch.uint8)
    if bool(((bits & 0x7F) == 0x7F).any()):
        raise BackendError("The fp8 weight holds NaN; the checkpoint is damaged.")
    return bits.masked_fill(bits == 0x80, 0).view(torch.float8_e4m3fnuz), scale * 2
