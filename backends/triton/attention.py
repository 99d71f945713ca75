"""Paged attention by Triton kernels: a split-KV decode kernel and a tiled prefill kernel."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backbench.backends.interface import (
    Attention,
    AttentionRunner,
    AttentionSpec,
    Batch,
    Device,
    GraphSupport,
    Rotation,
)
from backbench.backends.interface.device import kernels_refused
from backbench.backends.quantization import head_numbers
from backbench.backends.triton import configs
from backbench.backends.triton.cache import PagedCache, new_cache
from backbench.errors import BackendError

if TYPE_CHECKING:
    from backbench.backends.triton.launch import BoundKernel, Launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_GROUP = 32
FEW_QUERIES, MOST_MEMBERS = 8, 64
"""Query tokens of a sequence that the decode kernel computes at once, as far as they and a KV head's query
heads are so many rows: the matrix units' largest tile of one warp group."""
LOG2_E = math.log2(math.e)


class TritonAttention(Attention):
    """One portable source for NVIDIA and AMD GPUs; kernels are imported when a runner opens."""

    name = "triton"
    cache_layout = "head runs"

    def refusals(self, spec: AttentionSpec, device: Device) -> list[str]:
        reasons = kernels_refused(device)
        if spec.dtype not in DTYPES:
            reasons.append(f"dtype {spec.dtype} is none of float32, bfloat16, float16")
        if spec.kv_dtype not in (spec.dtype, torch.float8_e4m3fn, torch.int8):
            reasons.append(f"KV dtype {spec.kv_dtype} is none of {spec.dtype}, float8_e4m3fn, int8")
        if spec.kv_dtype == torch.float8_e4m3fn and device.arch in ("sm80", "sm86", "sm87", "gfx90a"):
            reasons.append(f"{device.arch} cannot convert a float8_e4m3fn KV cache; use int8 or {spec.dtype}")
        if spec.q_heads % spec.kv_heads:
            reasons.append(f"{spec.q_heads} query heads do not divide among {spec.kv_heads} KV heads")
        elif spec.q_heads // spec.kv_heads > MAX_GROUP:
            reasons.append(f"{spec.q_heads // spec.kv_heads} query heads a KV head; at most {MAX_GROUP}")
        if not 16 <= spec.head_dim <= MAX_HEAD_DIM or spec.head_dim % 8:
            reasons.append(f"head_dim {spec.head_dim} is no multiple of 8 from 16 to {MAX_HEAD_DIM}")
        return reasons or _too_large(spec, device)

    def open(self, spec: AttentionSpec, device: Device) -> TritonRunner:
        if reasons := self.refusals(spec, device):
            raise BackendError(f"triton attention cannot serve this: {'; '.join(reasons)}.")
        return TritonRunner(spec, device)

    def tuning(self, spec: AttentionSpec, device: Device) -> dict[str, str | None] | None:
        return configs.attention_tuning(spec, device)


