"""One attention for prompts and another for decodes, over one cache.

One of the two runners owns the cache: it creates, writes, copies and reads it. The other one only runs
on it, so it has to understand the owner's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

from torch import Tensor

from backbench.backends.interface import (
    Attention,
    AttentionRunner,
    AttentionSpec,
    Backend,
    Batch,
    Device,
    GraphSupport,
    Rotation,
)
from backbench.errors import BackendError

ROLES = ("prefill", "decode")


def mixed_backend(text: str, load: Callable[[str], Backend]) -> Backend:
    """The backend that "prefill=NAME,decode=NAME" asks for.

    Raises:
        BackendError: a role is missing, unknown or named twice, or a backend offers no attention.
    """
    chosen: dict[str, Backend] = {}
    for part in text.split(","):
        role, _, name = (piece.strip() for piece in part.partition("="))
        if role not in ROLES or role in chosen or not name:
            raise BackendError(f"Attention roles are prefill=NAME,decode=NAME, each once, not {text!r}.")
        chosen[role] = load(name)
        if chosen[role].attention is None:
            raise BackendError(f"Backend {name!r} offers no attention; choose another for {role}.")
    if len(chosen) != len(ROLES):
        raise BackendError(f"Attention roles are prefill=NAME,decode=NAME, each once, not {text!r}.")
    prefill, decode = chosen["prefill"], chosen["decode"]
    assert prefill.attention and decode.attention
    mixed = CompositeAttention(prefill.attention, decode.attention)
    summary = f"Prompts by {prefill.name}, decodes by {decode.name}, over one cache."
    return Backend(mixed.name, summary, mixed, base=decode.name, kernels=decode.kernels or prefill.kernels)


class CompositeAttention(Attention):
    """Decodes go to one attention, every other sequence to another."""

    def __init__(self, prefill: Attention, decode: Attention) -> None:
        self.prefill = prefill
        self.decode = decode
        self.sides = (prefill, decode)
        self.name = f"prefill={prefill.name},decode={decode.name}"

    def served_by(self, device: Device, spec: AttentionSpec | None = None) -> str:
        prefill, decode = (side.served_by(device, spec) for side in self.sides)
        return f"prefill={prefill},decode={decode}"

    def tuning(self, spec: AttentionSpec, device: Device) -> dict[str, str | None] | None:
        found = [side.tuning(spec, device) for side in self.sides]
        known = [each for each in found if each is not None]
        return {shape: why for each in known for shape, why in each.items()} if known else None

    def refusals(self, spec: AttentionSpec, device: Device) -> list[str]:
        reasons = [
            f"{role} ({attention.name}): {why}"
            for role, attention in (("prefill", self.prefill), ("decode", self.decode))
            for why in attention.refusals(spec, device)
        ]
        if not reasons and self._owner_is_decode() is None:
            reasons.append(
                f"{self.prefill.name} ({self.prefill.cache_layout}) and {self.decode.name} "
                f"({self.decode.cache_layout}) keep their caches in layouts that neither shares"
            )
        return reasons

    def open(self, spec: AttentionSpec, device: Device) -> AttentionRunner:
        if reasons := self.refusals(spec, device):
            raise BackendError(f"{self.name} attention cannot serve this: {'; '.join(reasons)}.")
        prefill, decode = self.prefill.open(spec, device), self.decode.open(spec, device)
        return CompositeRunner(prefill, decode, owner=decode if self._owner_is_decode() else prefill)

    def _owner_is_decode(self) -> bool | None:
        """True when the decode side's cache suits both, False when the prefill side's; None = neither."""
        if can_read(self.prefill, self.decode):
            return True
        return False if can_read(self.decode, self.prefill) else None


def can_read(reader: Attention, owner: Attention) -> bool:
    """Whether `reader` can run on the cache that `owner` creates."""
    layout = owner.cache_layout
    return layout is not None and (layout == reader.cache_layout or layout in reader.reads_layouts)


class CompositeRunner(AttentionRunner):
    """Splits each batch at its last decode; the owner keeps the cache."""

    def __init__(self, prefill: AttentionRunner, decode: AttentionRunner, owner: AttentionRunner) -> None:
        self.prefill = prefill
        self.decode = decode
        self.owner = owner
        self.graph = min(decode.graph, max(prefill.graph, GraphSupport.DECODE))
        self.batch_invariant = prefill.batch_invariant and decode.batch_invariant
        self.fused_write = owner.fused_write
        self.few_queries = prefill.few_queries
        self.finite_cache = prefill.finite_cache or decode.finite_cache

    def new_cache(self, num_blocks: int) -> Any:
        cache = self.owner.new_cache(num_blocks)
        if self.finite_cache and not self.owner.finite_cache:
            for side in cache.blocks():
                side.zero_()
        return cache

    def cache_bytes_per_block(self) -> int:
        return self.owner.cache_bytes_per_block()

    def plan(self, batch: Batch) -> Hashable:
        decodes, rest = split_batch(batch)
        return (
            self.decode.plan(decodes) if decodes is not None else None,
            self.prefill.plan(rest) if rest is not None else None,
        )

    def write(self, cache: Any, k: Tensor, v: Tensor, batch: Batch) -> None:
        self.owner.write(cache, k, v, batch)

    def rotate_and_write(
        self, qkv: Tensor, positions: Tensor, rotation: Rotation, cache: Any, batch: Batch
    ) -> Tensor:
        return self.owner.rotate_and_write(qkv, positions, rotation, cache, batch)

    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        decodes, rest = split_batch(batch)
        if decodes is not None:
            self.decode.run(q[: decodes.num_tokens], cache, decodes, out[: decodes.num_tokens])
        if rest is not None:
            self.prefill.run(q[batch.num_decodes :], cache, rest, out[batch.num_decodes :])

    def copy_blocks(self, cache: Any, src: Tensor, dst: Tensor) -> None:
        self.owner.copy_blocks(cache, src, dst)

    def read(self, cache: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.owner.read(cache, ids)


def split_batch(batch: Batch) -> tuple[Batch | None, Batch | None]:
    """(the decodes, everything else); None where there is nothing.

    Where other rows follow, each decode owns one token, so theirs are the first `num_decodes`.
    """
    decodes = batch.num_decodes
    if decodes == 0:
        return None, batch
    if decodes == batch.num_seqs:
        return batch, None
    first = replace(
        batch,
        query_start=batch.query_start[: decodes + 1],
        seq_lens=batch.seq_lens[:decodes],
        block_table=batch.block_table[:decodes],
        slots=batch.slots[:decodes],
        num_seqs=decodes,
        num_tokens=decodes,
        max_query=1,
    )
    rest = replace(
        batch,
        query_start=batch.query_start[decodes : batch.num_seqs + 1] - decodes,
        seq_lens=batch.seq_lens[decodes:],
        block_table=batch.block_table[decodes:],
        slots=batch.slots[decodes:],
        num_seqs=batch.num_seqs - decodes,
        num_tokens=batch.num_tokens - decodes,
        num_decodes=0,
    )
    return first, rest
