"""Rounding and pruning a dense model's products while they are loaded, one product at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backbench.backends.interface import Scheme, Weight, join
from backbench.backends.quantization import (
    ROUNDED_AT_ONCE,
    name_of,
    named,
    quantize,
    require_divisible,
    rows_at_once,
)
from backbench.engine.models.layers import ModelSpec, Product
from backbench.errors import BackendError, EngineError

if TYPE_CHECKING:
    from backbench.engine.config import EngineConfig


@dataclass(frozen=True)
class OnTheFly:
    """What is done to a dense model's products."""

    scheme: Scheme
    head: bool = False
    """The output head, too. A tied one gets a copy of its own then: the embedding stays as it is."""
    calibrated: bool = False
    """Weights are pruned by their inputs' norms as well (Wanda), which `calibration.wanda` measures."""
    norms: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """First source of a product -> f32 [k], once they are measured."""

    @classmethod
    def asked(cls, config: EngineConfig) -> OnTheFly | None:
        """What the engine's settings ask for; None = nothing. Raises EngineError where they contradict."""
        if config.sparsity is None and config.sparsity_method is not None:
            raise EngineError("--sparsity-method says which weights become 0; give --sparsity, too.")
        if config.calibrate is not None and config.sparsity_method != "wanda":
            raise EngineError("--calibrate has nothing to serve; give --sparsity-method wanda.")
        if config.quantize in (None, "none") and config.sparsity is None:
            if config.quantize_head and config.quantize is None:
                raise EngineError("--quantize-head needs --quantize or --sparsity, which say how.")
            return None
        scheme = Scheme() if config.quantize in (None, "none") else named(config.quantize)
        wanda = config.sparsity_method == "wanda"
        return cls(replace(scheme, sparsity=config.sparsity), config.quantize_head, wanda)

    def require_norms(self) -> None:
        """Raises EngineError where weights are to be pruned by inputs that nobody has measured."""
        if self.calibrated and not self.norms:
            raise EngineError(
                "Wanda measures inputs first; give the source that calibration.wanda.calibrated makes."
            )

    def put_on(self, spec: ModelSpec) -> ModelSpec:
        """The decoder with its products in this scheme.

        Raises EngineError where one is quantized already, or does not divide into groups; it is named.
        """
        if kept := next((each.scheme for each in spec.products if each.scheme != Scheme()), None):
            raise EngineError(
                f"The checkpoint is quantized already ({name_of(kept)}); leave out --quantize and --sparsity."
            )

        def rounded(product: Product) -> Product:
            try:
                require_divisible(product.k, self.scheme)
            except BackendError as error:
                name = product.sources[0][0].removesuffix(".weight")
                raise EngineError(f"{name} cannot be {name_of(self.scheme)}: {error}") from None
            return replace(product, scheme=self.scheme, input_norms=self.norms.get(product.sources[0][0]))

        return replace(spec.with_products(rounded), head=rounded(spec.head) if self.head else spec.head)


def round_product(product: Product, sources: Iterator[Tensor]) -> Weight:
    """The product's weight in its scheme, from the dense rows [rows, k] of each of its sources in turn.

    One source is held dense at a time, unless its rows are no whole blocks of scales.
    """
    scheme = product.scheme
    whole = all(rows % scheme.group_n == 0 for _, rows in product.sources[:-1])
    if whole:
        return join([_rounded(dense, product) for dense in sources])
    return _rounded(torch.cat(list(sources)), product)


def _rounded(dense: Tensor, product: Product) -> Weight:
    scheme = product.scheme
    if scheme.sparsity is not None:
        dense = pruned(dense, scheme.sparsity, product.input_norms)
    return quantize(dense, scheme)


def pruned(dense: Tensor, sparsity: str, norms: Tensor | None = None) -> Tensor:
    """A copy of [N, K] whose least important weights are 0: two of each four neighbours along K ("2:4"), or
    a share of every row ("unstructured:0.7"), rounded down to whole numbers.

    norms: the Euclidean norm of each input feature [K] over calibration rows, which magnitudes are multiplied
    by; None = magnitudes alone. Both by output row: Sun et al. 2024 (Wanda), section 3.
    """
    result = dense.clone()
    share = None if sparsity == "2:4" else float(sparsity.partition(":")[2])
    for rows in result.split(rows_at_once(dense.shape[1], Scheme(), dense.device, ROUNDED_AT_ONCE)):
        importance = rows.abs() if norms is None else rows.abs().float() * norms.float()
        width = rows.shape[1] if share is not None else 4
        count = 2 if share is None else int(share * width + 1e-9)
        # The smallest of what is sorted stably: of equal importance the first ones, and exactly so many.
        smallest = importance.view(-1, width).sort(dim=1, stable=True).indices[:, :count]
        rows.view(-1, width).scatter_(1, smallest, 0.0)
    return result


def described(spec: ModelSpec) -> str | None:
    """How the products are kept, in a few words; None = all are dense."""
    roles: dict[str, list[str]] = {}
    for product in spec.products:
        name = name_of(product.scheme)
        if product.role not in roles.setdefault(name, []):
            roles[name].append(product.role)
    names = [name for name in roles if name != "none"]
    if not names:
        return None
    if len(names) == 1 and roles.get("none", ["head"]) == ["head"]:
        return names[0] + ("" if "none" in roles else ", head too")
    return "; ".join(f"{name}: {', '.join(roles[name])}" for name in names)
