"""Quantized weights as the kernels read them: four-bit codes in words of their own order, scales turned."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbench.backends.interface import Scheme, Weight
from backbench.backends.interface.weight import PACKED
from backbench.backends.quantization import FP8, scale_values, unpacked
from backbench.backends.quantization import packed as packed_codes

CODES = 4
"""Four-bit codes of a 16-bit word."""
WORDS = 32
"""Words of a span, so columns of a slice that share every group; 16 where groups are that small."""
SIGNS = (14, 12, 15, 13)
"""Of a word's fp4 codes, the bits of their signs."""
NATIVE_ACTIVATIONS = ("int8-token", "int8-tensor", "fp8-token", "fp8-tensor", "fp8-group128")
"""Roundings whose codes and scales the kernels take apart; of others they take the numbers (`rounding`)."""
ROUNDINGS = ("int8-token", "fp8-token", "fp8-group128")
"""Those of them that norm and gate can do in their own launch (`fused_rounding`): no scale is given."""
ENDLESS = 2**30
"""Columns of a group that holds them all."""
BF16_SCALES = (torch.bfloat16, torch.uint8, FP8)
"""Kept scales that bf16 holds exactly."""


@dataclass
class QuantizedWeight:
    """A quantized weight [n, k] packed for the kernels.

    G = groups along k, R = rows of scales, S = spans.
    """

    scheme: Scheme
    n: int
    k: int
    codes: Tensor
    """int4, fp4: int16 words [S, n, words], see `words_of`; int8, fp8: [n, k] as they are."""
    scale: Tensor
    """As the canonical weight's, but [G, n] beside words; beside bytes [R, G], or f32 [n, 1] where G = 1."""
    zero: Tensor | None
    """uint8 [G, n] beside words, int8 in the shape of `scale` beside bytes."""
    row_scale: Tensor | None
    order: Tensor | None
    input_scale: Tensor | None

    @property
    def packed(self) -> bool:
        """Two codes a byte."""
        return self.scheme.weight in PACKED

    @property
    def words(self) -> int:
        """Words of a span."""
        return words_a_span(self.scheme)

    @property
    def scale_kind(self) -> str:
        """What the kernels take the scale for: "float", "e8m0" or "e4m3" (`codes.exact_scale`)."""
        return "float" if self.scale.dtype == torch.float32 else self.scheme.scale

    @property
    def scale_rows(self) -> int:
        """Rows that share a scale as it is kept here."""
        return 1 if self.packed or self.scheme.group is None else self.scheme.group_n

    @property
    def num_bytes(self) -> int:
        """Device bytes."""
        kept = (self.codes, self.scale, self.zero, self.row_scale, self.order, self.input_scale)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def copy(self) -> QuantizedWeight:
        """The same weight, its codes in other memory."""
        return replace(self, codes=self.codes.clone())


def words_a_span(scheme: Scheme) -> int:
    """Words of a span of a four-bit weight: a group holds whole slices of as many columns."""
    return WORDS if scheme.group is None or scheme.group % WORDS == 0 else WORDS // 2


def pack_weight(weight: Weight, device: torch.device) -> QuantizedWeight:
    """`weight` for the kernels on `device`; the canonical codes are not kept."""
    scheme, scale, zero = weight.scheme, weight.scale, weight.zero
    assert scale is not None
    codes = weight.q
    if scheme.weight in PACKED:
        codes = words_of(weight.q, scheme)
        scale = _by_group(scale, weight.n, scheme)
        zero = None if zero is None else _by_group(zero, weight.n, scheme)

    elif scheme.group is None:
        # One scale a row, as every library takes it.
        scale = _by_group(scale_values(weight), weight.n, scheme).T
        zero = None if zero is None else _by_group(zero, weight.n, scheme).T

    def here(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device).contiguous()

    at = scale.to(device).contiguous()
    rest = [here(each) for each in (zero, weight.row_scale, weight.order, weight.input_scale)]
    return QuantizedWeight(scheme, weight.n, weight.k, codes.to(device).contiguous(), at, *rest)


def words_of(q: Tensor, scheme: Scheme) -> Tensor:
    """uint8 [n, k/2] as int16 words [S, n, words]; columns past k are zeros.

    Word e of span s holds the codes of columns (4 s + j) * words + e for j = 0 to 3: int4 in nibble j; of fp4
    the magnitude in bits 3 j to 3 j + 2 and the sign in bit 14, 12, 15 or 13.
    """
    words = words_a_span(scheme)
    n, k = q.shape[0], 2 * q.shape[1]
    spans = -(-k // (CODES * words))
    found = q.new_empty((spans, n, words), dtype=torch.int16)
    empty = 8 if scheme.weight == "int4" else 0
    step = max(1, 2**23 // max(k, 1))  # rows at a time: codes unpacked take many times the memory
    for start in range(0, n, step):
        codes = unpacked(q[start : start + step])
        codes = torch.nn.functional.pad(codes, (0, spans * CODES * words - k), value=empty)
        slices = codes.to(torch.int32).view(-1, spans, CODES, words)
        shape = (slices.shape[0], spans, words)
        word = torch.zeros(shape, dtype=torch.int32, device=q.device)
        for j, sign in enumerate(SIGNS):
            code = slices[:, :, j]
            if scheme.weight == "int4":
                word |= code << (4 * j)
            else:
                word |= ((code & 7) << (3 * j)) | ((code >> 3) << sign)
        signed = torch.where(word >= 2**15, word - 2**16, word).to(torch.int16)
        found[:, start : start + step] = signed.transpose(0, 1)
    return found


def unpack_weight(packed: QuantizedWeight) -> Weight:
    """What `pack_weight` was given: the same codes, and the same numbers by them.

    A scale that the kernels have for every row stays so: blocks of rows have then none in common, and a scale
    a row is in fp32.
    """
    scheme, q, scale, zero = packed.scheme, packed.codes, packed.scale, packed.zero
    if packed.packed:
        q, scale = bytes_of(q, scheme, packed.k), scale.T.contiguous()
        zero = None if zero is None else zero.T.contiguous()
        scheme = replace(scheme, group_n=1)
    elif scheme.group is None:
        scheme = replace(scheme, group_n=1, scale="float")
    return Weight(scheme, q, scale, zero, packed.row_scale, packed.order, packed.input_scale)


def bytes_of(words: Tensor, scheme: Scheme, k: int) -> Tensor:
    """The inverse of `words_of`: uint8 [n, k/2] of int16 words [S, n, words]."""
    spans, n, size = words.shape
    found = words.new_empty((n, k // 2), dtype=torch.uint8)
    step = max(1, 2**23 // max(k, 1))
    for start in range(0, n, step):
        word = words[:, start : start + step].to(torch.int32).transpose(0, 1)
        codes = torch.stack(
            [
                (word >> (4 * j)) & 15
                if scheme.weight == "int4"
                else ((word >> (3 * j)) & 7) | (((word >> sign) & 1) << 3)
                for j, sign in enumerate(SIGNS)
            ],
            dim=2,
        )
        found[start : start + step] = packed_codes(codes.reshape(-1, spans * CODES * size)[:, :k])
    return found


def _by_group(groups: Tensor, n: int, scheme: Scheme) -> Tensor:
    """[R, G] as [G, n]: the rows of a program lie together, whatever rows share a scale."""
    if scheme.group_n > 1:
        groups = groups[torch.arange(n, device=groups.device) // scheme.group_n]
    return groups.T.contiguous()
