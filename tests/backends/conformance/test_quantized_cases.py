"""Every scheme is checked, and what goes wrong with quantized weights is caught wherever it can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backbench.backends.conformance import check_backend
from backbench.backends.conformance.linear_check import LinearChecker, linear_cases
from backbench.backends.conformance.matrix import Status
from backbench.backends.conformance.quantized_cases import KEPT, draw_weight, sure_rows
from backbench.backends.interface import Backend, Device, Scheme, Weight, device
from backbench.backends.quantization import SCHEMES, dequantize, rounded_rows
from backbench.backends.torch.linear import TorchLinear

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def cpu() -> Device:
    return device.detect(prefer="cpu")


class Spoiled(TorchLinear):
    """Torch's linear, with something of the weight mistaken while it is packed."""

    def __init__(self, spoil: Callable[[Weight], Weight]) -> None:
        self.spoil = spoil

    def pack(self, weight: Weight, device: Device) -> Tensor | Weight:
        return super().pack(self.spoil(weight), device)


def rolled(weight: Weight, dim: int) -> Weight:
    assert weight.scale is not None
    return replace(weight, scale=weight.scale.roll(1, dim))


FAULTS: dict[str, tuple[Callable[[Weight], Weight], Callable[[Weight], bool]]] = {
    "wrong group": (lambda w: rolled(w, 1), lambda w: w.scale is not None and w.scale.shape[1] > 1),
    "scale off by one row": (lambda w: rolled(w, 0), lambda w: w.scale is not None and w.scale.shape[0] > 1),
    "swapped nibbles": (
        lambda w: replace(w, q=(w.q >> 4) | (w.q << 4)),
        lambda w: w.scheme.weight in ("int4", "fp4"),
    ),
    "zero point ignored": (lambda w: replace(w, zero=None), lambda w: w.zero is not None),
    "order ignored": (lambda w: replace(w, order=None), lambda w: w.order is not None),
    "row scale ignored": (lambda w: replace(w, row_scale=None), lambda w: w.row_scale is not None),
    "positions swapped": (
        lambda w: replace(w, positions=((w.positions & 0x33) << 2) | ((w.positions >> 2) & 0x33)),
        lambda w: w.positions is not None,
    ),
    "positions of the wrong four": (
        lambda w: replace(w, positions=(w.positions >> 4) | (w.positions << 4)),
        lambda w: w.positions is not None,
    ),
    "positions off by one row": (
        lambda w: replace(w, positions=w.positions.roll(1, 0)),
        lambda w: w.positions is not None,
    ),
    "rows not rounded": (
        lambda w: replace(w, scheme=replace(w.scheme, activation=None)),
        lambda w: w.scheme.activation is not None,
    ),
    "static scale that clips": (
        lambda w: replace(w, input_scale=w.input_scale / 32),
        lambda w: w.scheme.activation in ("int8-tensor", "fp8-tensor"),
    ),
}
"""What is mistaken, and where it can be."""


def drawn(kept: str) -> Weight:
    return draw_weight(KEPT[kept], 200, 384, torch.float32, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_in_every_scheme(fault: str, dtype: torch.dtype, cpu: Device) -> None:
    spoil, applies = FAULTS[fault]
    checker = LinearChecker(Spoiled(spoil), TorchLinear(), cpu)
    kept = [name for name in KEPT if applies(drawn(name))]
    if dtype == torch.bfloat16 and fault == "rows not rounded":
        # Codes of int8 lie as close together as bf16's numbers: there the fault is one of rounding.
        kept = [name for name in kept if KEPT[name].scheme.activation in ("mxfp8", "nvfp4", "mxfp4")]
    assert kept
    for case in linear_cases("quick"):
        if case.kept in kept and case.m > 1:
            row = checker.check(case, dtype)
            assert row.status is Status.WRONG and "raised" not in row.detail, f"{row.case} {row.detail}"


def test_every_scheme_that_can_be_asked_for_is_checked(cpu: Device) -> None:
    matrix = check_backend(Backend("t", "", linear=TorchLinear()), cpu, dtypes=[torch.float32])
    names = [row.case for row in matrix.rows if row.operation == "linear"]
    for name in (*SCHEMES, *KEPT):
        assert sum(each.startswith(f"{name} m") for each in names) == 2
    assert matrix.ok, "\n".join(matrix.lines())


def test_a_scheme_that_is_not_served_is_refused_and_not_wrong(cpu: Device) -> None:
    class Dense(TorchLinear):
        def refusals(self, spec, device):
            return [] if spec.scheme == Scheme() else ["only dense weights are served"]

    rows = check_backend(Backend("dense", "", linear=Dense()), cpu, dtypes=[torch.float32]).rows
    linear = [row for row in rows if row.operation == "linear"]
    assert {row.status for row in linear} == {Status.PASS, Status.REFUSED}
    assert sum(row.status is Status.REFUSED for row in linear) == 2 * len(KEPT)


@pytest.mark.parametrize("kept", [name for name in KEPT if KEPT[name].scheme.activation])
def test_rows_are_rounded_alike_whatever_the_last_bits_of_their_scale(kept: str) -> None:
    weight = drawn(kept)
    x = sure_rows(torch.randn(17, 384), weight)
    assert float((x == 0).float().mean()) < 0.2  # most numbers stay
    activation = weight.scheme.activation
    codes, scale = rounded_rows(x, activation, weight.input_scale)
    groups = x.unflatten(1, (scale.shape[1], -1))
    largest = groups.abs() == groups.abs().amax(-1, keepdim=True)
    for nudge in (1 - 5e-4, 1 + 5e-4):
        other = torch.where(largest, groups, groups * nudge).flatten(1)
        assert torch.equal(rounded_rows(other, activation, weight.input_scale)[0].float(), codes.float())


def test_drawn_weights_are_what_they_are_called() -> None:
    assert drawn("int4-g128 zero points").zero is not None
    assert drawn("int4-g128 act-order").order is not None
    sparse = dequantize(drawn("int4-g128 2:4"), torch.float32).view(-1, 4)
    assert bool(((sparse == 0).sum(1) >= 2).all())
