"""Judge a linear implementation: weights in every scheme, of ordinary and awkward shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backbench.backends.conformance import oracle
from backbench.backends.conformance.finding import Finding
from backbench.backends.conformance.matrix import CheckRow, Status
from backbench.backends.conformance.quantized_cases import KEPT, draw_weight, sure_rows
from backbench.backends.conformance.tolerance import deviation, limit
from backbench.backends.interface import Device, Linear, Scheme, Weight, WeightSpec

SEED = 20261122


@dataclass(frozen=True)
class LinearCase:
    """x [m, k] times a weight [n, k]."""

    m: int
    n: int
    k: int
    bias: bool = False
    kept: str = ""
    """How the weight is kept, a name of `quantized_cases.KEPT`; "" = dense."""

    @property
    def name(self) -> str:
        kept = f"{self.kept} " if self.kept else ""
        return f"{kept}m{self.m} n{self.n} k{self.k}" + (" bias" if self.bias else "")

    def spec(self, dtype: torch.dtype) -> WeightSpec:
        """The weight a backend is asked to serve."""
        return WeightSpec("any", self.n, self.k, KEPT[self.kept].scheme if self.kept else Scheme(), dtype)


QUICK = (
    LinearCase(1, 96, 64),
    LinearCase(3, 128, 256, bias=True),
    LinearCase(16, 80, 96),
    LinearCase(33, 200, 128, bias=True),
)
FULL = (
    *QUICK,
    *(LinearCase(m, 1024, 512) for m in (1, 2, 4, 7, 8, 15, 16, 17, 64, 129)),
    LinearCase(1, 4096, 4096),
    LinearCase(16, 4096, 12288, bias=True),
    LinearCase(5, 1000, 1000),
)
QUICK_KEPT = tuple(
    case
    for kept in KEPT
    for case in (LinearCase(1, 96, 256, kept=kept), LinearCase(17, 200, 384, bias=True, kept=kept))
)
FULL_KEPT = (
    *QUICK_KEPT,
    *(LinearCase(m, 1024, 512, kept=kept) for kept in KEPT for m in (1, 2, 4, 7, 8, 15, 16, 33, 64, 129)),
    *(LinearCase(m, 4096, 4096, kept=kept) for kept in KEPT for m in (1, 16)),
)


def linear_cases(level: str) -> tuple[LinearCase, ...]:
    """The cases of a level, dense ones first."""
    return (*QUICK, *QUICK_KEPT) if level == "quick" else (*FULL, *FULL_KEPT)


class LinearChecker:
    """Runs cases on one linear implementation, with torch's as the measure of rounding.

    The truth is `quantization.product` with its sums in fp64. What a result may be off is the same for every
    scheme (`tolerance.limit`): twice what torch's own is, which rounds each dequantized number to the rows'
    dtype and sums as the vendor's library does, and one rounding of the output.
    """

    def __init__(self, linear: Linear, reference: Linear, device: Device) -> None:
        self.linear = linear
        self.reference = reference
        self.device = device

    def check(self, case: LinearCase, dtype: torch.dtype) -> CheckRow:
        """The row of one case; an exception from the backend is a wrong result."""
        name = str(dtype).removeprefix("torch.")
        if reasons := self.linear.refusals(case.spec(dtype), self.device):
            return CheckRow("linear", case.name, name, Status.REFUSED, "; ".join(reasons))
        try:
            return self._values(case, dtype).row("linear", case.name, name)
        except Exception as error:
            detail = f"raised {type(error).__name__}: {error}".splitlines()[0]
            return CheckRow("linear", case.name, name, Status.WRONG, detail)

    def _values(self, case: LinearCase, dtype: torch.dtype) -> Finding:
        generator = torch.Generator().manual_seed(SEED)
        x = torch.randn(case.m, case.k, generator=generator).to(dtype)
        if case.kept:
            weight = draw_weight(KEPT[case.kept], case.n, case.k, dtype, generator)
            x = sure_rows(x, weight)
        else:
            dense = torch.randn(case.n, case.k, generator=generator) * case.k**-0.5
            weight = Weight(Scheme(), dense.to(dtype))
        bias = torch.randn(case.n, generator=generator).to(dtype) if case.bias else None
        wanted = oracle.quantized_linear(x, weight, bias)
        target = self.device.torch_device
        canonical = weight.to(target)
        added = None if bias is None else bias.to(target)

        def product(linear: Linear) -> torch.Tensor:
            return linear.run(x.to(target), linear.pack(canonical, self.device), added)

        allowed = limit(deviation(product(self.reference), wanted), wanted, dtype)
        got = product(self.linear)
        finding = Finding.measure(got, wanted, allowed)
        return finding.also([] if got.dtype == dtype else [f"gave {got.dtype}, not {dtype}"])
