"""What `bench tune` can tune of the Triton backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from backbench.backends.interface import AttentionSpec, Device, Problem, Tuner
from backbench.backends.triton import tuned
from backbench.backends.triton.attention_tuning import BUCKETS as KINDS
from backbench.backends.triton.attention_tuning import entry_key
from backbench.backends.triton.gemm_choice import BUCKETS


class TritonTuner(Tuner):
    """Skinny products and paged attention; kernels are imported at first use."""

    def file(self, device: Device) -> Path:
        return tuned.table_file(device.arch, device.units)

    def products(
        self, weights: Sequence[tuple[int, int]], dtype: torch.dtype, device: Device
    ) -> Iterator[Problem]:
        from backbench.backends.triton.gemm_problem import GemmProblem

        for n, k in dict.fromkeys(weights):
            for rows in BUCKETS:
                yield GemmProblem(rows, n, k, dtype, device)

    def attention(self, specs: Sequence[AttentionSpec], device: Device) -> Iterator[Problem]:
        from backbench.backends.triton.attention_problem import AttentionProblem

        layers = {entry_key(spec, kind): (spec, kind) for spec in specs for kind in KINDS}
        for spec, kind in layers.values():
            yield AttentionProblem.of(spec, kind, device)
