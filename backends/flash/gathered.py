"""Runners for libraries without paging: every sequence's keys are gathered into one packed tensor first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from backbench.backends.flash.library import FlashRunner
from backbench.backends.interface import AttentionSpec, Batch, Device
from backbench.backends.torch.attention import TorchCache

KEYWORDS = (
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "softmax_scale",
    "causal",
    "window_size",
    "softcap",
)


class GatheredRunner(FlashRunner):
    """One call a batch. Gathering copies every key: cheap beside a prompt's work, slow for decodes."""

    def __init__(self, spec: AttentionSpec, device: Device, forward: Callable[..., Any]) -> None:
        super().__init__(spec, device)
        self.forward = forward

    def run(self, q: Tensor, cache: TorchCache, batch: Batch, out: Tensor) -> None:
        spec, rows = self.spec, batch.num_seqs
        lengths = batch.seq_lens[:rows]
        ends = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        total = int(ends[-1])  # the packed size is needed on the host: the call cannot be captured
        owner = torch.repeat_interleave(
            torch.arange(rows, device=q.device), lengths.long(), output_size=total
        )
        position = torch.arange(total, device=q.device) - ends[:-1].long()[owner]
        blocks = batch.block_table[:rows].long()[owner, position // spec.block_size]
        keys, values = (side[blocks, position % spec.block_size] for side in cache.blocks())
        starts = batch.query_start[: rows + 1]
        live = int(starts[-1])
        window = (self.window_left, 0 if spec.window is not None else -1)
        result = self.forward(
            q=q[:live],
            k=keys,
            v=values,
            cu_seqlens_q=starts,
            cu_seqlens_k=ends,
            max_seqlen_q=batch.max_query,
            max_seqlen_k=batch.max_len,
            softmax_scale=spec.scale,
            causal=True,
            window_size=window,
            softcap=spec.softcap or 0.0,
        )
        out[:live] = result[0] if isinstance(result, tuple) else result
