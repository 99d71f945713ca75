"""The checks pass for the torch backend and catch every planted fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from backbench.backends.conformance import Status, check, check_backend
from backbench.backends.conformance.attention_cases import (
    BLOCK_SIZES,
    GROUPS,
    HEAD_DIMS,
    full_cases,
    quick_cases,
)
from backbench.backends.conformance.attention_check import AttentionChecker
from backbench.backends.conformance.matrix import CheckRow
from backbench.backends.interface import (
    Attention,
    AttentionSpec,
    Backend,
    Batch,
    Device,
    Rotation,
    RoundedRows,
    device,
)
from backbench.backends.quantization import rounded_heads, rounded_rows
from backbench.backends.torch import BACKEND
from backbench.backends.torch.attention import TorchAttention, TorchRunner
from backbench.backends.torch.linear import TorchLinear
from backbench.backends.torch.operations import TorchOperations
from backbench.errors import BackendError


@pytest.fixture(scope="module")
def cpu() -> Device:
    return device.detect(prefer="cpu")


def test_torch_passes_the_quick_level_in_fp32_and_bf16(cpu: Device) -> None:
    matrix = check("torch", cpu)
    assert matrix.ok, "\n".join(matrix.lines())
    assert {row.dtype for row in matrix.rows} == {"float32", "bfloat16"}
    assert {row.operation for row in matrix.rows} == {"attention", "linear", "operations"}
    assert matrix.counts()["pass"] > 100


def test_the_matrix_survives_json_and_says_what_was_refused(cpu: Device) -> None:
    matrix = check("torch", cpu, dtypes=[torch.float32])
    stored = json.loads(json.dumps(matrix.to_json()))
    assert stored["counts"] == matrix.counts()
    refused = [row for row in stored["rows"] if row["status"] == "refused"]
    assert refused and all(row["detail"] for row in refused)


def test_the_levels_cover_every_head_size_ratio_and_block_size() -> None:
    for cases in (list(quick_cases(torch.float32)), list(full_cases(torch.float32))):
        specs = [case.spec for case in cases]
        assert {spec.head_dim for spec in specs} == set(HEAD_DIMS)
        assert {spec.q_heads // spec.kv_heads for spec in specs} == set(GROUPS)
        assert {spec.block_size for spec in specs} == set(BLOCK_SIZES)
    crossed = {(c.spec.head_dim, c.spec.q_heads // c.spec.kv_heads) for c in full_cases(torch.float32)}
    assert crossed >= {(d, g) for d in HEAD_DIMS for g in GROUPS}


def test_an_unknown_level_is_one_line(cpu: Device) -> None:
    with pytest.raises(BackendError, match="quick or full"):
        check("torch", cpu, level="slow")


def test_an_unsupported_dtype_is_refused_with_the_reason(cpu: Device) -> None:
    matrix = check("torch", cpu, dtypes=[torch.float64])
    assert {row.status for row in matrix.rows} == {Status.REFUSED}
    assert all("float64" in row.detail for row in matrix.rows)


def test_an_operation_left_to_the_base_is_said_to_be(cpu: Device) -> None:
    matrix = check_backend(Backend("thin", "", attention=TorchAttention()), cpu, dtypes=[torch.float32])
    inherited = {row.operation for row in matrix.rows if row.status is Status.INHERITED}
    assert inherited == {"linear", "operations"}


class Faulty(Attention):
    """Torch's attention with one thing wrong."""

    name = "faulty"

    def __init__(self, runner: type[TorchRunner], spoil: Callable[[AttentionSpec], AttentionSpec]) -> None:
        self.runner = runner
        self.spoil = spoil

    def refusals(self, spec: AttentionSpec, device: Device) -> list[str]:
        return []

    def open(self, spec: AttentionSpec, device: Device) -> TorchRunner:
        return self.runner(self.spoil(spec), device)


class ShortByOne(TorchRunner):
    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        super().run(q, cache, replace(batch, seq_lens=(batch.seq_lens - 1).clamp(min=1)), out)


class SwappedKeysAndValues(TorchRunner):
    def write(self, cache: Any, k: Tensor, v: Tensor, batch: Batch) -> None:
        super().write(cache, v, k, batch)


class UnwrittenRow(TorchRunner):
    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        kept = out[0].clone()
        super().run(q, cache, batch, out)
        out[0] = kept


class WrongHeadStride(TorchRunner):
    """Reads the keys as if heads came before slots within a block."""

    def write(self, cache: Any, k: Tensor, v: Tensor, batch: Batch) -> None:
        super().write(cache, k.transpose(0, 1).reshape(k.shape), v, batch)


