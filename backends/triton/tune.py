"""What `bench tune` can tune of the Triton backend: dense and quantized products, and paged attention.

Both are timed on data that no cache holds: products on rotating weights, attention on rotating blocks of a
pool of random keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface import AttentionSpec, Batch, Config, Device, Problem, Scheme, Tuner
from backbench.backends.quantization import rounded_heads
from backbench.backends.triton import configs
from backbench.backends.triton.attention import TritonRunner
from backbench.backends.triton.cache import PagedCache
from backbench.backends.triton.configs import ATTENTION_BUCKETS, ROW_BUCKETS
from backbench.backends.triton.gemm_tune import GemmProblem
from backbench.backends.triton.quantized_configs import BUCKETS
from backbench.backends.triton.quantized_tune import QuantizedProblem
from backbench.backends.tuning.timing import graph_time_us

MAX_CALLS = 32
COLD_KEY_BYTES = 400 * 2**20
"""Bytes that the calls of one graph read together: several times any cache."""
TOLERANCE = 8e-3
"""Relative error in norm: bf16 weights and output round at 2e-3 each."""
CHECKED_QUERIES = 256
ROUNDED_HEADS = 2**20
"""Heads that are rounded at once."""
Shape = tuple[int, int]
"""(sequences, length)"""


class Pool:
    """Random keys and values of `num_keys` tokens, viewed at any block size, and queries."""

    def __init__(self, spec: AttentionSpec, num_keys: int, num_queries: int, device: torch.device) -> None:
        self.spec = spec
        self.num_keys = num_keys
        self._scales: list[Tensor] = []
        self.keys = self._random_heads(device)
        self.values = self._random_heads(device)
        self.queries = _random(num_queries, spec.q_heads * spec.head_dim, spec.dtype, device)

    def _random_heads(self, device: torch.device) -> Tensor:
        """As the cache keeps them; where it is int8, their scales are kept beside them."""
        spec = self.spec
        heads = _random(self.num_keys * spec.kv_heads, spec.head_dim, spec.dtype, device)
        if not spec.scaled:
            return heads.to(spec.kv_dtype).view(self.num_keys, -1)
        codes, scale = zip(*(rounded_heads(some) for some in heads.split(ROUNDED_HEADS)), strict=True)
        self._scales.append(torch.cat(scale))
        return torch.cat(codes).view(self.num_keys, -1)

    def cache(self, block_size: int) -> Any:
        """The pool as one layer's cache."""
        shape = (-1, self.spec.kv_heads, block_size, self.spec.head_dim)
        scales = (scale.view(shape[:3]) for scale in self._scales)
        return PagedCache(self.keys.view(shape), self.values.view(shape), *scales)


def equal(shape: Shape) -> list[int]:
    """Every sequence's length."""
    sequences, length = shape
    return [length] * sequences


