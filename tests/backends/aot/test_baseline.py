"""The ahead-of-time baseline: what turns it red, and that a real kernel goes through it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backbench.backends.aot import baseline
from backbench.backends.aot.baseline import (
    PortabilityRow,
    arithmetic,
    better,
    compile_all,
    compile_row,
    kernels_of,
    regressions,
    summary,
)
from backbench.backends.aot.compile import TARGETS, Resources
from backbench.backends.interface import KernelCase
from backbench.errors import BackendError
from backbench.harness.cli import run_command
from backbench.harness.commands.portability import compared

ROW = PortabilityRow("attention/decode", "bf16", "sm90", 200, 0, 70_000, 32, "bf16")


def compiled(**facts: Any) -> Any:
    base: dict[str, Any] = {
        "registers": 100, "spill_bytes": 0, "shared_bytes": 1000, "matrix_instructions": 4,
        "kinds": ("v_mfma_f32_32x32x8_bf16_1k",), "text": "",
    }  # fmt: skip
    return lambda target: Resources(target, **base | facts)


def best(*rows: PortabilityRow) -> dict[str, dict[str, Any]]:
    return better(rows, {})


def test_a_summary_counts_each_target_alone() -> None:
    spilling = replace(ROW, kernel="other", spill_bytes=8)
    refused = replace(ROW, kernel="third", refused="no fp8 there")
    found = summary(best(ROW, spilling, refused))
    assert found["sm90"] == {
        "kernels": 2, "refused": 1, "problems": 0, "spilling": 1, "most_spill_bytes": 8
    }  # fmt: skip
    assert found["gfx942"]["kernels"] == 0


def test_what_is_as_good_as_the_best_is_quiet() -> None:
    assert not list(regressions([ROW], best(ROW)))
    assert not list(regressions([replace(ROW, shared_bytes=1)], best(ROW)))
    assert not list(regressions([ROW], {}))


@pytest.mark.parametrize(
    ("worse", "message"),
    [
        (replace(ROW, spill_bytes=8), "spills 8 bytes, 0 before"),
        (replace(ROW, shared_bytes=70_001), "takes shared memory of 70001 bytes, 70000 before"),
        (replace(ROW, matrix_instructions=0), "no matrix instruction, 32 before"),
        (replace(ROW, problem="does not compile: X"), "does not compile: X"),
    ],
)
def test_a_planted_regression_is_named_with_its_row(worse: PortabilityRow, message: str) -> None:
    (line,) = regressions([worse], best(ROW))
    assert line == f"attention/decode bf16 sm90: {message}"


def test_the_baseline_only_gets_better() -> None:
    smaller = replace(ROW, shared_bytes=60_000)
    kept = better([replace(ROW, spill_bytes=99)], best(ROW))
    assert kept == best(ROW)
    assert better([smaller], kept)[ROW.key]["shared_bytes"] == 60_000
    assert ROW.key not in better([replace(ROW, problem="does not fit")], {})


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"shared_bytes": 65 * 1024}, "takes 66560 bytes of shared memory, gfx942 has 65536"),
        (
            {"overwritten": ("0x10 MOV writes R40", "0x20 MOV writes R41")},
            "0x10 MOV writes R40 of a product in flight (2 such)",
        ),
        ({"matrix_instructions": 0, "kinds": ()}, "uses no matrix instruction: falls to plain multiply-adds"),
    ],
)
def test_an_oversized_tile_and_a_silent_fall_are_problems(
    facts: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "compile_launch", lambda resources, target: resources)
    assert compile_row(KernelCase("k", "bf16", True, compiled(**facts)), "gfx942").problem == problem
    assert not compile_row(KernelCase("k", "bf16", True, compiled()), "gfx942").problem


def test_a_compiler_error_is_the_rows_problem_and_a_refusal_is_not() -> None:
    def fail(target: str) -> Any:
        raise ValueError("no such type\nsecond line")

    row = compile_row(KernelCase("k", "fp8", True, fail), "sm80")
    assert row.problem == "does not compile: ValueError: no such type"
    refused = compile_row(KernelCase("k", "fp8", True, fail, lambda target: ["no fp8"]), "sm80")
    assert refused.refused == "no fp8" and not refused.problem


@pytest.mark.parametrize(
    ("instruction", "inputs"),
    [
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "bf16"),
        ("wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3", "fp8"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "fp16"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "tf32"),
        ("tcgen05.mma.cta_group::1.kind::f16", "16-bit"),
        ("v_mfma_f32_32x32x8_bf16_1k", "bf16"),
        ("v_mfma_f32_16x16x16_f16", "fp16"),
        ("v_mfma_f32_16x16x32_fp8_fp8", "fp8"),
        ("v_mfma_f32_16x16x4_f32", "fp32"),
        ("v_wmma_f32_16x16x16_f16", "fp16"),
    ],
)
def test_fp8_that_became_fp16_maths_shows(instruction: str, inputs: str) -> None:
    assert arithmetic(instruction) == inputs


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(BackendError, match="sm90"):
        compile_all("triton", ["sm42"])


def test_a_backend_without_kernels_is_said_and_each_set_counts_once() -> None:
    with pytest.raises(BackendError, match="'torch' launches no Triton kernels"):
        kernels_of(["torch"])
    assert list(kernels_of()) == ["triton"], "rocm launches triton's"
    assert list(kernels_of(["rocm"])) == ["rocm"]


@pytest.mark.slow
def test_a_filter_that_matches_nothing_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["portability", "--targets", "sm90", "--processes", "1", "--only", "nosuch"]
    assert run_command(arguments) == 2
    assert "No kernel of triton is named like 'nosuch' on sm90" in capsys.readouterr().err


def test_an_update_of_everything_drops_the_rows_of_kernels_that_are_gone(tmp_path: Path) -> None:
    file, gone = tmp_path / "best.json", replace(ROW, kernel="gone")
    for rows, whole, kept in (([gone], False, {gone.key}), ([ROW], False, {gone.key, ROW.key})):
        assert compared(rows, file, update=True, accept=False, whole=whole) == []
        assert set(json.loads(file.read_text())["rows"]) == kept
    compared([ROW], file, update=True, accept=False, whole=True)
    assert set(json.loads(file.read_text())["rows"]) == {ROW.key}


def test_the_committed_baseline_covers_every_target() -> None:
    stored = json.loads((Path(__file__).parents[3] / "backends/triton/portability.json").read_text())
    assert {key.rsplit(" ", 1)[1] for key in stored["rows"]} == set(TARGETS)
    assert not any(facts["problem"] for facts in stored["rows"].values())


@pytest.mark.slow
def test_a_real_kernel_is_compiled_judged_and_turns_red(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "best.json"
    arguments = ["portability", "--targets", "sm90,gfx942", "--only", "operations/gate fp16"]
    arguments += ["--baseline", str(file), "--json"]
    assert run_command([*arguments, "--update"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["kernel"], row["target"]) for row in rows] == [
        ("operations/gate", "sm90"),
        ("operations/gate", "gfx942"),
    ]
    stored = json.loads(file.read_text())
    stored["rows"]["operations/gate fp16 gfx942"]["spill_bytes"] = -4
    file.write_text(json.dumps(stored))
    assert run_command(arguments) == 1
    assert "worse: operations/gate fp16 gfx942: spills 0 bytes, -4 before" in capsys.readouterr().err
