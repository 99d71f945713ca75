"""What quantized numbers mean: the specification that every kernel and every checkpoint format is held to.

A weight's element is (code - zero) * scale, with row_scale on top of e4m3 scales; a compressed one's is 0 or
one of the two numbers kept of every four. Rounding to nearest
follows compressed-tensors (a symmetric integer's scale is 2 * absmax / (2^bits - 1)); fp4 and its scales
follow the OCP Microscaling Formats specification 1.0 (MXFP4, MXFP8) and NVIDIA's NVFP4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from backbench.backends.interface.weight import PACKED, Scheme, Weight, join
from backbench.errors import BackendError

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT8_KV_MAX = 127.0
"""The largest code of an int8 cache, whose codes lie around 0."""
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of e2m1's codes 0 to 7; bit 3 is the sign."""
FP4_MAX = 6.0
PLACES = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)
"""Codes of the six places that two of four numbers can have, as `Weight.positions` keeps them."""
SMALLEST_SCALE = 2.0**-126
"""What a group of zeros is divided by."""
VALUES_AT_ONCE = {"cpu": 2**18, "gpu": 2**24}
"""Numbers that are worked on at once: what a CPU's second cache holds of them in fp32, and what keeps a GPU
busy in some tens of MiB."""
ROUNDED_AT_ONCE = {"cpu": 2**18, "gpu": 2**22}
"""Numbers that are rounded at once: half a dozen copies are held of them meanwhile."""

ACTIVATIONS: Mapping[str, tuple[str, int | None, str]] = {
    "int8-token": ("int8", None, "float"),
    "int8-tensor": ("int8", None, "static"),
    "fp8-token": ("fp8", None, "float"),
    "fp8-tensor": ("fp8", None, "static"),
    "fp8-group128": ("fp8", 128, "float"),
    "mxfp8": ("fp8", 32, "e8m0"),
    "mxfp4": ("fp4", 32, "e8m0"),
    "nvfp4": ("fp4", 16, "e4m3"),
}
"""Name -> (kind of number, features that share a scale (None = the row), kind of scale).

"static" is the checkpoint's `input_scale` for every row; the others are taken from the row itself.
"""

SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme("int8"),
    "int8-w8a8": Scheme("int8", activation="int8-token"),
    "fp8": Scheme("fp8", activation="fp8-token"),
    "fp8-block": Scheme("fp8", group=128, group_n=128, activation="fp8-group128"),
    "int4-g128": Scheme("int4", group=128),
    "int4-g32": Scheme("int4", group=32),
    "nvfp4": Scheme("fp4", group=16, scale="e4m3"),
    "mxfp4": Scheme("fp4", group=32, scale="e8m0"),
}
"""What `--quantize` offers, by name."""


def unpacked(q: Tensor) -> Tensor:
    """Four-bit codes uint8 [N, K/2] as uint8 [N, K], the low four bits first."""
    return torch.stack((q & 15, q >> 4), -1).flatten(1)


