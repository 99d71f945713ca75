"""The launches compiled without a GPU: the backend's own, for tensors that take no memory.

Every target compiles a common layer (8B models at the engine's defaults) and four others, dealt out so that
each target meets every block size, head size and number of query heads a KV head, and every two of them meet
on some target. The target most runs happen on also compiles what a whole run launches, at every number of
rows that chooses another kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from backbench.backends.aot.compile import SHARED_LIMIT_BYTES, TARGETS
from backbench.backends.interface import (
    AttentionSpec,
    Batch,
    Device,
    KernelCase,
    Rotary,
    Rotation,
    SamplingBatch,
)
from backbench.backends.triton import configs
from backbench.backends.triton.attention import TritonAttention, TritonRunner
from backbench.backends.triton.cache import new_cache
from backbench.backends.triton.configs import GemmConfig
from backbench.backends.triton.elementwise import embed_launch, gate_launch, norm_launch, rotate_launch
from backbench.backends.triton.fused_write import kv_write_launch, rotate_and_write_launch
from backbench.backends.triton.gemm import product_launch
from backbench.backends.triton.launch import Launch, Place, parts
from backbench.backends.triton.oneshot import BITS, KINDS, Areas, one_shot_launch
from backbench.backends.triton.sampling import sample_launches

UNITS = 132
"""Compute units of the imagined device: tile choices, and what was measured for them, depend on it."""
WHOLE_RUN = "sm90"
"""The target whose cases hold every launch of a run."""
HALF = tuple(target for target in TARGETS if target in ("sm80", "sm90", "sm100", "gfx942", "gfx1100"))
"""Where fp16 operations are compiled too: one target of each kind of instructions."""
HIDDEN, FEED_FORWARD, VOCABULARY = 4096, 12288, 151_936
WEIGHTS = (
    (6144, HIDDEN),
    (HIDDEN, HIDDEN),
    (2 * FEED_FORWARD, HIDDEN),
    (HIDDEN, FEED_FORWARD),
    (VOCABULARY, HIDDEN),
)
"""[n, k] of such a model's products."""
FEW, SOME, MANY = 1, 16, 1024
"""Rows of a step that choose launches of their own: one decode, some, a prompt."""
META = torch.device("meta")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CACHES = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}


@dataclass(frozen=True)
class Layer:
    """An attention layer as far as it chooses another binary."""

    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    block_size: int = 64
    head_dim: int = 128
    group: int = 4
    """Query heads a KV head, of which there are 8."""
    wide: bool = False
    """The cache's offsets exceed 32 bits."""

    @property
    def name(self) -> str:
        cache = "" if self.kv_dtype == self.dtype else f" {CACHES[self.kv_dtype]}-cache"
        wide = " wide" if self.wide else ""
        shape = f"block{self.block_size} head{self.head_dim} group{self.group}"
        return f"{NAMES[self.dtype]}{cache} {shape}{wide}"

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            8 * self.group, 8, self.head_dim, self.dtype, self.kv_dtype, self.block_size, self.head_dim**-0.5
        )


COMMON = Layer()


