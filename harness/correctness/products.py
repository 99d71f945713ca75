"""Each quantized product as the backend computes it, on the model's own rows.

Log-probabilities say little of a product whose rows are rounded: a last bit decides a code here and there,
and through a whole model that grows to tenths of a nat in right kernels. Here the backend multiplies rows
that a torch pass over the sample meets at each product, as many as in a decode, a small batch and a prompt,
and torch multiplies the very same rows by the same weight, so that only this product's own error is seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from backbench.backends.conformance.quantized_cases import sure_rows
from backbench.backends.conformance.tolerance import deviation, limit
from backbench.backends.interface import PackedWeight
from backbench.backends.quantization import name_of
from backbench.engine.models.decoder import Decoder
from backbench.harness.correctness.reference import PlainLinear, WideLinear, wider

COUNTS = (1, 16, 64)
"""Rows that are multiplied at once, as far as the sample has them."""


@dataclass(frozen=True)
class Worst:
    """The product nearest to its bound, or furthest beyond it."""

    share: float
    """Its error over the bound, of the largest or of the root mean square, whichever is nearer to its own."""
    layer: int | None
    """None = the output head."""
    role: str
    scheme: str
    rows: int
    error: float
    limit: float
    """Root mean squares over the outputs."""

    def describe(self) -> str:
        """The place in words, as an error line names it."""
        where = "" if self.layer is None else f"layer {self.layer}, "
        return (
            f"{where}{self.role} as {self.scheme}, {self.rows} rows: off by {self.error:.3g}, "
            f"at most {self.limit:.3g} (root mean square)"
        )


class ProductCheck:
    """Compares the quantized products of `decoder` as a torch pass over the same model meets them.

    Bounds are conformance's (`tolerance.limit`): twice torch's own error in the same dtype, against torch in
    the wider one, and one rounding. Numbers that a hair's breadth rounds to another code are set to 0 first.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.worst: Worst | None = None
        self.num_products = 0
        self._places: dict[int, tuple[int | None, str]] = {}
        for index, layer in enumerate(decoder.weights.layers):
            self._places |= {id(held): (index, role) for role, held in vars(layer).items()}
        self._places[id(decoder.weights.lm_head)] = (None, "head")
        self._seen: set[int] = set()

    @property
    def passed(self) -> bool:
        return self.worst is None or self.worst.share <= 1

    def linear(self) -> PlainLinear:
        """Torch's linear, which shows this check each quantized product's rows on its way."""
        return _ShowingLinear(self._product)

    def to_json(self) -> dict[str, Any] | None:
        """What the record keeps; None where nothing is quantized."""
        worst = self.worst
        if worst is None:
            return None
        share = worst.share if math.isfinite(worst.share) else None
        return {
            "passed": self.passed,
            "products": self.num_products,
            "worst_share_of_limit": share,
            "worst": worst.describe(),
        }

    def _product(self, x: Tensor, held: PackedWeight) -> None:
        """Compare this product on some of its rows x [T, K]; each product once."""
        if id(held) in self._seen:
            return
        self._seen.add(id(held))
        self.num_products += 1
        weight = held.canonical()
        rows = sure_rows(x[:: max(1, len(x) // COUNTS[-1])][: COUNTS[-1]].contiguous(), weight)
        plain = PlainLinear().run(rows, weight)
        wide = WideLinear().run(rows.to(wider(x.dtype)), weight)
        packed = self.decoder.linear.take(held, self.decoder.device)
        for count in dict.fromkeys(min(each, len(rows)) for each in COUNTS):
            got = self.decoder.linear.run(rows[:count].contiguous(), packed)
            self._judge(held, got, plain[:count], wide[:count])

    def _judge(self, held: PackedWeight, got: Tensor, plain: Tensor, wide: Tensor) -> None:
        allowed = limit(deviation(plain, wide), wide, plain.dtype)
        found = deviation(got, wide)
        shares = [_share(found.largest, allowed.largest), _share(found.rms, allowed.rms)]
        if self.worst is not None and max(shares) <= self.worst.share:
            return
        layer, role = self._places[id(held)]
        scheme = name_of(held.scheme)
        self.worst = Worst(max(shares), layer, role, scheme, len(got), found.rms, allowed.rms)


def _share(error: float, allowed: float) -> float:
    return error / allowed if allowed else (math.inf if error else 0.0)


class _ShowingLinear(PlainLinear):
    def __init__(self, show: Any) -> None:
        self._show = show

    def run(self, x: Tensor, packed: Any, bias: Tensor | None = None) -> Tensor:
        if isinstance(packed, PackedWeight):
            self._show(x, packed)
        return super().run(x, packed, bias)
