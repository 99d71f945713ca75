"""How a dense model's products become quantized ones, one product at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from backbench.backends.interface import Scheme, Weight, join
from backbench.backends.quantization import quantize
from backbench.engine.calibration.gptq import gptq, inverse_factor
from backbench.engine.calibration.inputs import InputStatistics
from backbench.engine.models.layers import Product
from backbench.engine.models.on_the_fly import pruned
from backbench.engine.models.quantized import with_own_rows
from backbench.errors import EngineError

METHODS = ("rtn", "gptq", "awq")
"""How weights are rounded: to nearest; GPTQ, errors made up for by later features; AWQ, features that matter
made larger before."""
SPARSITY_METHODS = ("magnitude", "wanda")
"""Which weights become 0: the smallest; the smallest times the norm of their inputs."""


@dataclass(frozen=True)
class Recipe:
    """What is done to every product of a dense model."""

    scheme: Scheme
    """Of all products; dense with a sparsity = only zeros are made."""
    method: str = "rtn"
    sparsity_method: str = "magnitude"
    head: bool = False
    """The output head, too."""

    def __post_init__(self) -> None:
        """Raises EngineError where the parts contradict each other."""
        for name, given, known in (
            ("method", self.method, METHODS),
            ("sparsity-method", self.sparsity_method, SPARSITY_METHODS),
        ):
            if given not in known:
                raise EngineError(f"--{name} takes {' or '.join(known)}; not {given!r}.")
        if self.scheme == Scheme():
            raise EngineError("Nothing is asked for; give --scheme, --sparsity or both.")
        if self.method != "rtn" and not self.scheme.quantized:
            raise EngineError(f"--method {self.method} says how weights are rounded; give --scheme, too.")
        if self.sparsity_method != "magnitude" and self.scheme.sparsity is None:
            raise EngineError(
                f"--sparsity-method {self.sparsity_method} says which weights become 0; give --sparsity, too."
            )
        if self.method == "awq" and self.scheme.activation is not None:
            raise EngineError(
                "--method awq weighs what rounding weights costs, not rows; take a scheme of weights alone, "
                "such as int8 or int4-g128, or another method."
            )

    @property
    def calibrated(self) -> bool:
        """What products are given decides something."""
        return self.method != "rtn" or self.sparsity_method == "wanda"

    def prune_weight(self, dense: Tensor, statistics: InputStatistics | None) -> Tensor:
        """[N, K] with its zeros, itself where none are asked for."""
        if self.scheme.sparsity is None:
            return dense
        norms = None
        if self.sparsity_method == "wanda":
            assert statistics is not None
            norms = statistics.norms
        return pruned(dense, self.scheme.sparsity, norms)

    def round_to_nearest(self, product: Product, dense: Tensor, scale_dtype: torch.dtype) -> list[Weight]:
        """[N, K] of the product in the scheme: one weight for each of its sources."""
        parts = [quantize(part, self.scheme, scale_dtype) for part in self._alike(product, dense)]
        return _by_source(parts, product)

    def round(
        self,
        product: Product,
        dense: Tensor,
        scale_dtype: torch.dtype,
        statistics: InputStatistics | None,
    ) -> list[Weight]:
        """As `round_to_nearest`, by the method; AWQ is what was done to `dense` before."""
        if self.method != "gptq":
            return self.round_to_nearest(product, dense, scale_dtype)
        assert statistics is not None
        factor = inverse_factor(statistics.gram)
        parts = [gptq(part, self.scheme, factor, scale_dtype) for part in self._alike(product, dense)]
        return _by_source(parts, product)

    def _alike(self, product: Product, dense: Tensor) -> Iterator[Tensor]:
        """Rows that may be rounded at once: all of them, since NVFP4's global scale is to be one for what is
        multiplied at once (vLLM takes the largest of several), unless blocks of rows would span sources."""
        if self.scheme.group_n == 1:
            yield dense
        else:
            yield from dense.split([rows for _, rows in product.sources])


def whole(parts: list[Weight]) -> Weight:
    """The product's weight of those of its sources."""
    size = parts[0].scheme.group_n
    if any(part.n % size for part in parts[:-1]):
        parts = [with_own_rows(part) for part in parts]
    return join(parts)


def _by_source(parts: list[Weight], product: Product) -> list[Weight]:
    if len(parts) == len(product.sources):
        return parts
    (one,), found, start = parts, [], 0
    for _, rows in product.sources:
        found.append(one.rows(start, start + rows))
        start += rows
    return found
