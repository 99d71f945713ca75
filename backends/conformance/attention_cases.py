"""The attention cases: which geometries, batch shapes and features are checked at each level."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from backbench.backends.conformance.scenario import Row
from backbench.backends.interface import AttentionSpec

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
GROUPS = (1, 4, 7, 8, 16)
BLOCK_SIZES = (16, 32, 64, 128)

SHAPES: dict[str, tuple[Row, ...]] = {
    "decode": tuple(Row(1, n) for n in (1, 16, 17, 5, 130, 64)),
    "long": (Row(1, 777),),
    "prefill": (Row(7, 7), Row(40, 40), Row(1, 1), Row(16, 16)),
    "prefix": (Row(5, 44), Row(16, 48), Row(33, 100)),
    "mixed": (Row(1, 33), Row(1, 64), Row(1, 9), Row(9, 9), Row(20, 52), Row(3, 70)),
    "drafts": (Row(5, 44), Row(3, 130), Row(5, 5), Row(1, 20), Row(4, 66)),
}
"""Decodes, one long decode, fresh prompts, prompts behind a cached prefix, all of it at once, and sequences
that verify drafts."""

LONG_SHAPES: dict[str, tuple[Row, ...]] = {
    "long decode 5000": (Row(1, 5000), Row(1, 3)),
    "long prefix 4500": (Row(20, 4500),),
}
"""Several thousand keys: what a kernel loses beyond some length, no shorter case shows."""

INTERPRETED_SHAPES: dict[str, tuple[Row, ...]] = {
    "long decode 1300": (Row(1, 1300),),
    "long prefix 1300": (Row(5, 1300),),
}
"""In their place in Triton's interpreter, which takes milliseconds to store one key."""

FULL_SHAPES: dict[str, tuple[Row, ...]] = {
    "long prefill 1500": (Row(1100, 1500),),
    "wide decode": tuple(Row(1, 3 + 11 * n) for n in range(40)),
    "uniform 3": tuple(Row(3, n) for n in (3, 19, 130, 64)),
}


@dataclass(frozen=True)
class AttentionCase:
    """One attention check."""

    name: str
    kind: str
    """"values", "padding", "fork", "invariance", "graph" or "fused write"."""
    spec: AttentionSpec
    rows: tuple[Row, ...]
    pad_seqs: int = 0
    pad_tokens: int = 0
    drafted: bool = False
    """Of the batch (`Batch.drafted`)."""


def make_case(
    shape: str,
    dtype: torch.dtype,
    *,
    kind: str = "values",
    head_dim: int = 64,
    group: int = 4,
    block_size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    kv_dtype: torch.dtype | None = None,
    pad: int = 0,
) -> AttentionCase:
    """The case of a shape's rows at one geometry; `group` is query heads per KV head."""
    rows = (SHAPES | LONG_SHAPES | INTERPRETED_SHAPES | FULL_SHAPES)[shape]
    kv_heads = 1 if group >= 16 else 2
    longest = max(row.length for row in rows)
    spec = AttentionSpec(
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        kv_dtype=kv_dtype or dtype,
        block_size=block_size,
        scale=head_dim**-0.5,
        window=window,
        softcap=softcap,
        max_seqs=len(rows) + pad,
        max_tokens=max(1024, sum(row.query for row in rows) + pad),
        max_len=2 * longest,
    )
    parts = [kind] if kind != "values" else []
    parts += [shape, f"d{head_dim}", f"gqa{group}", f"block{block_size}"]
    parts += [f"window{window}"] if window else []
    parts += [f"softcap{softcap:g}"] if softcap else []
    parts += [f"kv {kv_dtype}".replace("torch.", "")] if kv_dtype and kv_dtype != dtype else []
    return AttentionCase(" ".join(parts), kind, spec, rows, pad, pad, drafted=shape == "drafts")


