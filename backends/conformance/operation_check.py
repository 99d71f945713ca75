"""Judge a set of elementwise operations against the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from backbench.backends.conformance import oracle
from backbench.backends.conformance.finding import Finding
from backbench.backends.conformance.matrix import CheckRow, Status
from backbench.backends.conformance.sampling_check import SamplingCase, check_sampling
from backbench.backends.conformance.tolerance import deviation, limit
from backbench.backends.interface import AttentionSpec, Device, Operations, Rotary, Rotation, RoundedRows
from backbench.backends.quantization import rounded_rows

SEED = 20261123
EPS = 1e-6
AS_COARSE = {
    "int8-token": torch.bfloat16,
    "fp8-token": torch.float8_e4m3fn,
    "fp8-group128": torch.float8_e4m3fn,
}
"""Activation -> the dtype one rounding of which is as large: half a step of the largest int8 code is 2^-8."""


def rotary_table(positions: int, rotary_dim: int, base: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of position / base^(2 i / rotary_dim): f32[positions, rotary_dim]."""
    frequency = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


@dataclass(frozen=True)
class OperationCase:
    """One operation on `tokens` rows."""

    operation: str
    tokens: int
    width: int
    """Hidden size; for `rotate` the head dimension."""
    norms: bool = False
    rotary_dim: int | None = None
    rounding: str | None = None
    """Activation in whose codes the rows are left."""

    @property
    def name(self) -> str:
        parts = [self.operation, f"t{self.tokens}", f"h{self.width}"]
        parts += [self.rounding] if self.rounding else []
        parts += ["norms"] if self.norms else []
        parts += [f"rotary{self.rotary_dim}"] if self.rotary_dim else []
        return " ".join(parts)


def operation_cases(level: str, roundings: Iterable[str] = ()) -> Iterator[OperationCase]:
    """The elementwise cases of a level; sampling has its own.

    roundings: the codes in which norm and gate can leave their rows.
    """
    widths = (64, 96, 1024) if level == "quick" else (64, 96, 896, 1024, 4096, 8192)
    counts = (1, 5) if level == "quick" else (1, 5, 64, 513)
    for operation in ("embed", "rms_norm", "add_rms_norm", "gate"):
        for tokens, width in zip(counts * len(widths), widths * len(counts), strict=True):
            yield OperationCase(operation, tokens, width)
    for operation, rounding in itertools.product(("add_rms_norm", "gate"), roundings):
        for tokens, width in zip(counts, (256, 4096, 1024, 384), strict=False):
            yield OperationCase(operation, tokens, width, rounding=rounding)
    for width in (64, 128) if level == "quick" else (32, 64, 80, 96, 128, 256):
        for norms in (False, True):
            yield OperationCase("rotate", 7, width, norms)
    yield OperationCase("rotate", 3, 128, False, 64)


class OperationChecker:
    """Runs cases on one set of operations, with torch's as the measure of rounding."""

    def __init__(self, operations: Operations, reference: Operations, device: Device) -> None:
        self.operations = operations
        self.reference = reference
        self.device = device

    def check(self, case: OperationCase | SamplingCase, dtype: torch.dtype) -> CheckRow:
        """The row of one case; an exception from the backend is a wrong result."""
        name = str(dtype).removeprefix("torch.")
        if reasons := self.operations.refusals(dtype, self.device):
            return CheckRow("operations", case.name, name, Status.REFUSED, "; ".join(reasons))
        try:
            if isinstance(case, SamplingCase):
                finding = check_sampling(case, dtype, self.operations, self.device)
            else:
                finding = self._values(case, dtype)
        except Exception as error:
            detail = f"raised {type(error).__name__}: {error}".splitlines()[0]
            return CheckRow("operations", case.name, name, Status.WRONG, detail)
        return finding.row("operations", case.name, name)

    def _values(self, case: OperationCase, dtype: torch.dtype) -> Finding:
        generator = torch.Generator().manual_seed(SEED)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        build: dict[str, Callable[[], Problem]] = {
            "embed": lambda: _embed(case, normal, generator),
            "rms_norm": lambda: _rms_norm(case, normal),
            "add_rms_norm": lambda: _add_rms_norm(case, normal),
            "gate": lambda: _gate(case, normal),
            "rotate": lambda: _rotate(case, normal, generator, dtype),
        }
        problem = build[case.operation]()
        got = problem.run(self.operations, self.device.torch_device)
        rounded = problem.run(self.reference, self.device.torch_device)
        finding = Finding()
        for value, torch_value, wanted, name in zip(got, rounded, problem.wanted, problem.names, strict=True):
            coarse = dtype if case.rounding is None or name == "residual" else AS_COARSE[case.rounding]
            allowed = limit(deviation(torch_value, wanted), wanted, coarse)
            finding = finding.merged(Finding.measure(value, wanted, allowed, name))
            if value.dtype != dtype:
                finding = finding.also([f"{name} is {value.dtype}, not {dtype}"])
        return finding


