"""The torch attention against dense attention in float64, on permuted blocks with poisoned unused slots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backbench.backends.conformance import Status
from backbench.backends.conformance.attention_cases import make_case
from backbench.backends.conformance.attention_check import AttentionChecker
from backbench.backends.interface import AttentionSpec, Batch
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import kept_heads
from backbench.backends.torch import BACKEND
from backbench.backends.torch import attention as attention_module
from backbench.errors import BackendError

SEQUENCES = [(1, 1), (1, 17), (1, 33), (5, 5), (7, 40), (16, 16), (0, 0)]
"""(query tokens, keys) of each row: decodes first, a whole prompt, chunks on a context, an inert row."""


def open_runner(spec: AttentionSpec):
    return BACKEND.attention.open(spec, cpu())


def make_spec(q_heads=4, kv_heads=2, head_dim=32, dtype=torch.float32, block_size=16, **changes):
    return AttentionSpec(q_heads, kv_heads, head_dim, dtype, dtype, block_size, head_dim**-0.5, **changes)


def fill(spec: AttentionSpec, sequences, padding: int = 3):
    """A runner's cache with random keys and values, the batch, and the dense keys and values per row."""
    generator = torch.Generator().manual_seed(0)
    blocks = [-(-length // spec.block_size) for _, length in sequences]
    runner = open_runner(spec)
    cache = runner.new_cache(sum(blocks) + 2)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    order = torch.randperm(sum(blocks) + 2, generator=generator)
    table = torch.full((len(sequences), max(blocks) + 1), 0, dtype=torch.int32)
    dense, slots, keys, values, used = [], [], [], [], 0
    for row, (_, length) in enumerate(sequences):
        table[row, : blocks[row]] = order[used : used + blocks[row]]
        used += blocks[row]
        k, v = torch.randn(2, length, spec.kv_heads, spec.head_dim, generator=generator).to(spec.dtype)
        position = torch.arange(length)
        slots.append(table[row, position // spec.block_size] * spec.block_size + position % spec.block_size)
        keys.append(k)
        values.append(v)
        dense.append((k, v))
    pad = torch.full((padding, spec.kv_heads, spec.head_dim), torch.nan, dtype=spec.dtype)
    queries = torch.tensor([count for count, _ in sequences])
    starts = torch.zeros(len(sequences) + 1, dtype=torch.int32)
    starts[1:] = queries.cumsum(0)
    batch = Batch(
        query_start=starts,
        seq_lens=torch.tensor([length for _, length in sequences], dtype=torch.int32),
        block_table=table,
        slots=torch.cat([*slots, torch.full((padding,), -1)]).long(),
        num_seqs=len(sequences),
        num_tokens=int(starts[-1]),
        num_decodes=3,
        max_query=int(queries.max()),
        max_len=max(length for _, length in sequences),
    )
    runner.write(cache, torch.cat([*keys, pad]), torch.cat([*values, pad]), batch)
    q = torch.randn(batch.num_tokens, spec.q_heads, spec.head_dim, generator=generator).to(spec.dtype)
    return runner, cache, batch, q, dense


def dense_attention(spec: AttentionSpec, q, k, v):
    """q [n, q_heads, d] at the end of k, v [m, kv_heads, d], token by token in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    group = spec.q_heads // spec.kv_heads
    for i in range(q.shape[0]):
        position = k.shape[0] - q.shape[0] + i
        first = 0 if spec.window is None else max(0, position - spec.window + 1)
        for head in range(spec.q_heads):
            scores = k[first : position + 1, head // group] @ q[i, head] * spec.scale
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            out[i, head] = scores.softmax(0) @ v[first : position + 1, head // group]
    return out


def check(spec: AttentionSpec, sequences=SEQUENCES) -> None:
    runner, cache, batch, q, dense = fill(spec, sequences)
    out = torch.empty_like(q)
    runner.run(q, cache, batch, out)
    # Values are standard normal. fp32 sums of some 40 terms stay within 1e-5; in half precision the
    # weights and the result are each rounded once: 2^-8 (bf16) or 2^-11 (fp16) of values up to 4.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[spec.dtype]
    for row, (count, _) in enumerate(sequences):
        start = int(batch.query_start[row])
        expected = dense_attention(spec, q[start : start + count], *dense[row])
        torch.testing.assert_close(out[start : start + count].double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (4, 2), (7, 1)])
@pytest.mark.parametrize("head_dim", [32, 80])
def test_heads(q_heads, kv_heads, head_dim):
    check(make_spec(q_heads, kv_heads, head_dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(make_spec(dtype=dtype))


@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_block_sizes(block_size):
    check(make_spec(block_size=block_size))


# 2 and 3: the first key in sight is the last one of its block, for the rows of 17, 33 and 40 keys.
@pytest.mark.parametrize("window", [1, 2, 3, 6, 16, 100])
def test_window(window):
    check(make_spec(window=window))


def test_softcap():
    check(make_spec(softcap=1.5))


def test_long_queries_are_tiled(monkeypatch):
    monkeypatch.setattr(attention_module, "QUERY_TILE", 3)
    check(make_spec())
    check(make_spec(window=5))


def test_batch_invariance():
    """Bits of every row are the same alone and in company, as the runner declares."""
    spec = make_spec()
    runner, cache, batch, q, _ = fill(spec, SEQUENCES)
    assert runner.batch_invariant
    together = torch.empty_like(q)
    runner.run(q, cache, batch, together)
    for row in range(len(SEQUENCES)):
        start, end = batch.query_start[row : row + 2].tolist()
        alone = Batch(
            torch.tensor([0, end - start], dtype=torch.int32),
            batch.seq_lens[row : row + 1],
            batch.block_table[row : row + 1],
            batch.slots,
            1,
            end - start,
            0,
            end - start,
            batch.max_len,
        )
        out = torch.empty_like(q[start:end])
        runner.run(q[start:end], cache, alone, out)
        assert torch.equal(out, together[start:end])


def test_skipped_writes_touch_no_block():
    runner, cache, batch, _, _ = fill(make_spec(), SEQUENCES)
    everything = torch.arange(cache.blocks()[0].shape[0])
    before = runner.read(cache, everything)
    batch.slots = torch.full((4,), -1)
    junk = torch.ones(4, 2, 32)
    runner.write(cache, junk, junk, batch)
    for old, new in zip(before, runner.read(cache, everything), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)


def test_copy_blocks():
    runner, cache, _, _, _ = fill(make_spec(), [(1, 64)])
    src, dst = torch.tensor([0, 3]), torch.tensor([4, 5])
    runner.copy_blocks(cache, src, dst)
    for source, copy in zip(runner.read(cache, src), runner.read(cache, dst), strict=True):
        torch.testing.assert_close(source, copy, rtol=0, atol=0, equal_nan=True)


def test_a_copy_leaves_its_source_as_it_was():
    runner = open_runner(make_spec())
    cache = runner.new_cache(4)
    for place, blocks in enumerate(cache.blocks()):
        blocks.copy_(torch.arange(4.0).view(4, 1, 1, 1).expand_as(blocks) + 10 * place)
    runner.copy_blocks(cache, torch.tensor([0, 2]), torch.tensor([1, 3]))
    for place, blocks in enumerate(cache.blocks()):
        assert (blocks[:, 0, 0, 0] - 10 * place).tolist() == [0.0, 0.0, 2.0, 2.0]


def test_cache_bytes_per_block():
    assert open_runner(make_spec()).cache_bytes_per_block() == 2 * 16 * 2 * 32 * 4


def test_what_it_cannot_serve_is_named():
    spec = AttentionSpec(5, 2, 32, torch.float64, torch.int16, 16, 1.0)
    assert len(BACKEND.attention.refusals(spec, cpu())) == 3
    with pytest.raises(BackendError, match="5 query heads do not divide among 2"):
        open_runner(spec)


def test_an_fp8_cache_rounds_keys_and_values_and_saturates():
    spec = replace(make_spec(), kv_dtype=torch.float8_e4m3fn)
    runner = open_runner(spec)
    cache = runner.new_cache(1)
    assert runner.cache_bytes_per_block() == 2 * 16 * 2 * 32
    k, v = torch.randn(2, 3, 2, 32)
    k[0, 0, 0] = 1000.0
    batch = Batch(
        query_start=torch.tensor([0, 3], dtype=torch.int32),
        seq_lens=torch.tensor([3], dtype=torch.int32),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        slots=torch.arange(3),
        num_seqs=1,
        num_tokens=3,
        num_decodes=0,
        max_query=3,
        max_len=3,
    )
    runner.write(cache, k, v, batch)
    keys, values = (stored[0, :3].float() for stored in runner.read(cache, torch.tensor([0])))
    assert float(keys[0, 0, 0]) == 448.0
    torch.testing.assert_close(values, v, rtol=2**-4, atol=2**-10)
    assert torch.equal(values, v.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("shape", ["decode", "mixed", "prefix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp8_cache_passes_conformance(shape, dtype):
    operations = BACKEND.operations
    checker = AttentionChecker(BACKEND.attention, operations, BACKEND.attention, cpu())
    row = checker.check(make_case(shape, dtype, kv_dtype=torch.float8_e4m3fn))
    assert row.status is Status.PASS, row.detail


def test_an_int8_cache_keeps_codes_and_a_scale_for_each_token_and_head():
    spec = replace(make_spec(), kv_dtype=torch.int8)
    runner = open_runner(spec)
    cache = runner.new_cache(1)
    assert runner.cache_bytes_per_block() == 2 * 16 * 2 * (32 + 4)
    kept = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    assert sum(each[:-1].nbytes for each in kept) == runner.cache_bytes_per_block()
    k, v = torch.randn(2, 3, 2, 32) * torch.logspace(-3, 3, 6).view(3, 2, 1)
    batch = Batch(
        query_start=torch.tensor([0, 3], dtype=torch.int32),
        seq_lens=torch.tensor([3], dtype=torch.int32),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        slots=torch.tensor([2, -1, 0]),
        num_seqs=1,
        num_tokens=3,
        num_decodes=0,
        max_query=3,
        max_len=3,
    )
    runner.write(cache, k, v, batch)
    for x, stored in zip((k, v), runner.read(cache, torch.tensor([0])), strict=True):
        assert torch.equal(stored[0, [2, 0]], kept_heads(x[[0, 2]], torch.int8))
        assert bool((stored[0, [1, *range(3, 16)]] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["decode", "mixed", "prefix"])
def test_an_int8_cache_passes_conformance(shape, dtype):
    checker = AttentionChecker(BACKEND.attention, BACKEND.operations, BACKEND.attention, cpu())
    for features in ({}, {"window": 24, "softcap": 20.0, "group": 7}):
        row = checker.check(make_case(shape, dtype, kv_dtype=torch.int8, **features))
        assert row.status is Status.PASS, row.detail