def quick_cases(dtype: torch.dtype, *, interpret: bool = False) -> Iterator[AttentionCase]:
    """Every value of every axis at least once, in few and small cases."""
    yield make_case("decode", dtype, head_dim=32, group=1)
    yield make_case("mixed", dtype, head_dim=64, group=4, block_size=32)
    yield make_case("prefill", dtype, head_dim=80, group=7)
    yield make_case("prefix", dtype, head_dim=96, group=8, block_size=64)
    yield make_case("mixed", dtype, head_dim=128, group=4)
    yield make_case("decode", dtype, head_dim=128, group=16, block_size=128)
    yield make_case("prefix", dtype, head_dim=256, group=4)
    yield make_case("long", dtype, head_dim=64, group=4)
    for shape, rows in (INTERPRETED_SHAPES if interpret else LONG_SHAPES).items():
        for window in (None, rows[0].length // 2):
            yield make_case(shape, dtype, head_dim=32, group=1, block_size=64, window=window)
    yield make_case("decode", dtype, window=16)
    yield make_case("mixed", dtype, window=24)
    yield make_case("prefix", dtype, window=24)
    yield make_case("mixed", dtype, softcap=20.0)
    yield make_case("decode", dtype, softcap=20.0, window=40)
    yield make_case("drafts", dtype, head_dim=128)
    yield make_case("drafts", dtype, head_dim=80, group=7, window=16)
    if dtype != torch.float32:
        for shape in ("decode", "mixed", "drafts"):
            yield make_case(shape, dtype, head_dim=128, kv_dtype=torch.float8_e4m3fn)
    yield from _int8_cache(dtype, ("decode", "mixed", "drafts"))
    yield from _behaviours(dtype)


def full_cases(dtype: torch.dtype) -> Iterator[AttentionCase]:
    """Head sizes times GQA ratios, block sizes times shapes, features times shapes, long and wide batches."""
    for head_dim in HEAD_DIMS:
        for group in GROUPS:
            yield make_case("decode", dtype, head_dim=head_dim, group=group)
            yield make_case("mixed", dtype, head_dim=head_dim, group=group)
    for block_size in BLOCK_SIZES:
        for shape in SHAPES:
            yield make_case(shape, dtype, head_dim=128, group=4, block_size=block_size)
    for window, softcap in ((1, None), (16, None), (24, None), (None, 20.0), (40, 20.0)):
        for shape in SHAPES:
            yield make_case(shape, dtype, window=window, softcap=softcap)
    for shape in (*LONG_SHAPES, *FULL_SHAPES):
        yield make_case(shape, dtype, head_dim=128, group=4)
        yield make_case(shape, dtype, head_dim=128, group=4, window=1200)
    if dtype != torch.float32:
        for shape in SHAPES:
            yield make_case(shape, dtype, head_dim=128, kv_dtype=torch.float8_e4m3fn)
    yield from _int8_cache(dtype, SHAPES)
    yield from _behaviours(dtype)


def _int8_cache(dtype: torch.dtype, shapes: Iterable[str]) -> Iterator[AttentionCase]:
    """Scales beside codes: of every shape, behind a window and a soft cap, padded, copied, written with the
    rotation; and blocks of a whole tile, which prefill may read as boxes."""
    for shape in shapes:
        yield make_case(shape, dtype, head_dim=128, kv_dtype=torch.int8)
    yield make_case("prefix", dtype, head_dim=128, block_size=64, kv_dtype=torch.int8)
    yield make_case("mixed", dtype, head_dim=80, group=7, window=24, softcap=20.0, kv_dtype=torch.int8)
    yield make_case("mixed", dtype, kind="padding", pad=3, kv_dtype=torch.int8)
    yield make_case("decode", dtype, kind="fork", kv_dtype=torch.int8)
    yield make_case("mixed", dtype, kind="fused write", head_dim=128, kv_dtype=torch.int8)


def _behaviours(dtype: torch.dtype) -> Iterator[AttentionCase]:
    """Padding, forks, batch invariance, graphs and the fused write, at the commonest geometry."""
    for shape in ("decode", "mixed", "drafts"):
        yield make_case(shape, dtype, kind="padding", pad=3, head_dim=128)
    yield make_case("decode", dtype, kind="fork", head_dim=128)
    yield make_case("decode", dtype, kind="invariance", head_dim=128)
    yield make_case("mixed", dtype, kind="invariance", head_dim=128)
    for shape in ("decode", "mixed", "drafts"):
        yield make_case(shape, dtype, kind="graph", pad=2, head_dim=128)
    yield make_case("mixed", dtype, kind="fused write", head_dim=128)
