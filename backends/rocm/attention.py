"""AITER's assembly decode and flash prefill over a preshuffled cache, or Triton where they do not serve."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from backbench.backends.interface import (
    Attention,
    AttentionRunner,
    AttentionSpec,
    Batch,
    Device,
    GraphSupport,
)
from backbench.backends.rocm import aiter
from backbench.backends.rocm.cache import PreshuffledCache, new_cache
from backbench.backends.triton.attention import TritonAttention
from backbench.errors import BackendError

DECODE_KEYWORDS = ("Q", "K", "V", "block_tables", "context_lens", "block_tables_stride0", "max_qlen", "out_")
PREFILL_KEYWORDS = (
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "softmax_scale",
    "causal",
    "out",
)
NOT_RUN = "compiled, not run"
"""Said wherever an AMD library is named, until a record from such a machine exists."""


class AiterAttention(Attention):
    """AITER's kernels: one geometry family, but the fastest on it by AMD's own account."""

    name = "rocm:aiter"

    def served_by(self, device: Device, spec: AttentionSpec | None = None) -> str:
        return f"{self.name} ({aiter.AITER.label()}; {NOT_RUN})"

    def refusals(self, spec: AttentionSpec, device: Device) -> list[str]:
        reasons = aiter.absent(device)
        if spec.dtype not in (torch.bfloat16, torch.float16):
            reasons.append(f"dtype {spec.dtype} is not bfloat16 or float16")
        if spec.kv_dtype != spec.dtype:
            reasons.append(f"the KV cache must have the model's dtype {spec.dtype}, not {spec.kv_dtype}")
        if spec.head_dim != 128 or spec.block_size != 16:
            reasons.append(
                f"decodes take head_dim 128 in blocks of 16, not {spec.head_dim} in {spec.block_size}"
            )
        if abs(spec.scale - spec.head_dim**-0.5) > 1e-9:
            reasons.append("the decode kernel scales by 1 / sqrt(head_dim) only")
        if spec.window is not None or spec.softcap is not None:
            reasons.append("no sliding window and no softcap")
        if spec.q_heads % spec.kv_heads or spec.q_heads // spec.kv_heads > 16:
            reasons.append(f"{spec.q_heads} query heads over {spec.kv_heads} KV heads: whole ratios up to 16")
        return reasons

    def open(self, spec: AttentionSpec, device: Device) -> AttentionRunner:
        if reasons := self.refusals(spec, device):
            raise BackendError(f"{self.name} attention cannot serve this: {'; '.join(reasons)}.")
        decode = aiter.AITER.function("aiter", "pa_fwd_asm", DECODE_KEYWORDS)
        prefill = aiter.AITER.function("aiter", "flash_attn_varlen_func", PREFILL_KEYWORDS)
        return AiterRunner(spec, device, decode, prefill)


class RocmAttention(Attention):
    """AITER where it serves, Triton with AMD tiles everywhere else on AMD."""

    name = "rocm"
    candidates: tuple[Attention, ...] = (AiterAttention(), TritonAttention())

    def served_by(self, device: Device, spec: AttentionSpec | None = None) -> str:
        fallen = self.candidates[0].refusals(spec, device) if spec else aiter.absent(device)
        return f"rocm ({self.candidates[bool(fallen)].served_by(device, spec)})"

    def tuning(self, spec: AttentionSpec, device: Device) -> dict[str, str | None] | None:
        return self.candidates[bool(self.candidates[0].refusals(spec, device))].tuning(spec, device)

    def refusals(self, spec: AttentionSpec, device: Device) -> list[str]:
        if device.vendor != "amd":
            return [f"needs an AMD GPU, this is {device.name}; triton serves NVIDIA, torch anything"]
        reasons = []
        for candidate in self.candidates:
            found = candidate.refusals(spec, device)
            if not found:
                return []
            reasons.append(f"{candidate.name}: {', '.join(found)}")
        return reasons

    def open(self, spec: AttentionSpec, device: Device) -> AttentionRunner:
        if reasons := self.refusals(spec, device):
            raise BackendError(f"rocm attention cannot serve this: {'; '.join(reasons)}.")
        serving = next(each for each in self.candidates if not each.refusals(spec, device))
        return serving.open(spec, device)


class AiterRunner(AttentionRunner):
    """Decodes read the preshuffled pages; other sequences' keys are gathered and put in order first."""

    graph = GraphSupport.DECODE
    # The decode kernel loads whole blocks; a masked weight of 0 times a NaN would still be NaN.
    finite_cache = True

    def __init__(
        self, spec: AttentionSpec, device: Device, decode: Callable[..., Any], prefill: Callable[..., Any]
    ) -> None:
        self.spec = spec
        self.device = device
        self.decode = decode
        self.prefill = prefill

    def new_cache(self, num_blocks: int) -> PreshuffledCache:
        s = self.spec
        at = self.device.torch_device
        return new_cache(num_blocks, s.kv_heads, s.block_size, s.head_dim, s.kv_dtype, at)

    def cache_bytes_per_block(self) -> int:
        s = self.spec
        return 2 * s.block_size * s.kv_heads * s.head_dim * s.kv_dtype.itemsize

    def plan(self, batch: Batch) -> Hashable:
        return (batch.num_seqs, batch.num_tokens, batch.num_decodes)

    def write(self, cache: PreshuffledCache, k: Tensor, v: Tensor, batch: Batch) -> None:
        cache.write(k, v, batch.slots[: k.shape[0]])

    def run(self, q: Tensor, cache: PreshuffledCache, batch: Batch, out: Tensor) -> None:
        decodes = batch.num_decodes
        keys, values = cache.live()
        if decodes:
            self.decode(
                Q=q[:decodes],
                K=keys,
                V=values,
                block_tables=batch.block_table[:decodes],
                context_lens=batch.seq_lens[:decodes],
                block_tables_stride0=batch.block_table.stride(0),
                max_qlen=1,
                out_=out[:decodes],
            )
        if batch.num_seqs > decodes:
            self._prefill(q, cache, batch, out)

    def _prefill(self, q: Tensor, cache: PreshuffledCache, batch: Batch, out: Tensor) -> None:
        spec, rows = self.spec, slice(batch.num_decodes, batch.num_seqs)
        lengths = batch.seq_lens[rows]
        ends = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        total = int(ends[-1])
        owner = torch.repeat_interleave(
            torch.arange(len(lengths), device=q.device), lengths.long(), output_size=total
        )
        position = torch.arange(total, device=q.device) - ends[:-1].long()[owner]
        blocks = batch.block_table[rows].long()[owner, position // spec.block_size]
        offset, x = position % spec.block_size, cache.keys.shape[4]
        keys = cache.keys[blocks, :, :, offset].flatten(2)
        values = cache.values[blocks, :, offset // x, :, offset % x]
        live = slice(batch.num_decodes, int(batch.query_start[batch.num_seqs]))
        self.prefill(
            q=q[live],
            k=keys,
            v=values,
            cu_seqlens_q=batch.query_start[batch.num_decodes : batch.num_seqs + 1] - batch.num_decodes,
            cu_seqlens_k=ends,
            max_seqlen_q=batch.max_query,
            max_seqlen_k=batch.max_len,
            softmax_scale=spec.scale,
            causal=True,
            out=out[live],
        )

    def copy_blocks(self, cache: PreshuffledCache, src: Tensor, dst: Tensor) -> None:
        for side in (cache.keys, cache.values):
            side[dst] = side[src]

    def read(self, cache: PreshuffledCache, ids: Tensor) -> tuple[Tensor, Tensor]:
        return cache.read(ids)