def packed(codes: Tensor) -> Tensor:
    """The inverse of `unpacked`: codes 0 to 15 [N, K], K even, as uint8 [N, K/2]."""
    codes = codes.to(torch.uint8)
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def compress(dense: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K], of which two of each four neighbours along K are 0, as the numbers that are kept [N, K/2], and
    where they stand, uint8 [N, K/8] (`Weight.positions`). Where more are 0, some of these are kept.

    Raises BackendError where fewer are 0.
    """
    fours = dense.unflatten(1, (-1, 4))
    there = (fours != 0).to(torch.uint8)
    if bool((there.sum(-1, dtype=torch.uint8) > 2).any()):
        raise BackendError("Of some four numbers more than two are not 0; prune the weight to 2:4 first.")
    first, last = there.argmax(-1), 3 - there.flip(-1).argmax(-1)
    alone = first == last
    first, last = torch.where(alone, 0, first), torch.where(alone & (last == 0), 1, last)
    return fours.gather(-1, torch.stack((first, last), -1)).flatten(1), packed(first | (last << 2))


def expand(values: Tensor, positions: Tensor) -> Tensor:
    """[N, K]: the inverse of `compress`, in the dtype of the values."""
    codes = unpacked(positions)
    places = torch.stack((codes & 3, codes >> 2), -1).long()
    fours = values.new_zeros((*codes.shape, 4))
    return fours.scatter_(-1, places, values.unflatten(1, (-1, 2))).flatten(1)


def fp4_values(codes: Tensor) -> Tensor:
    """f32 numbers of e2m1 codes 0 to 15: `FP4_VALUES`, negative from 8 on.

    A code's bits are moved to where fp16 has its sign, exponent and mantissa: a quarter of a table's time.
    The exponents' biases are 14 apart, and also the numbers below each format's normal ones agree.
    """
    bits = codes.to(torch.int16)
    return (((bits & 8) << 12) | ((bits & 7) << 9)).view(torch.float16).float() * 2.0**14


def fp4_codes(x: Tensor) -> Tensor:
    """e2m1 codes, uint8, of the nearest numbers, halves to the even code; beyond 6 is 6."""
    magnitude = x.abs().float()
    codes = torch.zeros_like(magnitude, dtype=torch.uint8)
    for code, (low, high) in enumerate(pairwise(FP4_VALUES)):
        middle = (low + high) / 2
        codes += magnitude >= middle if code % 2 else magnitude > middle
    return codes + 8 * torch.signbit(x)


def scale_values(weight: Weight) -> Tensor:
    """f32 [R, G]: a quantized weight's scales as numbers, without `row_scale`."""
    if weight.scale is None:
        raise BackendError(f"A weight kept as {weight.scheme} has no scale.")
    if weight.scheme.scale == "e8m0":
        return torch.exp2(weight.scale.float() - 127)
    return weight.scale.float()


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`: what the weight means, each element rounded once, in its stored order of columns."""
    scheme = weight.scheme
    if scheme.dense:
        return weight.q.to(dtype)
    if scheme.compressed:
        assert weight.positions is not None
        return expand(weight.q, weight.positions).to(dtype)
    codes = unpacked(weight.q) if scheme.weight in PACKED else weight.q
    numbers = fp4_values(codes) if scheme.weight == "fp4" else codes.float()
    if weight.zero is not None:
        numbers = numbers - _spread(weight.zero.float(), weight)
    elif scheme.weight == "int4":
        numbers = numbers - 8
    numbers = numbers * _spread(scale_values(weight), weight)
    if weight.row_scale is not None:
        numbers = numbers * weight.row_scale[:, None]
    return numbers.to(dtype)


def require_divisible(k: int, scheme: Scheme) -> None:
    """Raises BackendError where K input features do not divide into the scheme's groups and bytes."""
    if k % (scheme.group or k):
        raise BackendError(f"{k} input features do not divide into groups of {scheme.group}.")
    if scheme.weight in PACKED and k % 2:
        raise BackendError(f"{k} input features do not divide into bytes of two.")
    if scheme.compressed and k % 8:
        raise BackendError(f"{k} input features do not divide into eights, as compressed 2:4 needs.")
    if scheme.sparsity == "2:4" and k % 4:
        raise BackendError(f"{k} input features do not divide into fours, as 2:4 needs.")


def quantize(dense: Tensor, scheme: Scheme, scale_dtype: torch.dtype | None = None) -> Weight:
    """[N, K] rounded to nearest in `scheme`, or compressed; scales that are floats are kept in `scale_dtype`
    (None = the dense dtype).

    Rows are rounded some at a time, so that little but the result is held beside `dense`.
    Raises BackendError where K does not divide into groups, the scheme is not one this can write, or numbers
    to be compressed are not 2:4.
    """
    if scheme.dense:
        return Weight(scheme, dense)
    n, k = dense.shape
    require_divisible(k, scheme)
    if scheme.activation in ("int8-tensor", "fp8-tensor"):
        raise BackendError(f"{scheme.activation} needs a calibrated scale; a dynamic one is written here.")
    top = torch.stack(dense.aminmax()).abs().max().float() if scheme.scale == "e4m3" else None
    rows = rows_at_once(k, scheme, dense.device, ROUNDED_AT_ONCE)
    return (
        join([_quantize(part, scheme, top, scale_dtype) for part in dense.split(rows)])
        if n
        else _quantize(dense, scheme, top, scale_dtype)
    )


def rows_at_once(
    k: int, scheme: Scheme, device: torch.device, values: Mapping[str, int] = VALUES_AT_ONCE
) -> int:
    """Output features whose numbers are worked on at once: whole blocks of scales, about `values`."""
    rows = values["cpu" if device.type == "cpu" else "gpu"] // k
    return max(1, rows // scheme.group_n) * scheme.group_n


def step_sizes(weight: Weight) -> Tensor:
    """f32 [R, G], or [N, G] where rows are scaled as well: what a quantized weight's numbers are multiples
    of, never 0."""
    steps = scale_values(weight)
    if weight.row_scale is not None:
        steps = steps * weight.row_scale[:, None]
    return steps.clamp(min=SMALLEST_SCALE)


def nearest(x: Tensor, kind: str) -> Tensor:
    """f32: the number of this kind (`Scheme.weight`) nearest to each of x, which is in steps [N, any]."""
    codes = _codes(x, kind, pack=False)
    if kind == "fp4":
        return fp4_values(codes)
    return codes.float() - 8 if kind == "int4" else codes.float()


def on_scales_of(weight: Weight, dense: Tensor) -> Weight:
    """`dense` [N, K] rounded to nearest with the scales of `weight`, whose codes are let go of."""
    steps = _spread(step_sizes(weight), weight)
    return replace(weight, q=_codes(dense.float() / steps, weight.scheme.weight))


def _quantize(
    dense: Tensor, scheme: Scheme, top: Tensor | None, scale_dtype: torch.dtype | None = None
) -> Weight:
    """As `quantize`, of some rows; top: the largest magnitude of all rows, where the scales need it."""
    if scheme.compressed:
        values, positions = compress(dense)
        return Weight(scheme, values, positions=positions)
    n, k = dense.shape
    group = scheme.group or k
    x = dense.float()
    scale_dtype = scale_dtype or dense.dtype
    if scheme.zero_point:
        return _asymmetric(dense, scheme, group, scale_dtype)
    largest = _largest(x, scheme.group_n, group)
    scale, row_scale = _scale(largest, scheme, top)
    if scheme.scale == "float":
        scale = scale.to(scale_dtype)
    weight = Weight(scheme, dense, scale, row_scale=None if row_scale is None else row_scale.repeat(n))
    weight.q = _codes(x / _spread(step_sizes(weight), weight, n, k), scheme.weight)
    return weight


def rounded_rows(x: Tensor, activation: str, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows [M, K] rounded as `activation` says: codes [M, K] and their scale f32 [M, groups].

    Codes are int8 or float8_e4m3fn; those of fp4 are their values in f32. A row's number is code * scale.
    """
    kind, size, scaling = ACTIVATIONS[activation]
    x = x.float()
    if scaling == "static":
        assert input_scale is not None
        scale = input_scale.float().reshape(1, 1).expand(x.shape[0], 1)
    else:
        group = size or x.shape[1]
        scheme = Scheme(kind, group=group, scale=scaling)
        if scaling == "e4m3":
            assert input_scale is not None
            stored = (_largest(x, 1, group) / FP4_MAX / input_scale).clamp(max=FP8_MAX).to(FP8)
            scale = stored.float() * input_scale
        else:
            stored, _ = _scale(_largest(x, 1, group), scheme)
            scale = scale_values(Weight(scheme, x, stored))
    groups = scale.shape[1]
    codes = _codes(
        x.unflatten(1, (groups, -1)) / scale.clamp(min=SMALLEST_SCALE)[..., None], kind, pack=False
    ).flatten(1)
    return (fp4_values(codes) if kind == "fp4" else codes), scale


def rounded_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values [..., head_dim] as an int8 cache keeps them: codes -127 to 127, and scales f32 [...].

    A number is code * scale; a head's scale is its largest magnitude over 127, and not finite where that is
    not.
    """
    x = x.float()
    largest = x.abs().amax(-1)
    # By a tensor: where the divisor is a number, torch multiplies by its reciprocal on a GPU.
    scale = largest / torch.full_like(largest, INT8_KV_MAX)
    return (x / scale.clamp(min=SMALLEST_SCALE)[..., None]).round().to(torch.int8), scale


def head_numbers(codes: Tensor, scale: Tensor) -> Tensor:
    """The numbers f32 [..., head_dim] that codes and their scales [...] mean."""
    return codes.float() * scale[..., None]


def kept_heads(x: Tensor, kv_dtype: torch.dtype) -> Tensor:
    """Keys or values [..., head_dim] as a cache of `kv_dtype` means them; f32 where that is int8."""
    return head_numbers(*rounded_heads(x)) if kv_dtype == torch.int8 else x.to(kv_dtype)


def meant_rows(x: Tensor, weight: Weight) -> Tensor:
    """What the weight multiplies, [M, K]: x's columns in the weight's order, and rounded (in x's dtype where
    that holds fp32, else in fp32) where the scheme rounds rows."""
    if weight.order is not None:
        x = x[:, weight.order]
    if weight.scheme.activation is None:
        return x
    codes, scale = rounded_rows(x, weight.scheme.activation, weight.input_scale)
    meant = (codes.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
    return meant.to(torch.promote_types(x.dtype, torch.float32))


def product(x: Tensor, weight: Weight) -> Tensor:
    """x [M, K] times the weight's transpose, f32 [M, N]: what every kernel is compared with."""
    return meant_rows(x, weight).float() @ dequantize(weight, torch.float32).T


def named(scheme: str) -> Scheme:
    """The scheme `--quantize` calls so; raises BackendError that lists the names."""
    if scheme not in SCHEMES:
        raise BackendError(f"There is no scheme {scheme!r}; there are {', '.join(SCHEMES)}.")
    return SCHEMES[scheme]


def name_of(scheme: Scheme) -> str:
    """What people call the scheme: its name in `--quantize` where it has one, and its sparsity; or "none"."""
    plain = replace(scheme, sparsity=None)
    name = next((name for name, each in SCHEMES.items() if each == plain), str(plain))
    parts = ["" if plain == Scheme() else name, scheme.sparsity or ""]
    return " ".join(filter(None, parts)) or "none"


def _spread(groups: Tensor, weight: Weight, n: int | None = None, k: int | None = None) -> Tensor:
    """[R, G] repeated over the rows and columns that share each: [N, K], or [N, 1] with a scale a row."""
    n, k = n or weight.n, k or weight.k
    scheme = weight.scheme
    rows = groups if scheme.group_n == 1 else groups.repeat_interleave(scheme.group_n, 0)[:n]
    return rows if scheme.group is None else rows.repeat_interleave(scheme.group, 1)[:, :k]


def _largest(x: Tensor, group_n: int, group: int) -> Tensor:
    """f32 [R, G]: the largest magnitude of every block of group_n rows and `group` columns."""
    by_row = x.abs().unflatten(1, (-1, group)).amax(-1)
    short = -by_row.shape[0] % group_n
    return torch.nn.functional.pad(by_row, (0, 0, 0, short)).unflatten(0, (-1, group_n)).amax(1)


def _scale(largest: Tensor, scheme: Scheme, top: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales [R, G] as they are stored, and the f32 [1] that multiplies e4m3 ones.

    top: the largest magnitude that e4m3 scales must reach.
    """
    if scheme.scale == "e8m0":
        # The largest element's exponent, less that of the format's largest number (e4m3: 8, e2m1: 2). From
        # 1.75 on it counts as the next power of two, as in compressed-tensors, whose checkpoints say no more.
        mantissa, exponent = torch.frexp(largest.clamp(min=SMALLEST_SCALE))
        exponent = exponent - 1 + (mantissa >= 0.875).int()
        return (exponent - (8 if scheme.weight == "fp8" else 2) + 127).clamp(0, 254).to(torch.uint8), None
    tops = {"int8": 127.5, "int4": 7.5, "fp8": FP8_MAX, "fp4": FP4_MAX}
    scale = largest / tops[scheme.weight]
    if scheme.scale == "e4m3":
        assert top is not None
        whole = (top / (FP4_MAX * FP8_MAX)).clamp(min=SMALLEST_SCALE).reshape(1)
        return (scale / whole).to(FP8), whole
    return scale, None


def _codes(x: Tensor, kind: str, pack: bool = True) -> Tensor:
    """Scaled numbers as codes of this kind, out of range ones at its ends."""
    if kind == "fp8":
        return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)
    if kind == "int8":
        return x.round().clamp(-128, 127).to(torch.int8)
    codes = fp4_codes(x) if kind == "fp4" else (x.round().clamp(-8, 7) + 8).to(torch.uint8)
    return packed(codes) if pack else codes


def _asymmetric(dense: Tensor, scheme: Scheme, group: int, scale_dtype: torch.dtype) -> Weight:
    """As `quantize`, with the zero point of every group: 0 is always exact."""
    if scheme.weight not in ("int4", "int8") or scheme.group_n != 1:
        raise BackendError(f"Zero points are for integers with a scale a row, not for {scheme}.")
    levels, offset = (15, 0) if scheme.weight == "int4" else (255, 128)
    groups = dense.float().unflatten(1, (-1, group))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / levels).clamp(min=SMALLEST_SCALE).to(scale_dtype)
    zero = (-low / scale.float()).round().clamp(0, levels)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, levels).flatten(1) - offset
    q = packed(codes) if scheme.weight == "int4" else codes.to(torch.int8)
    kept = torch.uint8 if scheme.weight == "int4" else torch.int8
    return Weight(scheme, q, scale, (zero - offset).to(kept))
