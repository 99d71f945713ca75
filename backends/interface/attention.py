"""Attention over a paged KV cache: its geometry, its batches, and what an implementation must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface.device import Device
from backbench.errors import BackendError


class GraphSupport(IntEnum):
    """Which batches may be captured in a CUDA or HIP graph; each level includes those before it."""

    NEVER = 0
    DECODE = 1
    """Batches in which every sequence has one query token."""
    UNIFORM = 2
    """Batches in which every sequence has the same number of query tokens."""
    MIXED = 3


def kv_bytes_per_token(kv_heads: int, head_dim: int, kv_dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in one layer's cache, with the scales of an int8 one."""
    scale_bytes = torch.float32.itemsize if kv_dtype == torch.int8 else 0
    return 2 * kv_heads * (head_dim * kv_dtype.itemsize + scale_bytes)


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer's geometry and the limits its batches stay under."""

    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    """Of the cache: `dtype`; float8_e4m3fn, to which keys and values are rounded in their own scale, and to
    448 beyond it; or int8, codes with a scale for every token and KV head (`quantization.rounded_heads`)."""
    block_size: int
    scale: float
    window: int | None = None
    """A query at position p sees keys in (p - window, p]; None = all."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap) before the softmax."""
    max_seqs: int = 256
    max_tokens: int = 8192
    max_len: int = 4096

    @property
    def scaled(self) -> bool:
        """True where the cache keeps scales beside its codes."""
        return self.kv_dtype == torch.int8

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that the keys and values of one token take."""
        return kv_bytes_per_token(self.kv_heads, self.head_dim, self.kv_dtype)


@dataclass
class Batch:
    """One step's batch: persistent device buffers, and host upper bounds of what they hold.

    Decodes (one query token) come first. Padding follows the decodes, and the prompts; it is inert: `slots`
    is -1 and `seq_lens` is 0 there. A padded decode has a token, a padded prompt none.
    """

    query_start: Tensor
    """i32[S + 1]: row s owns query tokens query_start[s] to query_start[s + 1]."""
    seq_lens: Tensor
    """i32[S]: keys each sequence has after this step's write (context + query)."""
    block_table: Tensor
    """i32[S, B]: physical block of each logical block; entries past a sequence's length are arbitrary."""
    slots: Tensor
    """i64[T]: physical slot (block * block_size + offset) a token's K and V go to; -1 = do not write."""
    num_seqs: int
    num_tokens: int
    num_decodes: int
    """Leading rows with exactly one query token; in a padded graph batch, inert rows count too."""
    max_query: int
    max_len: int
    """Upper bound of `seq_lens`."""
    drafted: bool = False
    """Rows verify drafted tokens behind known ones, or are prompts, `max_query` tokens at most; there are no
    decodes. A hint, for attention is the same."""


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding's table and geometry."""

    cos_sin: Tensor
    """f32[max_position, rotary_dim]: first half cosines, second half sines (rotate-half convention)."""
    rotary_dim: int


@dataclass(frozen=True)
class Rotation:
    """What a layer does to each head of its queries and keys: a norm where it has one, then the rotation."""

    rotary: Rotary
    q_norm: Tensor | None = None
    """Weight [head_dim] of the RMS norm of queries; `k_norm` that of keys."""
    k_norm: Tensor | None = None
    eps: float = 1e-6
    """Of both norms."""


class AttentionRunner(ABC):
    """Attention for one spec on one device. The cache is opaque: its layout belongs to the backend."""

    graph: GraphSupport = GraphSupport.NEVER
    batch_invariant: bool = False
    """True when a sequence's output bits do not depend on the rest of the batch."""
    fused_write: bool = False
    """True when `rotate_and_write` is offered."""
    few_queries: int = 1
    """Query tokens a sequence that are computed in about the time of one where a batch is `drafted`."""
    finite_cache: bool = False
    """True when slots past a sequence's end must hold finite values; `new_cache` then zeroes them."""

    @abstractmethod
    def new_cache(self, num_blocks: int) -> Any:
        """One layer's KV cache of `num_blocks` blocks (contents arbitrary)."""

    @abstractmethod
    def cache_bytes_per_block(self) -> int:
        """Device bytes one block of one layer takes."""

    @abstractmethod
    def plan(self, batch: Batch) -> Hashable:
        """Every host integer the launches for `batch` bake in: the key under which a graph is reused."""

    @abstractmethod
    def write(self, cache: Any, k: Tensor, v: Tensor, batch: Batch) -> None:
        """Store k, v [T, kv_heads, head_dim] at `batch.slots`; slot -1 is skipped."""

    @abstractmethod
    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        """Causal attention of q [T, q_heads, head_dim] over the cache into `out` (same shape as q).

        Token i of a sequence with n query tokens sits at position seq_len - n + i.
        Rows of `out` past the last live token may hold anything.
        """

    @abstractmethod
    def copy_blocks(self, cache: Any, src: Tensor, dst: Tensor) -> None:
        """Copy whole blocks src[i] -> dst[i] (i64 device tensors), scales and all, for copy-on-write."""

    @abstractmethod
    def read(self, cache: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of blocks `ids` in the canonical layout [n, block_size, kv_heads, head_dim], for tests.

        In the cache's dtype; where that is int8, the numbers that codes and scales mean, in f32.
        """

    def rotate_and_write(
        self, qkv: Tensor, positions: Tensor, rotation: Rotation, cache: Any, batch: Batch
    ) -> Tensor:
        """Fused `Operations.rotate` and `write`: gives q [T, q_heads, head_dim], K and V go to the cache."""
        raise BackendError(f"{type(self).__name__} offers no fused write; use Operations.rotate and write.")


class Attention(ABC):
    """A named attention implementation."""

    name: str
    cache_layout: str | None = None
    """Names the layout of its cache, whose `blocks()` gives strided [num_blocks, block_size, kv_heads,
    head_dim] views of K and V; None = nobody else may run on it."""
    reads_layouts: tuple[str, ...] = ()
    """Layouts of others it can run on, through those views."""
    sides: tuple[Attention, ...] = ()
    """The attentions it divides its work among, whose sources make its results too."""

    @abstractmethod
    def refusals(self, spec: AttentionSpec, device: Device) -> list[str]:
        """Reasons this cannot serve `spec` on `device`; empty = it can."""

    @abstractmethod
    def open(self, spec: AttentionSpec, device: Device) -> AttentionRunner:
        """A runner for `spec`; raises BackendError with the reasons where `refusals` names any."""

    def served_by(self, device: Device, spec: AttentionSpec | None = None) -> str:
        """The name the record keeps; a backend over several libraries adds which one serves `spec`."""
        return self.name

    def tuning(self, spec: AttentionSpec, device: Device) -> dict[str, str | None] | None:
        """Shape -> why it runs on a written default (None = on a measured launch); None = nothing to tune."""
        return None
