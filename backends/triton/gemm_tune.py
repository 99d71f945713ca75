"""Products by dense weights, ours and the vendor's: checked, and timed on weights that no cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from backbench.backends.interface import Config, Device, Problem
from backbench.backends.triton import configs
from backbench.backends.triton.configs import KERNEL_BUCKETS, ZeroBias
from backbench.backends.triton.linear import TritonLinear
from backbench.backends.tuning.timing import graph_time_us

COLD_WEIGHT_BYTES = 2**30
"""Weights of one graph together: many times any cache."""
COLD_BYTES = 400 * 2**20
"""As many where several products stand beside each other: several times any cache."""
READ_BYTES = 2**31
"""Bytes of weights that one replay reads at least, so that its start and end count for little."""
MANY = 256
"""Rows from which on a product takes long enough by itself."""


@dataclass
class GemmProblem(Problem):
    """`rows` rows by an [n, k] weight; as a bucket, `rows` is its size."""

    rows: int
    n: int
    k: int
    number_type: torch.dtype
    device: Device
    cold_bytes: int = COLD_WEIGHT_BYTES
    read_bytes: int = COLD_WEIGHT_BYTES
    """Bytes of weights that one replay reads."""
    replays: int = 5

    operation = "gemm"
    tolerance = 4e-3
    """One rounding of the output to bf16 is about 1.7e-3."""

    def __post_init__(self) -> None:
        self.bucket = configs.bucket_name(self.rows, self.n, self.k)
        self.dtype = configs.product_dtype(self.number_type)
        self.sources = configs.sources("gemm")
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
        launches = configs.gemm_launches(self.rows, self.device.vendor)
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
        from backbench.backends.triton.gemm import multiply

        kernel, at = configs.product(config), self.device.torch_device
        if isinstance(kernel, ZeroBias):
            return
        depth = max(kernel.block_k, 64)
        x = torch.zeros(16 if kernel.block_m else 1, depth, dtype=self.number_type, device=at)
        multiply(x, torch.zeros(256, depth, dtype=self.number_type, device=at), kernel)
        torch.cuda.synchronize()

    def _product(self, config: Config | None, weight: Tensor) -> Tensor:
        return self.linear.product(self.x, weight, None if config is None else configs.product(config))


@lru_cache
def dense_product_us(
    rows: int, n: int, k: int, dtype: torch.dtype, device: Device, replays: int = 5
) -> dict[str, float]:
    """What `rows` rows by a dense [n, k] weight take: the library's product, and ours where it is chosen."""
    read = READ_BYTES if rows <= MANY else 1
    problem = GemmProblem(rows, n, k, dtype, device, COLD_BYTES, read, replays)
    found = {"library": problem.time_us(None)[0]}
    chosen = configs.choose(device.arch, device.units, rows, n, k, dtype)
    if chosen is not None:
        name = "library, zero bias" if isinstance(chosen, ZeroBias) else "skinny"
        found[name] = problem.time_us(asdict(chosen))[0]
    return found
