"""Which way a quantized product takes: every launch and the library's ways, checked and timed cold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from backbench.backends import quantization
from backbench.backends.interface import Config, Device, Problem, Scheme, Weight
from backbench.backends.triton import configs, quantized_configs
from backbench.backends.triton.gemm_tune import COLD_BYTES, MANY, READ_BYTES, dense_product_us
from backbench.backends.triton.quantized_configs import (
    BUCKETS,
    Dequantized,
    Expanded,
    Kernel,
    ScaledProduct,
    SemiStructured,
    Tile,
    Way,
)
from backbench.backends.triton.quantized_weight import QuantizedWeight, pack_weight
from backbench.backends.triton.sparse_weight import SparseWeight, pack_sparse
from backbench.backends.triton.tile_launches import tile_launches
from backbench.backends.tuning.timing import graph_time_us

MOST_PLACES = 16
CHECKED = 2048
"""Outputs at either end that are compared."""


@dataclass
class QuantizedProblem(Problem):
    """`rows` rows by an [n, k] weight in `scheme`; as a bucket, `rows` is its size."""

    rows: int
    n: int
    k: int
    scheme: Scheme
    number_type: torch.dtype
    device: Device
    cold_bytes: int = COLD_BYTES
    replays: int = 5

    tolerance = 8e-3
    """The output rounds to bf16 (1.7e-3), and so does every scaled number of a weight (as much again)."""

    def __post_init__(self) -> None:
        self.operation = quantized_configs.operation(self.scheme)
        self.bucket = configs.bucket_name(self.rows, self.n, self.k)
        self.dtype = quantized_configs.entry_dtype(self.scheme, self.number_type)
        self.sources = configs.sources(self.operation)

    @cached_property
    def weights(self) -> Sequence[QuantizedWeight | SparseWeight]:
        """One weight at as many places as fill any cache."""
        torch.manual_seed(0)
        at = self.device.torch_device
        packed: QuantizedWeight | SparseWeight
        if self.scheme.compressed:
            self.canonical = random_sparse(self.n, self.k, self.number_type, at)
            packed = pack_sparse(self.canonical, at)
        else:
            dense = torch.empty(self.n, self.k, dtype=self.number_type, device=at).normal_(0, 0.02)
            self.canonical = quantization.quantize(dense, self.scheme)
            packed = pack_weight(self.canonical, at)
        places = min(MOST_PLACES, max(1, -(-self.cold_bytes // packed.num_bytes)))
        return [packed, *(packed.copy() for _ in range(places - 1))]

    def places(self, config: Config | None) -> Sequence[QuantizedWeight | SparseWeight]:
        """The weights as `config` takes them, perhaps with what a library keeps beside them."""
        way = self.way(config)
        kept = isinstance(way, SemiStructured) and way.kept
        return self.library_weights if kept else self.weights

    @cached_property
    def library_weights(self) -> Sequence[SparseWeight]:
        """The 2:4 weights with what the library of torch's product keeps beside them."""
        from backbench.backends.triton.sparse import with_library

        (way, *_) = quantized_configs.semi_structured(self.device.arch, self.n, self.k, self.number_type)
        plain = [each for each in self.weights if isinstance(each, SparseWeight)]
        return [with_library(each.copy(), way.semi_structured) for each in plain]

    @cached_property
    def x(self) -> Tensor:
        """Random rows [rows, k]."""
        generator = torch.Generator(device=self.device.torch_device).manual_seed(1)
        at = self.device.torch_device
        return torch.randn(self.rows, self.k, dtype=self.number_type, device=at, generator=generator)

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """Outputs that are compared, and the specification's numbers for up to 64 rows [64, outputs]."""
        assert self.weights
        first = torch.arange(min(self.n, CHECKED))
        some = torch.cat([first, torch.arange(max(0, self.n - CHECKED), self.n)]).to(self.x.device)
        return some, quantization.product(self.x[-64:], self.canonical)[:, some]

    def sources_of(self, config: Config | None) -> str:
        return configs.sources_of(self.operation, config)

    def baseline(self) -> Config:
        return asdict(self.way(None))

    def way(self, config: Config | None) -> Way:
        """What `config` stands for; None = the written rule."""
        if config is not None:
            return quantized_configs.way(config)
        place = (self.device.arch, self.device.units)
        return quantized_configs.written(*place, self.rows, self.n, self.k, self.scheme, self.number_type)

    def candidates(self) -> Sequence[Config]:
        place = (self.device.arch, self.device.units)
        at = (*place, self.rows, self.n, self.k, self.scheme)
        found: list[Way] = [*quantized_configs.launches(*at), *tile_launches(*at)]
        if self.rows > BUCKETS[1]:
            found.append(Expanded() if self.scheme.compressed else Dequantized())
        library = quantized_configs.library_takes(place[0], self.n, self.k, self.scheme, self.number_type)
        if library:
            found.append(ScaledProduct())
        if self.scheme.compressed and self.rows > BUCKETS[1]:
            found += quantized_configs.semi_structured(place[0], self.n, self.k, self.number_type)
        return [asdict(each) for each in found]

    def error(self, config: Config) -> float:
        some, exact = self.expected
        actual = self._product(config, self.places(config)[-1])[-64:, some].float()
        return float((actual - exact).norm() / exact.norm())

    def product(self, config: Config | None) -> Tensor:
        """All outputs [rows, n] of one run."""
        return self._product(config, self.places(config)[-1])

    def times_us(self, config: Config | None) -> Sequence[float]:
        return [self.time_us(config)[0]]

    def time_us(self, config: Config | None) -> tuple[float, float]:
        """(median, spread) microseconds."""
        calls = [partial(self._product, config, weight) for weight in self.places(config)]
        while self.rows <= MANY and len(calls) * self.weights[0].num_bytes < READ_BYTES:
            calls = calls * 2
        return graph_time_us(calls, self.replays)

    def dense_us(self) -> float:
        at = (self.rows, self.n, self.k, self.number_type, self.device)
        return min(dense_product_us(*at, self.replays).values())

    def compile(self, config: Config) -> None:
        # As many columns and as few rows as specialise the kernels alike.
        few = replace(self, n=256, rows=min(self.rows, 16), cold_bytes=1)
        if isinstance(self.way(config), (Kernel, Tile)):
            few._product(config, few.weights[0])
            torch.cuda.synchronize()

    def _product(self, config: Config | None, weight: QuantizedWeight | SparseWeight) -> Tensor:
        from backbench.backends.triton.quantized import run_quantized
        from backbench.backends.triton.sparse import run_sparse

        if isinstance(weight, SparseWeight):
            return run_sparse(self.x, weight, self.way(config))
        return run_quantized(self.x, weight, self.way(config))


def random_sparse(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Weight:
    """A random 2:4 weight [n, k], compressed: nothing larger has to be held to make it."""
    values = torch.empty(n, k // 2, dtype=dtype, device=device).normal_(0, 0.02)
    places = torch.tensor(quantization.PLACES, dtype=torch.uint8, device=device)
    positions = torch.empty(n, k // 8, dtype=torch.uint8, device=device)
    for rows in positions.split(1024):
        codes = places[torch.randint(len(places), (len(rows), k // 4), device=device)]
        rows.copy_(quantization.packed(codes))
    return Weight(SparseWeight.scheme, values, positions=positions)