@dataclass(frozen=True)
class Problem:
    """One operation's inputs, bound, and the oracle's answers."""

    run: Callable[[Operations, torch.device], tuple[Tensor, ...]]
    wanted: tuple[Tensor, ...]
    names: tuple[str, ...]


def _embed(case: OperationCase, normal: Callable[..., Tensor], generator: torch.Generator) -> Problem:
    table = normal(50, case.width)
    ids = torch.randint(0, 50, (case.tokens,), generator=generator)
    wanted = torch.stack([table[int(i)] for i in ids]).double()
    return Problem(lambda ops, at: (ops.embed(ids.to(at), table.to(at)),), (wanted,), ("rows",))


def _rms_norm(case: OperationCase, normal: Callable[..., Tensor]) -> Problem:
    x, weight = 3 * normal(case.tokens, case.width), 1 + 0.1 * normal(case.width)
    wanted = oracle.rms_norm(x, weight, EPS)
    return Problem(lambda ops, at: (ops.rms_norm(x.to(at), weight.to(at), EPS),), (wanted,), ("norm",))


def _add_rms_norm(case: OperationCase, normal: Callable[..., Tensor]) -> Problem:
    x, residual = normal(case.tokens, case.width), 3 * normal(case.tokens, case.width)
    weight = 1 + 0.1 * normal(case.width)
    wanted = x.double() + residual.double()

    def run(operations: Operations, at: torch.device) -> tuple[Tensor, ...]:
        given = (x.to(at), residual.clone().to(at), weight.to(at), EPS)
        if case.rounding is not None and case.rounding in operations.roundings:
            rows, total = operations.rounded_add_rms_norm(*given, case.rounding)
            return _numbers(rows), total
        normed, total = operations.add_rms_norm(*given)
        return _rounded(normed, case.rounding), total

    return Problem(run, (oracle.rms_norm(wanted, weight, EPS), wanted), ("norm", "residual"))


def _gate(case: OperationCase, normal: Callable[..., Tensor]) -> Problem:
    gate_up = 3 * normal(case.tokens, 2 * case.width)

    def run(operations: Operations, at: torch.device) -> tuple[Tensor, ...]:
        if case.rounding is not None and case.rounding in operations.roundings:
            return (_numbers(operations.rounded_gate(gate_up.to(at), case.rounding)),)
        return (_rounded(operations.gate(gate_up.to(at)), case.rounding),)

    return Problem(run, (oracle.gate(gate_up),), ("gated",))


def _rounded(x: Tensor, rounding: str | None) -> Tensor:
    """x as the numbers of its codes, where it is rounded."""
    if rounding is None:
        return x
    codes, scale = rounded_rows(x, rounding)
    return _numbers(RoundedRows(codes, scale, x.dtype))


def _numbers(rows: RoundedRows) -> Tensor:
    """What the codes mean, in the dtype of what was rounded."""
    scale = rows.scale.view(rows.shape[0], -1)
    groups = rows.codes.float().unflatten(1, (scale.shape[1], -1))
    return (groups * scale[..., None]).flatten(1).to(rows.dtype)


def _rotate(
    case: OperationCase, normal: Callable[..., Tensor], generator: torch.Generator, dtype: torch.dtype
) -> Problem:
    head_dim, rotary_dim = case.width, case.rotary_dim or case.width
    spec = AttentionSpec(8, 2, head_dim, dtype, dtype, 16, head_dim**-0.5)
    qkv = normal(case.tokens, (spec.q_heads + 2 * spec.kv_heads) * head_dim)
    positions = torch.randint(0, 200, (case.tokens,), generator=generator)
    table = rotary_table(200, rotary_dim)
    weights = [1 + 0.1 * normal(head_dim) if case.norms else None for _ in range(2)]
    heads = qkv.view(case.tokens, -1, head_dim)
    q, k, v = heads.split([spec.q_heads, spec.kv_heads, spec.kv_heads], dim=1)

    def wanted(x: Tensor, weight: Tensor | None) -> Tensor:
        normed = x.double() if weight is None else oracle.rms_norm(x, weight, EPS)
        return oracle.rotate_half(normed, positions, table, rotary_dim)

    def run(operations: Operations, at: torch.device) -> tuple[Tensor, ...]:
        q_norm, k_norm = (w if w is None else w.to(at) for w in weights)
        rotation = Rotation(Rotary(table.to(at), rotary_dim), q_norm, k_norm, EPS)
        return operations.rotate(qkv.to(at), positions.to(at), rotation, spec)

    return Problem(run, (wanted(q, weights[0]), wanted(k, weights[1]), v.double()), ("q", "k", "v"))
