"""How weights are kept: the canonical layout every checkpoint format becomes before a backend packs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from backbench.errors import BackendError

PACKED = ("int4", "fp4")
"""Kinds of weight of which a byte holds two."""


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored, and in what the rows are that it multiplies. The default is a dense weight.

    `backends.quantization` says what the numbers mean (`dequantize`) and names the common schemes.
    """

    weight: str = "dense"
    """"dense" (the model's dtype), "int8", "int4", "fp8" (e4m3) or "fp4" (e2m1)."""
    group: int | None = None
    """Input features that share a scale; None = all of them."""
    group_n: int = 1
    """Output features that share a scale: 1 = every row has its own."""
    scale: str = "float"
    """"float" (16 or 32 bits), "e8m0" (powers of two) or "e4m3" (fp8, times `Weight.row_scale`)."""
    zero_point: bool = False
    """Every group has a zero point; without one, int4 codes are around 8 and int8 codes around 0."""
    activation: str | None = None
    """How rows are rounded before they are multiplied (`quantization.ACTIVATIONS`); None = not at all."""
    sparsity: str | None = None
    """"2:4" (two of each four neighbours along K are zero) or "unstructured:SHARE" (that share of every row
    is). A 2:4 weight that is not quantized is kept without its zeros; else the layout is the same."""

    @property
    def quantized(self) -> bool:
        """Numbers are kept as codes of fewer bits than the model's dtype has."""
        return self.weight != "dense"

    @property
    def compressed(self) -> bool:
        """Of each four numbers two are kept, in the model's dtype, and where they stand."""
        return self.sparsity == "2:4" and not self.quantized

    @property
    def dense(self) -> bool:
        """Every number is kept, in the model's dtype, whatever its zeros are."""
        return not self.quantized and not self.compressed

    @property
    def columns_together(self) -> int:
        """Input features that cannot be parted: they share a scale, or a byte of codes or positions."""
        return self.group or (8 if self.compressed else 2 if self.weight in PACKED else 1)

    def __str__(self) -> str:
        own = [f"{each.name}={getattr(self, each.name)}" for each in fields(self)[1:]]
        default = [f"{each.name}={each.default}" for each in fields(self)[1:]]
        differing = [mine for mine, usual in zip(own, default, strict=True) if mine != usual]
        return f"{self.weight}({', '.join(differing)})" if differing else self.weight


@dataclass(frozen=True)
class WeightSpec:
    """One linear of a model, as a backend is asked for it: for every role, before any weight is loaded."""

    role: str
    """"qkv", "attention_output", "gate_up", "down" or "head"."""
    n: int
    """Output features."""
    k: int
    """Input features."""
    scheme: Scheme
    dtype: torch.dtype
    """Of activations, and of a dense weight."""


