"""The launches measured for this backend's kernels, from the files in `tuning/`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from backbench.backends.interface import AttentionSpec
from backbench.backends.tuning import table as tuning
from backbench.backends.tuning.table import Entry, Table

FOLDER = Path(__file__).parent / "tuning"
SOURCES = {
    "gemm": ("skinny_gemm.py",),
    "decode_attention": ("decode_attention.py", "softmax.py"),
    "prefill_attention": ("prefill_attention.py", "softmax.py"),
}
"""Operation -> the files whose text decides how fast a launch is."""


def table_file(arch: str, units: int) -> Path:
    """Where the table of such a device is kept."""
    return FOLDER / f"{tuning.place(arch, units)}.json"


@lru_cache
def table(arch: str, units: int) -> Table:
    """The table of such a device as this process first read it; empty where there is none."""
    return tuning.read(table_file(arch, units), tuning.place(arch, units))


@lru_cache
def sources(operation: str) -> str:
    """The hash that an operation's entries must carry to hold."""
    return tuning.source_hash(Path(__file__).parent / name for name in SOURCES[operation])


def lookup(arch: str, units: int, operation: str, bucket: str, dtype: str) -> Entry | None:
    """The measured entry, or None. float16 takes what bfloat16 was measured with: both are as fast."""
    found = table(arch, units)
    for name in _names(dtype):
        if (entry := found.lookup(operation, bucket, name, sources(operation))) is not None:
            return entry
    return None


def complaint(arch: str, units: int, operation: str, bucket: str, dtype: str) -> str | None:
    """Why `lookup` gives nothing; None = it gives an entry."""
    if lookup(arch, units, operation, bucket, dtype) is not None:
        return None
    return table(arch, units).complaint(operation, bucket, _names(dtype)[-1], sources(operation))


def product_dtype(dtype: torch.dtype) -> str:
    """A product's dtype as entries name it."""
    return str(dtype).removeprefix("torch.")


def attention_dtype(spec: AttentionSpec) -> str:
    """An attention layer's dtype as entries name it, the cache's beside it where they differ."""
    name = product_dtype(spec.dtype)
    return name if spec.kv_dtype == spec.dtype else f"{name} on {product_dtype(spec.kv_dtype)}"


def _names(dtype: str) -> tuple[str, ...]:
    first, _, rest = dtype.partition(" ")
    twin = f"bfloat16 {rest}".strip()
    return (dtype, twin) if first == "float16" else (dtype,)
