"""FlashAttention 4 (`flash-attn-4`, CuTe DSL, compiled at run time): paged attention for sm90 and newer.

It cannot split the keys of one sequence on sm90, so small-batch decodes are slow there; take another
backend for them (`--attention prefill=flash,decode=triton`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from backbench.backends.dependency import Release
from backbench.backends.flash.library import FlashRunner, Library, rest_starts
from backbench.backends.interface import AttentionRunner, AttentionSpec, Batch, Device, GraphSupport
from backbench.backends.torch.attention import TorchCache

MODULE = "flash_attn.cute.interface"
FUNCTION = "_flash_attn_fwd"
"""What the public functions call; unlike them it writes into a given output and records no gradient."""
KEYWORDS = (
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "seqused_k",
    "max_seqlen_q",
    "page_table",
    "softmax_scale",
    "causal",
    "softcap",
    "window_size_left",
    "window_size_right",
    "num_splits",
    "out",
)
TILE_KEYS = 128
"""Keys of one tile: pages of that size are loaded whole, past a sequence's end too."""


class FlashAttention4(Library):
    """Newest, and the only one here that reads small pages."""

    key = "fa4"
    release = Release("flash-attn-4", "4.0.0b36")
    arches = ("sm90", "sm100", "sm103", "sm110")

    def limits(self, spec: AttentionSpec, device: Device) -> list[str]:
        if device.arch != "sm90" and 128 < spec.head_dim < 256:
            return [f"head_dim {spec.head_dim} on {device.arch}: up to 128, or 256"]
        return []

    def open(self, spec: AttentionSpec, device: Device) -> AttentionRunner:
        return Fa4Runner(spec, device, self.release.function(MODULE, FUNCTION, KEYWORDS))


class Fa4Runner(FlashRunner):
    """Decodes and other sequences in a launch each, straight from the pages."""

    graph = GraphSupport.DECODE

    def __init__(self, spec: AttentionSpec, device: Device, forward: Callable[..., Any]) -> None:
        super().__init__(spec, device)
        self.forward = forward
        # A masked weight of 0 times a NaN is still NaN where a page is loaded past a sequence's end.
        self.finite_cache = spec.block_size % TILE_KEYS == 0

    def plan(self, batch: Batch) -> Hashable:
        queries = batch.max_query if batch.num_seqs > batch.num_decodes else 1
        return (batch.num_seqs, batch.num_tokens, batch.num_decodes, queries)

    def run(self, q: Tensor, cache: TorchCache, batch: Batch, out: Tensor) -> None:
        decodes, rows = batch.num_decodes, batch.num_seqs
        if decodes:
            # One query token each: a plain batch [decodes, 1, heads, head_dim] needs no offsets.
            self._call(q[:decodes, None], cache, batch, slice(0, decodes), None, 1, out[:decodes, None])
        if rows > decodes:
            starts = rest_starts(batch)
            live = slice(decodes, batch.num_tokens)
            self._call(q[live], cache, batch, slice(decodes, rows), starts, batch.max_query, out[live])

    def _call(
        self,
        q: Tensor,
        cache: TorchCache,
        batch: Batch,
        rows: slice,
        starts: Tensor | None,
        max_query: int,
        out: Tensor,
    ) -> None:
        spec = self.spec
        keys, values = cache.blocks()
        self.forward(
            q=q,
            k=keys,
            v=values,
            cu_seqlens_q=starts,
            seqused_k=batch.seq_lens[rows],
            max_seqlen_q=max_query,
            page_table=batch.block_table[rows],
            softmax_scale=spec.scale,
            causal=True,
            softcap=spec.softcap,
            window_size_left=None if spec.window is None else self.window_left,
            window_size_right=None if spec.window is None else 0,
            num_splits=1,
            out=out,
        )