@dataclass
class Weight:
    """A linear weight [N, K] in the canonical layout: output features by input features.

    G = groups along K, ceil(K / group), or 1; R = ceil(N / group_n).
    """

    scheme: Scheme
    q: Tensor
    """dense: the dtype [N, K], [N, K/2] of a compressed one; int8: int8 [N, K]; fp8: float8_e4m3fn [N, K];
    int4 and fp4: uint8 [N, K/2], the even column in the low four bits."""
    scale: Tensor | None = None
    """[R, G]: fp16, bf16 or fp32; e8m0 as uint8 exponents biased by 127; e4m3 as float8_e4m3fn."""
    zero: Tensor | None = None
    """[R, G] the code that means 0: uint8 beside int4 codes, int8 beside int8 codes."""
    row_scale: Tensor | None = None
    """f32 [N]: what multiplies an e4m3 scale (the inverse of NVFP4's global scale)."""
    order: Tensor | None = None
    """i64 [K]: column j multiplies feature order[j] of a row, so that act-order groups are contiguous."""
    input_scale: Tensor | None = None
    """f32 [1]: what a static activation is divided by, or NVFP4's global scale of activations, inverted."""
    positions: Tensor | None = None
    """uint8 [N, K/8]: of every four numbers of a compressed weight where the kept two stand, the first in the
    two low bits and the second, which is further on, in the next; the even four's in the low four bits."""

    @property
    def n(self) -> int:
        """Output features."""
        return self.q.shape[0]

    @property
    def k(self) -> int:
        """Input features."""
        return self.q.shape[1] * self._columns_each

    @property
    def _columns_each(self) -> int:
        """Columns that an element of `q` stands for."""
        return 2 if self.scheme.weight in PACKED or self.scheme.compressed else 1

    def tensors(self, read: bool = False) -> tuple[Tensor, ...]:
        """What it is stored as, all of which a product reads."""
        found = (getattr(self, each.name) for each in fields(self))
        return tuple(each for each in found if isinstance(each, Tensor))

    @property
    def num_bytes(self) -> int:
        """Device bytes, scales and zero points included."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def spec(self, role: str, dtype: torch.dtype | None = None) -> WeightSpec:
        """What a backend is asked of it, for activations in `dtype` (None = the one a dense weight is in)."""
        return WeightSpec(role, self.n, self.k, self.scheme, dtype or self.q.dtype)

    def to(self, device: torch.device) -> Weight:
        """The same weight on `device`."""
        moved = replace(self, q=self.q.to(device))
        for name in ("scale", "zero", "row_scale", "order", "input_scale", "positions"):
            tensor = getattr(self, name)
            setattr(moved, name, None if tensor is None else tensor.to(device))
        return moved

    def rows(self, start: int, stop: int) -> Weight:
        """Output features [start, stop), which must not cut through a block of scales."""
        size = self.scheme.group_n
        if start % size or (stop % size and stop != self.n):
            raise BackendError(f"Rows {start} to {stop} cut through a block of {size} rows with one scale.")
        first, last = start // size, -(-stop // size)
        return replace(
            self,
            q=self.q[start:stop],
            scale=None if self.scale is None else self.scale[first:last],
            zero=None if self.zero is None else self.zero[first:last],
            row_scale=None if self.row_scale is None else self.row_scale[start:stop],
            positions=None if self.positions is None else self.positions[start:stop],
        )

    def columns(self, start: int, stop: int) -> Weight:
        """Input features [start, stop), which must not cut through a group or an order of columns."""
        size = self.scheme.group
        together = self.scheme.columns_together
        if self.order is not None:
            raise BackendError("A weight whose columns are ordered by activation cannot be split by columns.")
        if start % together or (stop % together and stop != self.k):
            raise BackendError(f"Columns {start} to {stop} cut through a group of {together}.")
        groups = slice(None) if size is None else slice(start // size, -(-stop // size))
        return replace(
            self,
            q=self.q[:, start // self._columns_each : stop // self._columns_each],
            scale=None if self.scale is None else self.scale[:, groups],
            zero=None if self.zero is None else self.zero[:, groups],
            positions=None if self.positions is None else self.positions[:, start // 8 : stop // 8],
        )

    def shard(self, dim: int, rank: int, world: int) -> Weight:
        """The `rank`-th of `world` equal parts along `dim` (0 = output features, 1 = input features)."""
        size = self.n if dim == 0 else self.k
        if size % world:
            raise BackendError(f"A weight of {size} features cannot be split into {world} equal parts.")
        part = size // world
        share = (self.rows if dim == 0 else self.columns)(rank * part, (rank + 1) * part)
        positions = None if share.positions is None else share.positions.contiguous()
        return replace(share, q=share.q.contiguous(), positions=positions)


def join(parts: Sequence[Weight]) -> Weight:
    """One weight of all parts' rows, in order: queries, keys and values as one product.

    Raises BackendError where they are kept differently, or what all rows share is not the same in each.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(part.scheme != first.scheme for part in parts):
        schemes = ", ".join(dict.fromkeys(str(part.scheme) for part in parts))
        raise BackendError(f"Rows kept in different ways cannot be one weight: {schemes}.")
    if any(part.n % first.scheme.group_n for part in parts[:-1]):
        raise BackendError(f"Parts whose rows are no multiple of {first.scheme.group_n} cannot be joined.")
    for name in ("order", "input_scale"):
        if not all(_same(getattr(part, name), getattr(first, name)) for part in parts):
            raise BackendError(f"Parts with a different {name} cannot be one weight.")

    def rows(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    return replace(
        first,
        q=torch.cat([part.q for part in parts]),
        scale=rows("scale"),
        zero=rows("zero"),
        row_scale=rows("row_scale"),
        positions=rows("positions"),
    )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