def other_layers(target: str) -> Iterator[Layer]:
    """Four layers of other dtypes; see the module's first lines."""
    turn = TARGETS.index(target)
    dtypes = (
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.bfloat16, torch.int8),
    )
    for place, (dtype, kv_dtype) in enumerate(dtypes):
        block_size = (16, 128, 64)[(place + turn // 3) % 3]
        head_dim = (64, 256, 96)[(place + turn) % 3]
        group = (1, 8, 4)[(place + 2 * turn + turn // 3) % 3]
        yield Layer(dtype, kv_dtype, block_size, head_dim, group, wide=kv_dtype != dtype)


def imagined(target: str) -> Device:
    """A device of the target's kind, whose tensors take no memory."""
    vendor = "nvidia" if target.startswith("sm") else "amd"
    return Device(vendor, target, target, UNITS, 2**36, SHARED_LIMIT_BYTES[target], META)


def cases() -> list[KernelCase]:
    """Every case of the backend."""
    found = [*_attention_cases(COMMON, ())]
    found += _attention_cases(replace(COMMON, kv_dtype=torch.int8), (WHOLE_RUN,))
    for target in TARGETS:
        for layer in other_layers(target):
            found += _attention_cases(layer, (target,))
    for kernel, build in OPERATIONS.items():
        found.append(_operation_case(kernel, build, torch.bfloat16, MANY, ()))
        found.append(_operation_case(kernel, build, torch.float16, MANY, HALF))
        for rows in RUN_ROWS.get(kernel, ()):
            found.append(_operation_case(kernel, build, torch.bfloat16, rows, (WHOLE_RUN,)))
    for dtype in (torch.bfloat16, torch.float16):
        targets = () if dtype == torch.bfloat16 else HALF
        for rows in (FEW, SOME):
            kernel = "linear/vector" if rows == FEW else "linear/skinny"
            launch = partial(written_product, dtype, rows)
            found.append(KernelCase(kernel, NAMES[dtype], rows != FEW, launch, targets=targets))
    return [*found, *_measured_products(), *_between_devices()]


def _attention_cases(layer: Layer, targets: tuple[str, ...]) -> Iterator[KernelCase]:
    for bucket in ("write", *configs.ATTENTION_BUCKETS, "drafts"):
        if bucket == "decode_small" and targets and not _small_differs(layer, *targets):
            continue
        # fp32 products are exact: on most targets they are plain multiply-adds by nature.
        matrix = bucket != "write" and layer.dtype != torch.float32
        launch, refuses = partial(attention, bucket, layer), partial(refusals, layer)
        yield KernelCase(f"attention/{bucket}", layer.name, matrix, launch, refuses, targets)


def _small_differs(layer: Layer, target: str) -> bool:
    """Whether few sequences are launched in another way there than many."""
    small, large = (
        configs.attention_config(imagined(target), layer.spec, bucket)
        for bucket in ("decode_small", "decode")
    )
    return small != large


def refusals(layer: Layer, target: str) -> list[str]:
    """What the backend would say to this layer on that target."""
    return TritonAttention().refusals(layer.spec, imagined(target))


def attention(bucket: str, layer: Layer, target: str) -> Launch:
    """The attention kernel of a bucket, the decode kernel over drafts, or the cache write."""
    spec, device = layer.spec, imagined(target)
    runner = TritonRunner(spec, device)
    values_per_block = spec.kv_heads * spec.block_size * spec.head_dim
    cache = runner.new_cache(parts(2**31, values_per_block) if layer.wide else 64)
    decodes = {"decode_small": 1, "decode": spec.max_seqs}.get(bucket, 0)
    tokens = decodes or MANY
    q = on_meta(tokens, spec.q_heads, spec.head_dim, dtype=spec.dtype)
    if bucket == "write":
        k = on_meta(tokens, spec.kv_heads, spec.head_dim, dtype=spec.dtype)
        return kv_write_launch(Place.of(device), cache, k, k, on_meta(tokens, dtype=torch.int64))
    batch = Batch(
        query_start=on_meta(decodes + 2, dtype=torch.int32),
        seq_lens=on_meta(decodes + 1, dtype=torch.int32),
        block_table=on_meta(decodes + 1, 64, dtype=torch.int32),
        slots=on_meta(tokens, dtype=torch.int64),
        num_seqs=decodes or 1,
        num_tokens=tokens,
        num_decodes=decodes,
        max_query=1 if decodes else tokens,
        max_len=spec.max_len,
    )
    if bucket == "drafts":
        batch = replace(batch, num_seqs=spec.max_seqs, max_query=runner.few_queries, drafted=True)
    start = runner.decode_launch if decodes or batch.drafted else runner.prefill_launch
    return start(q, cache, batch, torch.empty_like(q))


Operation = Callable[[Place, torch.dtype, int], Launch]
"""A kernel's launch at a number of rows."""


def _operation_case(
    kernel: str, build: Operation, dtype: torch.dtype, rows: int, targets: tuple[str, ...]
) -> KernelCase:
    def launch(target: str) -> Launch:
        return build(Place.of(imagined(target)), dtype, rows)

    variant = NAMES[dtype] if rows == MANY else f"{NAMES[dtype]} rows{rows}"
    return KernelCase(f"operations/{kernel}", variant, False, launch, targets=targets)


def _norm(add: bool, place: Place, dtype: torch.dtype, rows: int) -> Launch:
    x = on_meta(rows, HIDDEN, dtype=dtype)
    return norm_launch(place, x, on_meta(HIDDEN, dtype=dtype), 1e-6, x, x if add else None)


def _gate(place: Place, dtype: torch.dtype, rows: int) -> Launch:
    gate_up = on_meta(rows, 2 * FEED_FORWARD, dtype=dtype)
    return gate_launch(place, gate_up, on_meta(rows, FEED_FORWARD, dtype=dtype))


def _embed(place: Place, dtype: torch.dtype, rows: int) -> Launch:
    table = on_meta(VOCABULARY, HIDDEN, dtype=dtype)
    return embed_launch(place, on_meta(rows, dtype=torch.int64), table, on_meta(rows, HIDDEN, dtype=dtype))


def _rotation(
    write: bool, place: Place, dtype: torch.dtype, rows: int, *, kv_dtype: torch.dtype | None = None
) -> Launch:
    spec = Layer(dtype, kv_dtype or dtype).spec
    norm = on_meta(spec.head_dim, dtype=dtype)
    rotation = Rotation(Rotary(on_meta(4096, spec.head_dim, dtype=torch.float32), spec.head_dim), norm, norm)
    qkv = on_meta(rows, (spec.q_heads + 2 * spec.kv_heads) * spec.head_dim, dtype=dtype)
    q = on_meta(rows, spec.q_heads, spec.head_dim, dtype=dtype)
    positions = on_meta(rows, dtype=torch.int64)
    if write:
        cache = new_cache(64, spec.kv_heads, spec.block_size, spec.head_dim, spec.kv_dtype, META)
        return rotate_and_write_launch(place, qkv, positions, rotation, cache, positions, spec, q)
    k = on_meta(rows, spec.kv_heads, spec.head_dim, dtype=dtype)
    return rotate_launch(place, qkv, positions, rotation, spec, q, k)


def _sampling(
    greedy: bool, filtered: bool, which: int, place: Place, dtype: torch.dtype, rows: int
) -> Launch:
    rows = min(rows, 256)
    floats = on_meta(rows, dtype=torch.float32)
    key, top_k = on_meta(rows, dtype=torch.int64), on_meta(rows, dtype=torch.int32)
    sampling = SamplingBatch(floats, top_k, floats, floats, key, greedy, filtered)
    return sample_launches(place, on_meta(rows, VOCABULARY, dtype=dtype), sampling, key)[which]


OPERATIONS: dict[str, Operation] = {
    "norm": partial(_norm, False),
    "add and norm": partial(_norm, True),
    "gate": _gate,
    "embed": _embed,
    "rotate": partial(_rotation, False),
    "rotate and write": partial(_rotation, True),
    "rotate and write int8": partial(_rotation, True, kv_dtype=torch.int8),
    "greedy sample": partial(_sampling, True, False, 0),
    "random sample": partial(_sampling, False, False, 0),
    "filtered sample": partial(_sampling, False, True, 3),
    "best of row": partial(_sampling, True, False, -1),
    "group maxima": partial(_sampling, False, True, 0),
    "candidate threshold": partial(_sampling, False, True, 1),
    "row threshold": partial(_sampling, False, True, 2),
}
RUN_ROWS = {
    "norm": (FEW,),
    "add and norm": (FEW,),
    "gate": (FEW,),
    "rotate": (FEW, SOME),
    "rotate and write": (FEW, SOME),
    "rotate and write int8": (FEW, SOME),
    "best of row": (FEW, 24, 32, 64, 128),
}
"""Rows, fewer than MANY, at which a kernel is launched in yet another way."""


def written_product(dtype: torch.dtype, rows: int, target: str) -> Launch:
    """A product launched by the written rule."""
    n, k = WEIGHTS[0]
    config = configs.written_product(target, rows, n, k)
    assert config is not None
    return _product(config, dtype, rows, n, k, Place.of(imagined(target)), bias=True)


def _between_devices() -> Iterator[KernelCase]:
    """Sums and gathers over two devices: a decode's, and what takes several tiles; over four."""
    for world, rows in ((2, 8), (2, 48), (2, 256), (4, 8)):
        for kind in (*KINDS.values(), BITS):
            launch = partial(_one_shot, world, rows, kind)
            yield KernelCase("collectives/one shot", f"{kind} rows{rows} of {world}", False, launch)


def _one_shot(world: int, rows: int, kind: str, target: str) -> Launch:
    dtype = next((each for each, name in KINDS.items() if name == kind), torch.bfloat16)
    x = on_meta(rows, HIDDEN, dtype=dtype)
    out = on_meta(world, rows, HIDDEN, dtype=dtype) if kind == BITS else x
    areas = Areas(world, 32, 2**17, 2**21)
    state = (
        on_meta(world, dtype=torch.int64),
        on_meta(32, dtype=torch.int32),
        on_meta(1, dtype=torch.int32),
    )
    return one_shot_launch(Place.of(imagined(target)), (0, world), x, out, kind, state, areas)


def _measured_products() -> Iterator[KernelCase]:
    """The products of a run, each launch once."""
    seen: set[GemmConfig] = set()
    for n, k in WEIGHTS:
        for rows in configs.KERNEL_BUCKETS:
            config = configs.choose(WHOLE_RUN, UNITS, rows, n, k, torch.bfloat16)
            if isinstance(config, GemmConfig) and config not in seen:
                seen.add(config)
                launch = partial(_measured, config, rows, n, k)
                name = "linear/vector" if config.block_m == 0 else "linear/skinny"
                name = "linear/split" if config.split > 1 else name
                variant = f"bf16 rows{rows} n{n} k{k}"
                yield KernelCase(name, variant, config.block_m > 0, launch, targets=(WHOLE_RUN,))


def _measured(config: GemmConfig, rows: int, n: int, k: int, target: str) -> Launch:
    return _product(config, torch.bfloat16, rows, n, k, Place.of(imagined(target)))


def _product(
    config: GemmConfig, dtype: torch.dtype, rows: int, n: int, k: int, place: Place, bias: bool = False
) -> Launch:
    x, weight = on_meta(rows, k, dtype=dtype), on_meta(n, k, dtype=dtype)
    added = on_meta(n, dtype=dtype) if bias else None
    return product_launch(place, x, weight, added, on_meta(rows, n, dtype=dtype), config)


def on_meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor that takes no memory."""
    return torch.empty(shape, dtype=dtype, device=META)
