"""2:4 weights as the kernels read them: the kept numbers as they are, positions in words of their order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from backbench.backends.interface import Scheme, Weight
from backbench.backends.triton.quantized_configs import SPARSE_SPAN
from backbench.backends.triton.quantized_weight import bytes_of, words_of

WORDS = SPARSE_SPAN // 16
"""Words of a span: each holds the positions of four groups of four columns."""
CODES = Scheme("int4", group=WORDS)
"""Positions of a group are four bits, like codes of which a slice of WORDS shares a scale."""


@dataclass
class SparseWeight:
    """A compressed weight [n, k]: 2:4, in 16 bits or fp32. S = spans of 256 columns."""

    scheme: ClassVar[Scheme] = Scheme(sparsity="2:4")

    n: int
    k: int
    values: Tensor
    """[n, k/2]: the kept numbers."""
    positions: Tensor
    """int16 [S, n, WORDS]: nibble j of word e of span s says where group (4 s + j) * WORDS + e of a row has
    its numbers, as a nibble of `Weight.positions` does; anything past the last group."""
    library: Tensor | None = None
    """What torch's semi-structured products want besides (`sparse.with_library`): int16 [n, k/16] of CUTLASS;
    of cuSPARSELt the end of its buffer [n * k * 9/16] in the dtype, which begins with `values`."""

    def tensors(self, read: bool = False) -> tuple[Tensor, ...]:
        """What is held; read: what one product reads, which takes one order of positions or the other."""
        found = (self.values, self.positions)
        return found if read or self.library is None else (*found, self.library)

    @property
    def num_bytes(self) -> int:
        """Device bytes."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def buffer(self) -> Tensor:
        """cuSPARSELt's form [n, k * 9/16]: the numbers and what follows them in memory. Its product takes the
        output features from this shape; what a row of it holds belongs to others as well."""
        assert self.library is not None
        whole = self.values.as_strided((self.values.numel() + self.library.numel(),), (1,))
        return whole.view(self.n, -1)

    def copy(self) -> SparseWeight:
        """The same numbers and positions in other memory."""
        return SparseWeight(self.n, self.k, self.values.clone(), self.positions.clone())

    def in_buffer(self, buffer: Tensor) -> SparseWeight:
        """With its numbers those that cuSPARSELt's form [n * k * 9/16] begins with."""
        numbers = self.values.numel()
        return replace(self, values=buffer[:numbers].view(self.values.shape), library=buffer[numbers:])


def pack_sparse(weight: Weight, device: torch.device) -> SparseWeight:
    """`weight` for the kernels on `device`; the canonical positions are not kept."""
    assert weight.positions is not None
    positions = words_of(weight.positions, CODES).to(device).contiguous()
    return SparseWeight(weight.n, weight.k, weight.q.to(device).contiguous(), positions)


def unpack_sparse(packed: SparseWeight) -> Weight:
    """What `pack_sparse` was given."""
    positions = bytes_of(packed.positions, CODES, packed.k // 4)
    return Weight(packed.scheme, packed.values, positions=positions)


def sparse_refused(scheme: Scheme, k: int) -> list[str]:
    """What the kernels lack for a compressed weight of k input features; empty = nothing."""
    reasons = []
    if scheme.activation is not None:
        reasons.append("rows are not rounded for 2:4 weights in the model's dtype")
    if scheme.group is not None or scheme.zero_point:
        reasons.append("2:4 weights in the model's dtype have no scales")
    if k % 8:
        reasons.append(f"{k} columns do not divide into eights")
    return reasons
