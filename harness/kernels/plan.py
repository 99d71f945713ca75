"""From what was asked to the device, the backends and the problems that are put to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from backbench.backends.interface import Backend, Device
from backbench.backends.interface.device import detect
from backbench.backends.registry import load
from backbench.engine.limits import CPU_BLOCK_SIZE, GPU_BLOCK_SIZE
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.config import DTYPES, ModelConfig
from backbench.errors import HarnessError
from backbench.harness.kernels.attention import Geometry, attention_problem
from backbench.harness.kernels.linear import linear_problems
from backbench.harness.kernels.operations import operation_problems
from backbench.harness.kernels.problem import Problem
from backbench.harness.kernels.shapes import parse_shape

GPU_SHAPES = "1q1s4k,64q1s4k,8q2k,2q1k_32q1s1k"
CPU_SHAPES = "1q1s1k,8q1s512,1q256,1q128_4q1s256"
ALL_REDUCE = "all_reduce"
"""A kind of its own: several devices take part, so it is measured by `kernels.collectives`."""
MOST_ROWS = 2**20
"""Rows of one product or fused operation."""


@dataclass(frozen=True)
class Asked:
    """Options of `bench kernels` that say what is measured; None = decided from the device."""

    backend_names: str
    shapes: str | None
    kinds: str
    model: str
    tokens: str
    dtype: str | None
    block_size: int | None
    prefer: str | None
    """The device."""
    quantize: str = "none"
    """Schemes of the linear weights."""


class Planned(NamedTuple):
    """What is measured, where."""

    device: Device
    backends: list[Backend]
    problems: list[Problem]
    dtype: torch.dtype
    hidden_size: int
    rows: tuple[int, ...]
    """What sums between devices are measured on."""


def plan(asked: Asked) -> Planned:
    """Raises BackbenchError where something asked for is not there."""
    device = detect(prefer=asked.prefer)
    on_cpu = device.torch_device.type == "cpu"
    backends = [load(name.strip()) for name in asked.backend_names.split(",")]
    dtype = DTYPES[asked.dtype or ("float32" if on_cpu else "bfloat16")]
    shapes = (CPU_SHAPES if on_cpu else GPU_SHAPES) if asked.shapes is None else asked.shapes
    size = asked.block_size or (CPU_BLOCK_SIZE if on_cpu else GPU_BLOCK_SIZE)
    problems = list(_problems(asked, shapes, dtype, size))
    summed = counts_of(asked.tokens) if ALL_REDUCE in asked.kinds.split(",") else ()
    return Planned(device, backends, problems, dtype, find_model(asked.model).config.hidden_size, summed)


def _problems(asked: Asked, shapes: str, dtype: torch.dtype, block_size: int) -> Iterator[Problem]:
    """The problems of every kind asked for."""
    kinds = [kind.strip() for kind in asked.kinds.split(",")]
    known = ("attention", "linear", "operations", ALL_REDUCE)
    for kind in kinds:
        if kind not in known:
            raise HarnessError(f"Unknown kind {kind!r}; use {', '.join(known)}.")
    config = find_model(asked.model).config
    counts = counts_of(asked.tokens)
    if "attention" in kinds:
        yield from _attention_problems(shapes, config, dtype, block_size)
    if "linear" in kinds:
        yield from linear_problems(config, counts, dtype, asked.quantize.split(","))
    if "operations" in kinds:
        yield from operation_problems(config, counts, dtype)


def _attention_problems(
    shapes: str, config: ModelConfig, dtype: torch.dtype, block_size: int
) -> Iterator[Problem]:
    geometry = Geometry(config.q_heads, config.kv_heads, config.head_dim, block_size, dtype)
    for text in shapes.split(","):
        yield attention_problem(parse_shape(text), geometry)


def counts_of(text: str) -> tuple[int, ...]:
    """Numbers of rows, by commas; HarnessError where they are none."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 9 and 0 < int(part) <= MOST_ROWS for part in parts):
        raise HarnessError(f"Token counts are whole numbers from 1 to {MOST_ROWS:,} like 1,16; not {text!r}.")
    return tuple(int(part) for part in parts)
