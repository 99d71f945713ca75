"""One product x [M, K] by a weight [N, K], run with any launch, on weights that are not in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from backbench.backends.interface import Config, Device, Problem
from backbench.backends.triton import tuned
from backbench.backends.triton.gemm_choice import KERNEL_BUCKETS, ZeroBias, bucket_name, launch
from backbench.backends.triton.linear import TritonLinear
from backbench.backends.triton.search_space import gemm_launches
from backbench.backends.tuning.timing import graph_time_us

COLD_BYTES = 2**30
"""Weights of one graph together: many times any cache."""


@dataclass
class GemmProblem(Problem):
    """`rows` rows by an [n, k] weight; as a bucket, `rows` is its size."""

    rows: int
    n: int
    k: int
    number_type: torch.dtype
    device: Device
    cold_bytes: int = COLD_BYTES
    read_bytes: int = COLD_BYTES
    """Bytes of weights that one replay reads."""
    replays: int = 5

    operation = "gemm"
    tolerance = 4e-3
    """One rounding of the output to bf16 is about 1.7e-3."""

    def __post_init__(self) -> None:
        self.bucket = bucket_name(self.rows, self.n, self.k)
        self.dtype = tuned.product_dtype(self.number_type)
        self.sources = tuned.sources("gemm")
        self.linear = TritonLinear()

    @cached_property
    def weights(self) -> Tensor:
        """Distinct random weights [count, n, k]."""
        count = max(1, -(-self.cold_bytes // self.weight_bytes))
        generator = torch.Generator(device=self.device.torch_device).manual_seed(0)
        shape = (count, self.n, self.k)
        weights = torch.empty(shape, dtype=self.number_type, device=self.device.torch_device)
        for part in weights:
            part.normal_(0, 0.02, generator=generator)
        return weights

    @cached_property
    def x(self) -> Tensor:
        """Random rows [rows, k]."""
        generator = torch.Generator(device=self.device.torch_device).manual_seed(1)
        at = self.device.torch_device
        return torch.randn(self.rows, self.k, dtype=self.number_type, device=at, generator=generator)

    @property
    def weight_bytes(self) -> int:
        return self.n * self.k * self.number_type.itemsize

    def baseline(self) -> None:
        return None

    def candidates(self) -> Sequence[Config]:
        if self.rows > KERNEL_BUCKETS[-1]:
            return [asdict(ZeroBias())]
        launches = gemm_launches(self.rows, self.device.vendor)
        return [asdict(kernel) for kernel in launches if self.k % kernel.block_k == 0]

    def error(self, config: Config) -> float:
        """Over the first 4096 outputs and the last."""
        weight = self.weights[-1]
        first, last = torch.arange(min(self.n, 4096)), torch.arange(max(0, self.n - 4096), self.n)
        some = torch.cat([first, last]).to(weight.device)
        exact = self.x.float() @ weight[some].float().T
        actual = self._product(config, weight)[:, some].float()
        return float((actual - exact).norm() / exact.norm())

    def times_us(self, config: Config | None) -> Sequence[float]:
        return [self.time_us(config)[0]]

    def time_us(self, config: Config | None) -> tuple[float, float]:
        """(median, spread) microseconds."""
        calls = [partial(self._product, config, weight) for weight in self.weights]
        while len(calls) * self.weight_bytes < self.read_bytes:
            calls = calls * 2
        return graph_time_us(calls, self.replays)

    def compile(self, config: Config) -> None:
        from backbench.backends.triton.skinny_launch import multiply

        kernel, at = launch(config), self.device.torch_device
        if isinstance(kernel, ZeroBias):
            return
        depth = max(kernel.block_k, 64)
        x = torch.zeros(16 if kernel.block_m else 1, depth, dtype=self.number_type, device=at)
        multiply(x, torch.zeros(256, depth, dtype=self.number_type, device=at), kernel)
        torch.cuda.synchronize()

    def _product(self, config: Config | None, weight: Tensor) -> Tensor:
        return self.linear.product(self.x, weight, None if config is None else launch(config))
