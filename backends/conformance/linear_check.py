"""Judge a linear implementation: dense weights of ordinary and awkward shapes, with and without bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backbench.backends.conformance import oracle
from backbench.backends.conformance.finding import Finding
from backbench.backends.conformance.matrix import CheckRow, Status
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

    @property
    def name(self) -> str:
        return f"m{self.m} n{self.n} k{self.k}" + (" bias" if self.bias else "")

    def spec(self, dtype: torch.dtype) -> WeightSpec:
        """The weight a backend is asked to serve."""
        return WeightSpec("any", self.n, self.k, Scheme(), dtype)


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


class LinearChecker:
    """Runs cases on one linear implementation, with torch's as the measure of rounding."""

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
        weight = (torch.randn(case.n, case.k, generator=generator) * case.k**-0.5).to(dtype)
        bias = torch.randn(case.n, generator=generator).to(dtype) if case.bias else None
        wanted = oracle.linear(x, weight, bias)
        target = self.device.torch_device
        canonical = Weight(Scheme(), weight.to(target))
        added = None if bias is None else bias.to(target)

        def product(linear: Linear) -> torch.Tensor:
            return linear.run(x.to(target), linear.pack(canonical, self.device), added)

        allowed = limit(deviation(product(self.reference), wanted), wanted, dtype)
        got = product(self.linear)
        finding = Finding.measure(got, wanted, allowed)
        return finding.also([] if got.dtype == dtype else [f"gave {got.dtype}, not {dtype}"])