class TritonRunner(AttentionRunner):
    """Attention for one spec. Its workspace is reused by every launch: one stream at a time."""

    graph = GraphSupport.MIXED
    batch_invariant = False
    fused_write = True

    def __init__(
        self,
        spec: AttentionSpec,
        device: Device,
        decode: dict[str, Any] | None = None,
        prefill: dict[str, Any] | None = None,
    ) -> None:
        """Args `decode` (both buckets) and `prefill` replace entries of the written configurations."""
        self.spec = spec
        self.device = device
        self.group = spec.q_heads // spec.kv_heads
        self.paired = spec.kv_dtype.itemsize == 1 and device.vendor != "amd"
        """Decodes read a cache of bytes two at a time; AMD GPUs convert them faster than shifts do."""
        self.small_batch = configs.small_batch(device, spec)
        self.decode = [
            configs.attention_config(device, spec, bucket) | (decode or {})
            for bucket in ("decode_small", "decode")
        ]
        self.prefill = configs.attention_config(device, spec, "prefill") | (prefill or {})
        self.members = min(MOST_MEMBERS, max(16, _power_of_two(FEW_QUERIES * self.group)))
        """Rows of the decode kernel's tile where sequences verify drafts."""
        self.few_queries = self.members // self.group
        self.drafts = [configs.drafts(device, spec, config, self.members) for config in self.decode]
        units = 1 if device.interpret else device.units
        self.programs = [config["programs_per_unit"] * units for config in self.decode]
        for config in (*self.decode, *self.drafts):
            del config["programs_per_unit"]  # the grid's, not the kernel's
        pieces, place = 2 * max(self.programs), device.torch_device
        self._piece_sums = torch.empty((pieces, self.members, spec.head_dim), device=place)
        self._piece_stats = torch.empty((pieces, 2, self.members), device=place)
        self._counters = torch.zeros(spec.max_seqs * spec.kv_heads, dtype=torch.int32, device=place)
        self._kernels: dict[tuple[str, bool, bool], BoundKernel] = {}

    def new_cache(self, num_blocks: int) -> PagedCache:
        spec = self.spec
        return new_cache(
            num_blocks,
            spec.kv_heads,
            spec.block_size,
            spec.head_dim,
            spec.kv_dtype,
            self.device.torch_device,
        )

    def cache_bytes_per_block(self) -> int:
        return self.spec.block_size * self.spec.kv_bytes_per_token

    def plan(self, batch: Batch) -> Hashable:
        """Rows of each kind, and the prefill grid: the decode grid depends on the rows' bucket alone."""
        tiles = "few" if self._drafted(batch) else self._query_tiles(batch)
        return (batch.num_seqs, batch.num_decodes, tiles)

    def write(self, cache: PagedCache, k: Tensor, v: Tensor, batch: Batch) -> None:
        from backbench.backends.triton.fused_write import kv_write

        kv_write(cache, k, v, batch.slots)

    def rotate_and_write(
        self, qkv: Tensor, positions: Tensor, rotation: Rotation, cache: PagedCache, batch: Batch
    ) -> Tensor:
        from backbench.backends.triton.fused_write import rotate_and_write

        return rotate_and_write(qkv, positions, rotation, cache, batch.slots, self.spec)

    def run(self, q: Tensor, cache: PagedCache, batch: Batch, out: Tensor) -> None:
        if not out.is_contiguous():
            raise BackendError("triton attention writes a contiguous output; pass one.")
        q = q.contiguous()
        drafted = self._drafted(batch)
        if batch.num_decodes or drafted:
            self.decode_launch(q, cache, batch, out).start()
        if batch.num_seqs > batch.num_decodes and not drafted:
            self.prefill_launch(q, cache, batch, out).start()

    def _drafted(self, batch: Batch) -> bool:
        """Whether all of the batch verifies drafts, few enough a sequence for the decode kernel."""
        return batch.drafted and batch.num_decodes == 0 and batch.max_query <= self.few_queries

    def decode_launch(self, q: Tensor, cache: PagedCache, batch: Batch, out: Tensor) -> Launch:
        """Attention of the decodes, or of all rows where they verify drafts; q and out contiguous."""
        drafted = self._drafted(batch)
        seqs = batch.num_seqs if drafted else batch.num_decodes
        small = seqs <= self.small_batch
        bound = self._bound("decode_small" if small else "decode", cache, drafted)
        arguments = (
            q, *cache.arguments(), batch.block_table, batch.seq_lens, out,
            self._piece_sums, self._piece_stats, self._counters,
            seqs, batch.block_table.stride(0), cache.block_stride, *self._scale_and_cap(), batch.query_start,
        )  # fmt: skip
        return bound.launch((self.programs[0 if small else 1], 1, 1), arguments)

    def prefill_launch(self, q: Tensor, cache: PagedCache, batch: Batch, out: Tensor) -> Launch:
        """Attention of all other sequences; q and out contiguous."""
        keys, values, *scales = cache.arguments()
        if self.prefill["DESCRIPTOR"]:
            keys, values = self._descriptor(cache.k), self._descriptor(cache.v)
        arguments = (
            q, keys, values, *scales, batch.block_table, batch.query_start, batch.seq_lens, out,
            batch.num_decodes, batch.num_seqs, batch.block_table.stride(0), cache.block_stride,
            *self._scale_and_cap(),
        )  # fmt: skip
        grid = (self.spec.kv_heads, self._query_tiles(batch), 1)
        return self._bound("prefill", cache).launch(grid, arguments)

    def _bound(self, bucket: str, cache: PagedCache, drafted: bool = False) -> BoundKernel:
        """The bucket's kernel with its compile-time arguments, made at first use."""
        wide = cache.k.numel() >= 2**31
        key = (bucket, wide, drafted)
        if key not in self._kernels:
            self._kernels[key] = self._bind(bucket, wide, drafted)
        return self._kernels[key]

    def _bind(self, bucket: str, wide: bool, drafted: bool) -> BoundKernel:
        from backbench.backends.triton.decode_kernel import decode_kernel
        from backbench.backends.triton.launch import Place
        from backbench.backends.triton.prefill_kernel import prefill_kernel

        spec, place = self.spec, Place.of(self.device)
        rows = min(spec.max_seqs, self.small_batch) if bucket == "decode_small" else spec.max_seqs
        if bucket == "prefill":
            # A vector of fewer rows than threads keeps copies in registers, and the kernel spills.
            rows = max(rows, 128)
        shared = {
            "KV_HEADS": spec.kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": spec.head_dim,
            "PADDED_DIM": configs.padded_dim(spec),
            "BLOCK_SIZE": spec.block_size,
            "ROWS": _power_of_two(rows),
            "WINDOW": spec.window or 0,
            "CAPPED": spec.softcap is not None,
            "WIDE": wide,
            "WIDEN": place.interpreted,
            "PTX": place.speaks_ptx,
            "SCALED": spec.scaled,
        }
        if bucket == "prefill":
            return place.bind(prefill_kernel, **shared, **self.prefill)
        group_pad = _power_of_two(self.group)
        tile = {"GROUP_PAD": group_pad, "M": self.members if drafted else max(16, group_pad)}
        config = (self.drafts if drafted else self.decode)[0 if bucket == "decode_small" else 1]
        return place.bind(decode_kernel, **shared, **config, **tile, PAIRED=self.paired, DRAFTED=drafted)

    def _query_tiles(self, batch: Batch) -> int:
        """At most this many query tiles: every prefill row may end in a tile that is not full."""
        tokens = self.prefill["M"] // self.group
        rows = batch.num_seqs - batch.num_decodes
        return (batch.num_tokens - batch.num_decodes + rows * (tokens - 1)) // tokens

    def _descriptor(self, cache: Tensor) -> Any:
        """Boxes [TILE, padded head_dim] of the flat cache; a box never crosses a block."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        flat = cache.view(-1, self.spec.head_dim)
        box = [self.prefill["TILE"], configs.padded_dim(self.spec)]
        return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), box)

    def _scale_and_cap(self) -> tuple[float, float]:
        """What `softmax.scaled_scores` multiplies by."""
        if self.spec.softcap is None:
            return self.spec.scale * LOG2_E, 0.0
        return self.spec.scale / self.spec.softcap, self.spec.softcap * LOG2_E

    def copy_blocks(self, cache: PagedCache, src: Tensor, dst: Tensor) -> None:
        for part in cache.tensors():
            raw = part.view(torch.uint8)  # a copy of bits, for every dtype
            raw[dst] = raw[src]

    def read(self, cache: PagedCache, ids: Tensor) -> tuple[Tensor, Tensor]:
        k, v, *scales = (part.view(torch.uint8)[ids].view(part.dtype) for part in cache.tensors())
        if scales:
            k, v = head_numbers(k, scales[0]), head_numbers(v, scales[1])
        return k.transpose(1, 2), v.transpose(1, 2)


def _too_large(spec: AttentionSpec, device: Device) -> list[str]:
    """Which kernels take more shared memory than a block has there, as far as both are known."""
    if device.vendor == "cpu" or not device.shared_bytes:
        return []
    needed = {
        bucket: configs.shared_bytes_needed(device, spec, bucket) for bucket in configs.ATTENTION_BUCKETS
    }
    return [
        f"{bucket} needs {size / 1024:.0f} KiB of shared memory a block, "
        f"{device.arch} has {device.shared_bytes / 1024:.0f}"
        for bucket, size in needed.items()
        if size > device.shared_bytes
    ]


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()