class WritesPadding(TorchRunner):
    """Slot -1 lands in slot 0 of the cache."""

    def write(self, cache: Any, k: Tensor, v: Tensor, batch: Batch) -> None:
        super().write(cache, k, v, replace(batch, slots=batch.slots.clamp(min=0)))


class StaleLastBlock(TorchRunner):
    """Reads one block too many and lets what lies there through."""

    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        super().run(q, cache, batch, out)
        size = self.spec.block_size
        last = int(batch.seq_lens[0]) - 1
        beyond = (int(batch.block_table[0, last // size]) * size + (last + 1) % size) % (
            len(cache.values) - 1
        )
        out[0, 0] += 0 * cache.values[beyond, 0]


class LogicalBlocks(TorchRunner):
    """Forgets the block table."""

    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        ordered = torch.arange(batch.block_table.numel(), dtype=torch.int32) % len(cache.blocks()[0])
        super().run(q, cache, replace(batch, block_table=ordered.view_as(batch.block_table)), out)


class ForgetsTheCopy(TorchRunner):
    def copy_blocks(self, cache: Any, src: Tensor, dst: Tensor) -> None:
        pass


class NotInvariant(TorchRunner):
    """The company decides the last bits."""

    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        super().run(q, cache, batch, out)
        out *= 1 + 2e-7 * batch.num_seqs


class NoLongContext(TorchRunner):
    """Drops the keys past 512, as a split that is never reduced would."""

    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        super().run(q, cache, replace(batch, seq_lens=batch.seq_lens.clamp(max=512)), out)


class Cut(TorchRunner):
    """Sees 1,024 keys at most, where `cuts` says so."""

    def cuts(self, batch: Batch) -> bool:
        return batch.num_decodes == batch.num_seqs

    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        if self.cuts(batch):
            batch = replace(batch, seq_lens=batch.seq_lens.clamp(max=1024))
        super().run(q, cache, batch, out)


class CutPrompts(Cut):
    def cuts(self, batch: Batch) -> bool:
        return batch.num_decodes < batch.num_seqs


def unchanged(spec: AttentionSpec) -> AttentionSpec:
    return spec


FAULTS: dict[str, tuple[type[TorchRunner], Callable[[AttentionSpec], AttentionSpec], str]] = {
    "scale 2 % off": (TorchRunner, lambda spec: replace(spec, scale=1.02 * spec.scale), "values"),
    "window one too wide": (
        TorchRunner,
        lambda spec: replace(spec, window=spec.window + 1 if spec.window else None),
        "window",
    ),
    "softcap ignored": (TorchRunner, lambda spec: replace(spec, softcap=None), "softcap"),
    "length short by one": (ShortByOne, unchanged, "decode"),
    "K and V swapped": (SwappedKeysAndValues, unchanged, "decode"),
    "wrong head stride": (WrongHeadStride, unchanged, "decode"),
    "unwritten output row": (UnwrittenRow, unchanged, "decode"),
    "padding written": (WritesPadding, unchanged, "padding"),
    "reads past the end": (StaleLastBlock, unchanged, "decode"),
    "block table ignored": (LogicalBlocks, unchanged, "decode"),
    "copy forgotten": (ForgetsTheCopy, unchanged, "fork"),
    "company changes bits": (NotInvariant, unchanged, "invariance"),
    "long contexts cut": (NoLongContext, unchanged, "long"),
    "decodes see 1,024 keys": (Cut, unchanged, "long decode 5000"),
    "prompts see 1,024 keys": (CutPrompts, unchanged, "long prefix 4500"),
    "windows end at 2,048": (
        TorchRunner,
        lambda spec: replace(spec, window=min(spec.window, 2048) if spec.window else None),
        "window2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_planted_attention_fault_is_caught(fault: str, dtype: torch.dtype, cpu: Device) -> None:
    runner, spoil, where = FAULTS[fault]
    if fault == "company changes bits" and dtype == torch.bfloat16:
        pytest.skip("a change of 1e-7 is below bf16's resolution")
    backend = Backend("faulty", "", attention=Faulty(runner, spoil))
    wrong = check_backend(backend, cpu, dtypes=[dtype]).wrong
    assert any(where in row.case or where == "values" for row in wrong), [row.case for row in wrong]
    assert all(row.detail for row in wrong)


class NeighbourScale(TorchRunner):
    """A key has the scale of the token before it."""

    def write(self, cache: Any, k: Tensor, v: Tensor, batch: Batch) -> None:
        super().write(cache, k, v, batch)
        slots = batch.slots[: len(k)]
        cache.key_scales[slots] = cache.key_scales[slots].roll(1, 0)


class NeighbourHeadRead(TorchRunner):
    """Attention multiplies weights by the scale of the next head; what reads the cache back does not."""

    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        super().run(q, replace(cache, value_scales=cache.value_scales.roll(1, 1)), batch, out)


class SwappedScales(TorchRunner):
    def write(self, cache: Any, k: Tensor, v: Tensor, batch: Batch) -> None:
        swapped = replace(cache, key_scales=cache.value_scales, value_scales=cache.key_scales)
        super().write(swapped, k, v, batch)


class SwappedScalesRead(TorchRunner):
    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        swapped = replace(cache, key_scales=cache.value_scales, value_scales=cache.key_scales)
        super().run(q, swapped, batch, out)


class CodesWithoutScales(TorchRunner):
    """A block is copied, but not its scales."""

    def copy_blocks(self, cache: Any, src: Tensor, dst: Tensor) -> None:
        super().copy_blocks(replace(cache, key_scales=None, value_scales=None), src, dst)


class PaddedScales(TorchRunner):
    """Padding's codes go nowhere, its scales to slot 0."""

    def write(self, cache: Any, k: Tensor, v: Tensor, batch: Batch) -> None:
        super().write(cache, k, v, batch)
        for scales, x in ((cache.key_scales, k), (cache.value_scales, v)):
            padding = batch.slots[: len(x)] < 0
            scales[0] = rounded_heads(x[padding])[1][-1] if bool(padding.any()) else scales[0]


class StaleScale(TorchRunner):
    """The last token of each write keeps the scale that was there."""

    def write(self, cache: Any, k: Tensor, v: Tensor, batch: Batch) -> None:
        kept = cache.value_scales[batch.slots[len(k) - 1]].clone()
        super().write(cache, k, v, batch)
        cache.value_scales[batch.slots[len(k) - 1]] = kept


SCALE_FAULTS: dict[str, tuple[type[TorchRunner], str, str]] = {
    "scale of the neighbour token": (NeighbourScale, "mixed", "values"),
    "scale of the neighbour head": (NeighbourHeadRead, "decode", "values"),
    "K and V scales swapped as written": (SwappedScales, "decode", "values"),
    "K and V scales swapped as read": (SwappedScalesRead, "decode", "values"),
    "copied without scales": (CodesWithoutScales, "decode", "fork"),
    "padding's scale written": (PaddedScales, "mixed", "padding"),
    "scale not written": (StaleScale, "decode", "values"),
}


@pytest.mark.parametrize("fault", SCALE_FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_planted_fault_of_scales_is_caught(fault: str, dtype: torch.dtype, cpu: Device) -> None:
    assert BACKEND.attention is not None and BACKEND.operations is not None
    runner, shape, kind = SCALE_FAULTS[fault]
    case = next(
        case
        for case in quick_cases(dtype)
        if case.spec.scaled and case.kind == kind and shape in case.name and case.spec.window is None
    )
    for attention, status in (
        (Faulty(TorchRunner, unchanged), Status.PASS),
        (Faulty(runner, unchanged), Status.WRONG),
    ):
        row = AttentionChecker(attention, BACKEND.operations, BACKEND.attention, cpu).check(case)
        assert row.status is status, row.detail
        assert "raised" not in row.detail


def test_batch_invariance_is_only_demanded_where_it_is_declared(cpu: Device) -> None:
    class Honest(NotInvariant):
        batch_invariant = False

    backend = Backend("honest", "", attention=Faulty(Honest, unchanged))
    matrix = check_backend(backend, cpu, dtypes=[torch.float32])
    rows = [row for row in matrix.rows if row.case.startswith("invariance")]
    assert matrix.ok
    assert rows and all("bits differ" in row.detail for row in rows)


def test_an_exception_is_a_wrong_result_not_a_crash(cpu: Device) -> None:
    class Raises(TorchRunner):
        def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
            raise ValueError("no such kernel\nsecond line")

    matrix = check_backend(Backend("raises", "", Faulty(Raises, unchanged)), cpu, dtypes=[torch.float32])
    assert any(row.detail == "raised ValueError: no such kernel" for row in matrix.wrong)


class ForgetsBias(TorchLinear):
    def run(self, x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().run(x, packed)


class LowPrecision(TorchLinear):
    """Rounds the inputs to bf16, as TF32-like shortcuts do."""

    def run(self, x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().run(x.bfloat16().to(x.dtype), packed, bias)


@pytest.mark.parametrize("linear", [ForgetsBias(), LowPrecision()], ids=["bias", "precision"])
def test_a_planted_linear_fault_is_caught(linear: TorchLinear, cpu: Device) -> None:
    wrong = check_backend(Backend("faulty", "", linear=linear), cpu, dtypes=[torch.float32]).wrong
    assert {row.operation for row in wrong} == {"linear"}


class NormWithoutEps(TorchOperations):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x, weight - 1, eps)


class InterleavedRotary(TorchOperations):
    def rotate(self, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().rotate(qkv, *rest)
        return q.roll(1, -1), k, v


class LastMaximum(TorchOperations):
    def sample(self, logits: Tensor, sampling: Any) -> Tensor:
        if sampling.all_greedy:
            return logits.shape[-1] - 1 - logits.flip(-1).argmax(-1)
        return super().sample(logits, sampling)


class IgnoresFilters(TorchOperations):
    def sample(self, logits: Tensor, sampling: Any) -> Tensor:
        return super().sample(logits, replace(sampling, any_filter=False))


class OtherNoise(TorchOperations):
    def sample(self, logits: Tensor, sampling: Any) -> Tensor:
        return super().sample(logits, replace(sampling, noise_key=sampling.noise_key ^ 1))


@pytest.mark.parametrize(
    ("operations", "where"),
    [
        (NormWithoutEps(), "rms_norm"),
        (InterleavedRotary(), "rotate"),
        (LastMaximum(), "sample ties"),
        (IgnoresFilters(), "sample filters"),
        (OtherNoise(), "sample temperature"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_planted_operation_fault_is_caught(operations: TorchOperations, where: str, cpu: Device) -> None:
    wrong = check_backend(Backend("faulty", "", operations=operations), cpu, dtypes=[torch.float32]).wrong
    assert any(row.case.startswith(where) for row in wrong)


def test_norm_and_gate_that_leave_codes_are_checked(cpu: Device) -> None:
    class Rounding(TorchOperations):
        roundings = frozenset({"fp8-token"})
        fault = 1.0

        def rounded_gate(self, gate_up: Tensor, activation: str) -> RoundedRows:
            x = self.gate(gate_up)
            codes, scale = rounded_rows(x, activation)
            return RoundedRows(codes, self.fault * scale.flatten(), x.dtype)

        def rounded_add_rms_norm(
            self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, activation: str
        ) -> tuple[RoundedRows, Tensor]:
            normed, total = self.add_rms_norm(x, residual, weight, eps)
            codes, scale = rounded_rows(normed, activation)
            codes = codes.view(torch.uint8).roll(int(self.fault != 1), 1).view(codes.dtype)
            return RoundedRows(codes, scale.flatten(), x.dtype), total

    class Faulted(Rounding):
        fault = 1.25

    def rows(operations: TorchOperations) -> list[CheckRow]:
        backend = Backend("rounding", "", operations=operations)
        found = check_backend(backend, cpu, dtypes=[torch.float32]).rows
        return [row for row in found if "fp8-token" in row.case and row.operation == "operations"]

    assert {row.status for row in rows(Rounding())} == {Status.PASS}
    assert {row.status for row in rows(Faulted())} == {Status.WRONG}
    assert {row.case.split()[0] for row in rows(Faulted())} == {"add_rms_norm", "gate"}


def test_a_fused_write_is_compared_with_rotate_and_write(cpu: Device) -> None:
    class Fused(TorchRunner):
        fused_write = True
        forget_norm = False

        def rotate_and_write(
            self, qkv: Tensor, positions: Tensor, rotation: Rotation, cache: Any, batch: Batch
        ) -> Tensor:
            if self.forget_norm:
                rotation = replace(rotation, k_norm=None)
            assert BACKEND.operations is not None
            q, k, v = BACKEND.operations.rotate(qkv, positions, rotation, self.spec)
            self.write(cache, k, v, batch)
            return q

    class Forgetful(Fused):
        forget_norm = True

    def fused_row(runner: type[TorchRunner]) -> Any:
        backend = Backend("fused", "", attention=Faulty(runner, unchanged))
        rows = check_backend(backend, cpu, dtypes=[torch.bfloat16]).rows
        return next(row for row in rows if row.case.startswith("fused write"))

    assert fused_row(Fused).status is Status.PASS
    assert fused_row(Forgetful).status is Status.WRONG
    assert "K" in fused_row(Forgetful).detail
