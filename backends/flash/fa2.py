"""FlashAttention 2 (`flash-attn`): CUDA, AMD's Composable Kernel build, and its Triton build for AMD."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from backbench.backends.dependency import Release
from backbench.backends.flash import gathered
from backbench.backends.flash.library import FlashRunner, Library, rest_starts
from backbench.backends.interface import AttentionRunner, AttentionSpec, Batch, Device, GraphSupport
from backbench.backends.torch.attention import TorchCache

RELEASE = Release("flash-attn", "2.8.3.post2")
MODULE = "flash_attn"
PREFILL = "flash_attn_varlen_func"
PREFILL_KEYWORDS = (*gathered.KEYWORDS, "block_table")
DECODE = "flash_attn_with_kvcache"
DECODE_KEYWORDS = (
    "q",
    "k_cache",
    "v_cache",
    "cache_seqlens",
    "block_table",
    "softmax_scale",
    "causal",
    "window_size",
    "softcap",
)
AMD_TRITON_SWITCH = "FLASH_ATTENTION_TRITON_AMD_ENABLE"
"""flash-attn's own environment variable: "TRUE" makes the package use its Triton kernels on AMD."""


class PagedFlashAttention2(Library):
    """A build that reads pages of a multiple of `page_keys` keys."""

    release = RELEASE
    page_keys: int

    def limits(self, spec: AttentionSpec, device: Device) -> list[str]:
        if spec.block_size % self.page_keys == 0:
            return []
        return [f"block size {spec.block_size} is no multiple of {self.page_keys}"]

    def open(self, spec: AttentionSpec, device: Device) -> AttentionRunner:
        prefill = self.release.function(MODULE, PREFILL, PREFILL_KEYWORDS)
        return Fa2Runner(spec, device, prefill, self.release.function(MODULE, DECODE, DECODE_KEYWORDS))


class FlashAttention2(PagedFlashAttention2):
    """The CUDA build."""

    key = "fa2"
    arches = ("sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm120")
    page_keys = 256


class FlashAttentionCk(PagedFlashAttention2):
    """AMD's Composable Kernel build. Checked against its released signatures, not run."""

    key = "ck"
    vendor = "amd"
    arches = ("gfx90a", "gfx942", "gfx950")
    page_keys = 128

    def absent(self, device: Device) -> list[str]:
        reasons = super().absent(device)
        if self.made_for(device) and amd_triton():
            reasons.append(f"{AMD_TRITON_SWITCH} asks flash-attn for its Triton build")
        return reasons

    def limits(self, spec: AttentionSpec, device: Device) -> list[str]:
        reasons = super().limits(spec, device)
        if spec.softcap is not None:
            reasons.append("this build has no softcap")
        return reasons


class FlashAttentionTritonAmd(Library):
    """flash-attn's Triton kernels for AMD, on gathered keys: they ignore block tables. Not run."""

    key = "triton-amd"
    release = RELEASE
    vendor = "amd"
    arches = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")

    def absent(self, device: Device) -> list[str]:
        switched = amd_triton() or not self.made_for(device)
        return super().absent(device) + ([] if switched else [f"needs {AMD_TRITON_SWITCH}=TRUE"])

    def limits(self, spec: AttentionSpec, device: Device) -> list[str]:
        reasons = ["this build has no sliding window"] if spec.window is not None else []
        reasons += ["this build has no softcap"] if spec.softcap is not None else []
        return reasons

    def open(self, spec: AttentionSpec, device: Device) -> AttentionRunner:
        forward = self.release.function(MODULE, PREFILL, gathered.KEYWORDS)
        return gathered.GatheredRunner(spec, device, forward)


def amd_triton() -> bool:
    """Whether flash-attn was told to use its Triton kernels on AMD."""
    return os.environ.get(AMD_TRITON_SWITCH, "").upper() == "TRUE"


class Fa2Runner(FlashRunner):
    """Decodes with split keys, other sequences by the variable-length kernel, both from the pages."""

    graph = GraphSupport.DECODE

    def __init__(
        self, spec: AttentionSpec, device: Device, prefill: Callable[..., Any], decode: Callable[..., Any]
    ) -> None:
        super().__init__(spec, device)
        self.prefill = prefill
        self.decode = decode
        self.window = (self.window_left, 0 if spec.window is not None else -1)

    def plan(self, batch: Batch) -> Hashable:
        bounds = (batch.max_query, batch.max_len) if batch.num_seqs > batch.num_decodes else (1, 0)
        return (batch.num_seqs, batch.num_tokens, batch.num_decodes, *bounds)

    def run(self, q: Tensor, cache: TorchCache, batch: Batch, out: Tensor) -> None:
        spec, decodes, rows = self.spec, batch.num_decodes, batch.num_seqs
        keys, values = cache.blocks()
        common = {
            "softmax_scale": spec.scale,
            "causal": True,
            "window_size": self.window,
            "softcap": spec.softcap or 0.0,
        }
        if decodes:
            result = self.decode(
                q=q[:decodes, None],
                k_cache=keys,
                v_cache=values,
                cache_seqlens=batch.seq_lens[:decodes],
                block_table=batch.block_table[:decodes],
                **common,
            )
            out[:decodes] = result[:, 0]
        if rows > decodes:
            lengths = batch.seq_lens[decodes:rows]
            out[decodes : batch.num_tokens] = self.prefill(
                q=q[decodes : batch.num_tokens],
                k=keys,
                v=values,
                cu_seqlens_q=rest_starts(batch),
                cu_seqlens_k=pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
                max_seqlen_q=batch.max_query,
                max_seqlen_k=batch.max_len,
                block_table=batch.block_table[decodes:rows],
                **common,
            )