def _random(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(rows, width, dtype=dtype, device=device)


def batches(pool: Pool, lengths: Sequence[int], query: int, block_size: int, calls: int) -> Iterator[Batch]:
    """`calls` batches of sequences whose blocks are taken in turn from one permutation of the pool."""
    sequences, longest = len(lengths), max(lengths)
    width = -(-longest // block_size)
    device = pool.keys.device
    order = torch.randperm(pool.num_keys // block_size, device=device).to(torch.int32)
    for call in range(calls):
        at = torch.arange(sequences * width, device=device) + call * sequences * width
        yield Batch(
            query_start=torch.arange(0, sequences * query + 1, query, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            block_table=order[at % order.numel()].view(sequences, width),
            slots=torch.full((sequences * query,), -1, device=device),
            num_seqs=sequences,
            num_tokens=sequences * query,
            num_decodes=sequences if query == 1 else 0,
            max_query=query,
            max_len=longest,
        )


def measure(
    pool: Pool, runner: Any, lengths: Sequence[int], query: int, check: bool = True, replays: int = 15
) -> tuple[float, float]:
    """(microseconds, spread) of one call; checks its result first.

    Raises:
        ArithmeticError: the result is further from fp32 than `TOLERANCE`.
    """
    spec: AttentionSpec = runner.spec
    bytes_read = sum(lengths) * spec.kv_bytes_per_token
    calls = min(MAX_CALLS, max(2, COLD_KEY_BYTES // bytes_read))
    cache = pool.cache(spec.block_size)
    q = pool.queries[: len(lengths) * query].view(-1, spec.q_heads, spec.head_dim)
    out = torch.full_like(q, torch.nan)
    made = list(batches(pool, lengths, query, spec.block_size, calls))
    if check:
        error = relative_error(runner, q, cache, made[0], out)
        if not error < TOLERANCE:
            shape = f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)} keys"
            raise ArithmeticError(f"{shape}, {query} queries: relative error {error:.2e}")
    return graph_time_us([partial(runner.run, q, cache, batch, out) for batch in made], replays)


def relative_error(runner: Any, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> float:
    """Run `batch`, and give the norm of the error over that of the answer in fp32.

    Looks at the last queries of the first and of the last sequence.
    """
    runner.run(q, cache, batch, out)
    query = batch.max_query
    count = min(query, CHECKED_QUERIES)
    wrong = wanted = 0.0
    for row in {0, batch.num_seqs - 1}:
        some = slice((row + 1) * query - count, (row + 1) * query)
        expected = expected_output(runner, q[some], cache, batch, row)
        wrong += float((out[some].float() - expected).square().sum())
        wanted += float(expected.square().sum())
    return (wrong / wanted) ** 0.5


def expected_output(runner: Any, q: Tensor, cache: Any, batch: Batch, row: int) -> Tensor:
    """Attention of q [n, q_heads, head_dim], the last n queries of sequence `row`, in fp32."""
    spec: AttentionSpec = runner.spec
    length, count = int(batch.seq_lens[row]), q.shape[0]
    k, v = (x.flatten(0, 1)[:length].float() for x in runner.read(cache, batch.block_table[row].long()))
    grouped = q.float().view(count, spec.kv_heads, -1, spec.head_dim)
    scores = torch.einsum("nhgd,mhd->hgnm", grouped, k) * spec.scale
    position = torch.arange(length - count, length, device=q.device)
    scores.masked_fill_(torch.arange(length, device=q.device) > position[:, None], -torch.inf)
    weighted = torch.einsum("hgnm,mhd->nhgd", scores.softmax(-1), v)
    return weighted.reshape(count, spec.q_heads, spec.head_dim)


@dataclass
class AttentionProblem(Problem):
    """One kind of batch ("decode_small", "decode" or "prefill") of one layer."""

    spec: AttentionSpec
    kind: str
    device: Device
    shapes: Sequence[Shape]
    """(sequences, length) of the batches timed."""

    tolerance = TOLERANCE

    def __post_init__(self) -> None:
        self.operation, self.bucket, self.dtype = configs.entry_key(self.spec, self.kind)
        self.sources = configs.sources(self.operation)

    @classmethod
    def of(cls, spec: AttentionSpec, kind: str, device: Device) -> AttentionProblem:
        """With representative shapes. A window or a soft cap has no part in a bucket and is left out."""
        longest = 16384
        spec = replace(spec, window=None, softcap=None, max_seqs=256, max_tokens=2 * longest, max_len=longest)
        small = configs.small_batch(device, spec)
        large = max(64, small + 1)
        shapes: dict[str, Sequence[Shape]] = {
            "decode_small": ((1, 1024), (1, longest), (small, 4096)),
            "decode": ((large, 1024), (large, 4096), (256, 1024)),
            "prefill": ((1, 4096), (8, 2048), (1, longest)),
        }
        return cls(spec, kind, device, shapes[kind])

    @cached_property
    def pool(self) -> Pool:
        """Room for the largest batch, and for more than any cache holds."""
        torch.manual_seed(0)
        largest = max(sequences * length for sequences, length in self.shapes)
        on_gpu = self.device.torch_device.type == "cuda"
        num_keys = max(largest, COLD_KEY_BYTES // self.spec.kv_bytes_per_token if on_gpu else 0)
        num_keys += -num_keys % self.spec.block_size
        queries = max(sequences * self._queries(length) for sequences, length in self.shapes)
        return Pool(self.spec, num_keys, queries, self.device.torch_device)

    def _queries(self, length: int) -> int:
        return length if self.kind == "prefill" else 1

    def runner(self, config: Config) -> TritonRunner:
        """A runner whose launches of this kind are `config`'s."""
        if self.kind == "prefill":
            return TritonRunner(self.spec, self.device, prefill=dict(config))
        return TritonRunner(self.spec, self.device, decode=dict(config))

    def baseline(self) -> Config:
        config = configs.written_attention(self.device, self.spec, self.kind)
        # What shared memory allows, without what entries leave to the rule.
        within = configs.attention_config(self.device, self.spec, self.kind, written=True)
        return {name: within[name] for name in config if name not in configs.RULED}

    def candidates(self) -> Sequence[Config]:
        if self.kind == "prefill":
            return list(configs.prefill_launches(self.device, self.spec))
        return list(configs.decode_launches())

    def error(self, config: Config) -> float:
        """The largest over the shapes."""
        runner, cache, errors = self.runner(config), self.pool.cache(self.spec.block_size), []
        for shape in self.shapes:
            query = self._queries(shape[1])
            q = self.pool.queries[: shape[0] * query].view(-1, self.spec.q_heads, self.spec.head_dim)
            (batch,) = batches(self.pool, equal(shape), query, self.spec.block_size, 1)
            errors.append(relative_error(runner, q, cache, batch, torch.full_like(q, torch.nan)))
        return max(errors, key=lambda error: float("inf") if error != error else error)

    def times_us(self, config: Config | None) -> Sequence[float]:
        runner = self.runner(config or {})
        return [
            measure(self.pool, runner, equal(shape), self._queries(shape[1]), check=False, replays=5)[0]
            for shape in self.shapes
        ]

    def compile(self, config: Config) -> None:
        spec, length = self.spec, 2 * self.spec.block_size
        query = 1 if self.kind != "prefill" else min(40, length)
        rows = 2 if self.kind != "decode" else configs.small_batch(self.device, spec) + 1
        pool = Pool(spec, rows * length, rows * query, self.device.torch_device)
        q = pool.queries.view(-1, spec.q_heads, spec.head_dim)
        (batch,) = batches(pool, [length] * rows, query, spec.block_size, 1)
        self.runner(config).run(q, pool.cache(spec.block_size), batch, torch.empty_like(q))
        torch.cuda.synchronize()


class TritonTuner(Tuner):
    """Products of few rows, quantized ones of any, and paged attention; kernels are imported at first use."""

    def file(self, device: Device) -> Path:
        return configs.table_file(device.arch, device.units)

    def products(
        self,
        weights: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: Device,
        schemes: Sequence[Scheme] = (Scheme(),),
    ) -> Iterator[Problem]:
        for scheme, (n, k) in itertools.product(schemes, dict.fromkeys(weights)):
            if scheme.dense:
                yield from (GemmProblem(rows, n, k, dtype, device) for rows in ROW_BUCKETS)
            else:
                yield from (QuantizedProblem(rows, n, k, scheme, dtype, device) for rows in BUCKETS)

    def attention(self, specs: Sequence[AttentionSpec], device: Device) -> Iterator[Problem]:
        layers = {configs.entry_key(spec, kind): (spec, kind) for spec in specs for kind in ATTENTION_BUCKETS}
        for spec, kind in layers.values():
            yield AttentionProblem.of(spec, kind, device)
