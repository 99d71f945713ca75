"""The backend interface: what an attention, linear or elementwise implementation must offer.

The plain torch backend (`backends.torch`) is the specification; every other backend is checked
against it. Tensors named below live on one device; shapes use S = sequences in the batch,
T = tokens in the batch, B = blocks per sequence, H = hidden size, V = vocabulary size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from backends.sweep import Tuner


class BackendError(Exception):
    """A backend cannot do what was asked. The message is one line: what is wrong and what would work."""


@dataclass(frozen=True)
class Device:
    """The hardware a backend runs on, as far as a kernel choice depends on it."""

    vendor: str
    """"nvidia", "amd" or "cpu"."""
    arch: str
    """"sm90", "gfx942", "x86_64", ..."""
    name: str
    """Product name as the driver reports it."""
    units: int
    """Streaming multiprocessors, compute units, or CPU cores."""
    memory_bytes: int
    shared_bytes: int
    """Largest shared memory (LDS) one block may use; 0 on a CPU."""
    torch_device: torch.device
    interpret: bool = False
    """True when Triton kernels run in its interpreter (correctness only)."""


class GraphSupport(IntEnum):
    """Which batches may be captured in a CUDA or HIP graph; each level includes those before it."""

    NEVER = 0
    DECODE = 1
    """Batches in which every sequence has one query token."""
    UNIFORM = 2
    """Batches in which every sequence has the same number of query tokens."""
    MIXED = 3


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer's geometry and the limits its batches stay under."""

    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_size: int
    scale: float
    window: int | None = None
    """A query at position p sees keys in (p - window, p]; None = all."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap) before the softmax."""
    max_seqs: int = 256
    max_tokens: int = 8192
    max_len: int = 4096


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
        """Copy whole blocks src[i] -> dst[i] (i64 device tensors), for copy-on-write."""

    @abstractmethod
    def read(self, cache: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of blocks `ids` in the canonical layout [n, block_size, kv_heads, head_dim], for tests."""

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
    def supports(self, spec: AttentionSpec, device: Device) -> list[str]:
        """Reasons this cannot serve `spec` on `device`; empty = it can."""

    @abstractmethod
    def open(self, spec: AttentionSpec, device: Device) -> AttentionRunner:
        """A runner for `spec`; raises BackendError with the reasons where `supports` names any."""

    def served_by(self, device: Device, spec: AttentionSpec | None = None) -> str:
        """The name the record keeps; a backend over several libraries adds which one serves `spec`."""
        return self.name

    def tuning(self, spec: AttentionSpec, device: Device) -> dict[str, str | None] | None:
        """Shape -> why it runs on a written default (None = on a measured launch); None = nothing to tune."""
        return None


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored. The default is a dense weight in the model's dtype."""

    weight: str = "dense"
    group: int | None = None
    zero_point: bool = False
    activation: str | None = None
    sparse_2_4: bool = False


@dataclass
class Weight:
    """A linear weight in the canonical layout every checkpoint format becomes before packing."""

    scheme: Scheme
    q: Tensor
    """[N, K]: output features by input features."""
    scale: Tensor | None = None
    zero: Tensor | None = None

    def shard(self, dim: int, rank: int, world: int) -> Weight:
        """The `rank`-th of `world` equal parts along `dim` (0 = output features, 1 = input features)."""
        size = self.q.shape[dim]
        if size % world:
            raise BackendError(f"A weight of {size} features cannot be split into {world} equal parts.")
        if self.scheme.weight != "dense":
            raise BackendError(f"Sharding {self.scheme.weight} weights is not implemented.")
        return Weight(self.scheme, self.q.chunk(world, dim)[rank].contiguous())


class Linear(ABC):
    """A named matrix-multiplication implementation."""

    name: str

    @abstractmethod
    def supports(self, scheme: Scheme, n: int, k: int, dtype: torch.dtype, device: Device) -> list[str]:
        """Reasons this cannot serve an [n, k] weight of `scheme`; empty = it can."""

    @abstractmethod
    def pack(self, weight: Weight, device: Device) -> Any:
        """The weight in this backend's own layout (opaque)."""

    @abstractmethod
    def run(self, x: Tensor, packed: Any, bias: Tensor | None = None) -> Tensor:
        """x [M, K] times the weight's transpose, plus bias [N]: [M, N] in x's dtype."""

    def tuning(self, n: int, k: int, dtype: torch.dtype, device: Device) -> dict[str, str | None] | None:
        """Shape -> why an [n, k] weight runs on a written default there, as `Attention.tuning`."""
        return None


@dataclass
class SamplingBatch:
    """Per-row sampling parameters on the device, and the host flags that decide which kernels run."""

    temperature: Tensor
    """f32[S]; 0 = greedy."""
    top_k: Tensor
    """i32[S]; 0 = off."""
    top_p: Tensor
    """f32[S]; 1 = off."""
    min_p: Tensor
    """f32[S]; 0 = off."""
    noise_key: Tensor
    """i64[S]: the 32-bit key of this row's draw, from `backends.noise.noise_key(seed, draw index)`."""
    all_greedy: bool = True
    any_filter: bool = False
    """True when any row uses top-k, top-p or min-p."""


class Operations(ABC):
    """A named set of elementwise operations. The torch set is the reference for each."""

    name: str

    @abstractmethod
    def supports(self, dtype: torch.dtype, device: Device) -> list[str]:
        """Reasons this set cannot run; empty = it can."""

    def tuning(self, dtype: torch.dtype, device: Device) -> dict[str, str | None] | None:
        """Shape -> why it runs on a written default, as `Attention.tuning`."""
        return None

    @abstractmethod
    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows `ids` i64[T] of `table` [V, H]: [T, H]."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, H] / sqrt(mean(x^2) + eps) * weight, in fp32, back in x's dtype (Zhang & Sennrich 2019)."""

    @abstractmethod
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); `residual` may be overwritten and returned."""

    @abstractmethod
    def rotate(
        self, qkv: Tensor, positions: Tensor, rotation: Rotation, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split qkv [T, (q + 2 kv) * d], norm each head of q and k where the layer does, rotate both.

        positions: i64[T]. Returns q [T, q_heads, d], k and v [T, kv_heads, d].
        """

    @abstractmethod
    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(gate_up[:, :F]) * gate_up[:, F:] of gate_up [T, 2F]: [T, F] (Shazeer 2020, SwiGLU)."""

    @abstractmethod
    def sample(self, logits: Tensor, sampling: SamplingBatch) -> Tensor:
        """One token id i64[S] per row of logits [S, V].

        Greedy rows take the first maximum. Others divide by the temperature, drop what
        top-k, then top-p, then min-p exclude (ties with the threshold stay), and take the argmax of
        logit + Gumbel noise of (noise_key, token), which is an exact draw from the softmax.
        """


@dataclass(frozen=True)
class Backend:
    """One backend as its module exports it: `BACKEND = Backend(...)`.

    An operation left None is served by the backend named `base`.
    """

    name: str
    summary: str
    attention: Attention | None = None
    linear: Linear | None = None
    operations: Operations | None = None
    base: str | None = "torch"
    variants: Mapping[str, Attention] = field(default_factory=dict)
    """Pin -> attention: `--backend NAME:PIN` takes that one and no other."""
    tuner: Tuner | None = None
    """What `bench tune` measures; None = its launches are not tuned."""


@dataclass(frozen=True)
class Selection:
    """What serves each operation in one engine, and how that came about."""

    asked: str
    device: Device
    attention: Attention
    linear: Linear
    operations: Operations
    passed_over: dict[str, Sequence[str]] = field(default_factory=dict)
    """Backends `auto` looked at and did not take, with the reasons."""
    spec: AttentionSpec | None = None
    """The model's first attention layer."""

    @property
    def used(self) -> dict[str, str]:
        """Operation -> name of the backend that serves it."""
        return {
            "attention": self.attention.served_by(self.device, self.spec),
            "linear": self.linear.name,
            "operations": self.operations.name,
        }
