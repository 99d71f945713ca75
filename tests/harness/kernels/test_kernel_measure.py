"""Single operations: their byte and FLOP counts, their checks, and what is printed."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backbench.backends import registry
from backbench.backends.conformance.scenario import Row
from backbench.backends.interface import Backend, Batch, Device, device
from backbench.backends.quantization import SCHEMES
from backbench.backends.torch.attention import TorchAttention, TorchRunner
from backbench.engine.models.checkpoint import find_model
from backbench.errors import HarnessError
from backbench.harness.cli import run_command
from backbench.harness.kernels import page
from backbench.harness.kernels.attention import Geometry, attention_problem
from backbench.harness.kernels.linear import linear_problems
from backbench.harness.kernels.measure import Cell, KernelResult, measure, roofline_s
from backbench.harness.kernels.operations import operation_problems
from backbench.harness.kernels.problem import MAX_CALLS, rotations
from backbench.harness.kernels.timing import Timing, time_eager
from backbench.reports.metrics.roofline import Peaks

GEOMETRY = Geometry(8, 2, 64, 16, torch.float32)
PEAKS = Peaks(10e9, 1e12)


@pytest.fixture(scope="module")
def cpu() -> Device:
    return device.detect(prefer="cpu")


def run(problems: Any, backends: list[Backend], cpu: Device) -> list[KernelResult]:
    return list(measure(problems, backends, cpu, PEAKS, budget_s=0.001))


def test_bytes_and_flops_of_attention_are_counted_by_hand() -> None:
    decode = attention_problem((Row(1, 100),), GEOMETRY)
    assert decode.bytes == (2 * 100 * 2 * 64 + 2 * 8 * 64) * 4
    assert decode.flops == 4 * 100 * 8 * 64
    prompt = attention_problem((Row(3, 3),), GEOMETRY)
    assert prompt.flops == 4 * (1 + 2 + 3) * 8 * 64


def test_backends_side_by_side_are_right_and_timed(cpu: Device) -> None:
    problems = [
        attention_problem(rows, GEOMETRY) for rows in ((Row(1, 90), Row(1, 33)), (Row(1, 9), Row(20, 40)))
    ]
    results = run(problems, [registry.load("torch"), registry.load("sdpa")], cpu)
    assert [(r.problem.split()[0], r.backend, r.mode) for r in results] == [
        ("1q1s90_1q1s33", "torch", "eager"),
        ("1q1s90_1q1s33", "sdpa", "eager"),
        ("1q1s9_1q20s40", "torch", "eager"),
        ("1q1s9_1q20s40", "sdpa", "eager"),
    ]
    for result in results:
        assert result.correct and result.timing
        assert result.timing.low_s <= result.timing.median_s <= result.timing.high_s
        assert result.bytes_per_s == result.bytes / result.timing.median_s


def test_a_wrong_kernel_is_marked_wrong_beside_its_time(cpu: Device) -> None:
    class Short(TorchRunner):
        def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
            super().run(q, cache, replace(batch, seq_lens=batch.seq_lens - 1), out)

    class ShortAttention(TorchAttention):
        def open(self, spec: Any, device: Device) -> TorchRunner:
            return Short(spec, device)

    problem = attention_problem((Row(1, 50),), GEOMETRY)
    (result,) = run([problem], [Backend("short", "", ShortAttention())], cpu)
    assert result.correct is False and result.timing is not None
    assert "WRONG" in page.error_text(result)


def test_a_kernel_that_raises_costs_its_own_cell_only(cpu: Device) -> None:
    class Raises(TorchRunner):
        def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
            raise ValueError("no kernel image")

    class RaisesAttention(TorchAttention):
        def open(self, spec: Any, device: Device) -> TorchRunner:
            return Raises(spec, device)

    problem = attention_problem((Row(1, 50),), GEOMETRY)
    broken, fine = run([problem], [Backend("r", "", RaisesAttention()), registry.load("torch")], cpu)
    assert broken.note == "raised ValueError: no kernel image" and broken.correct is False
    assert fine.correct and fine.timing


def test_linear_and_fused_operations_of_a_model(cpu: Device) -> None:
    config = find_model("tiny").config
    problems = [
        *linear_problems(config, (1, 3), torch.float32),
        *operation_problems(config, (2,), torch.float32),
    ]
    results = run(problems, [registry.load("torch"), registry.load("sdpa")], cpu)
    own = [r for r in results if r.backend == "torch"]
    assert all(r.correct for r in own) and len(own) == len(problems)
    assert all(r.note.endswith("served by torch") for r in results if r.backend == "sdpa")
    first = next(r for r in own if r.problem.startswith("qkv"))
    n, k = config.qkv_size, config.hidden_size
    assert first.flops == 2 * n * k and first.bytes == 4 * (n * k + k + n)


def test_quantized_weights_have_their_own_bytes_and_are_right(cpu: Device) -> None:
    config = find_model("tiny").config
    names = ("none", *SCHEMES)
    problems = [each for each in linear_problems(config, (3,), torch.float32, names) if "down" in each.name]
    assert [each.name.split(" m3")[1].strip() for each in problems] == ["", *SCHEMES]
    n, k = 256, 640
    rows = 4 * 3 * (n + k)
    assert problems[0].bytes == 4 * n * k + rows
    by_name = dict(zip(names, problems, strict=True))
    assert by_name["int8"].bytes == n * k + 4 * n + rows
    assert by_name["int4-g128"].bytes == n * k // 2 + 4 * n * k // 128 + rows
    assert by_name["nvfp4"].bytes == n * k // 2 + n * k // 16 + 4 * n + rows
    results = run(problems, [registry.load("torch"), registry.load("triton")], cpu)
    assert all(r.correct for r in results if r.backend == "torch"), results
    assert roofline_s(by_name["int8"], Peaks(1e15, 1e6)) == pytest.approx(by_name["int8"].flops / 1e6)
    rounded = by_name["int8-w8a8"]
    assert roofline_s(rounded, Peaks(1e15, 1e6)) == pytest.approx(rounded.bytes / 1e15)


def test_a_weight_that_does_not_divide_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    model = "shape:llama-2-7b"  # 11,008 input features of `down`, 86 groups of 128
    assert list(linear_problems(find_model(model).config, (1,), torch.float32, ("int4-g128",)))
    config = replace(find_model("tiny").config, ffn_size=650)
    with pytest.raises(HarnessError, match="down cannot be int4-g128: 650 input features"):
        list(linear_problems(config, (1,), torch.float32, ("int4-g128",)))


def test_the_roofline_is_the_slower_of_both_peaks() -> None:
    problem = attention_problem((Row(1, 100),), GEOMETRY)
    assert roofline_s(problem, PEAKS) == pytest.approx(problem.bytes / 10e9)
    assert roofline_s(problem, Peaks(1e15, 1e6)) == pytest.approx(problem.flops / 1e6)
    assert roofline_s(problem, Peaks()) is None


def test_calls_rotate_until_their_data_is_cold(cpu: Device) -> None:
    assert rotations(cpu, 1) == MAX_CALLS
    assert rotations(cpu, 2**33) == 2
    assert 2 < rotations(cpu, 16 * 2**20) < MAX_CALLS
    made: list[int] = []
    timing = time_eager([lambda: made.append(0), lambda: made.append(1)], cpu, 0.0)
    assert made[:4] == [0, 1, 0, 1] and timing.rounds >= 7


def test_a_bar_much_longer_than_the_shortest_is_cut_and_says_by_how_much() -> None:
    def timed(backend: str, median_s: float) -> KernelResult:
        timing = Timing(median_s, median_s, median_s, 7)
        return KernelResult("attention", "p", "float32", backend, "eager", 1, 1, timing, correct=True)

    drawn = page.to_html([timed("slow", 3.4e-3), timed("near", 2e-4), timed("fast", 1e-4)], {"Device": "d"})
    assert re.findall(r'class="row( cut)?"', drawn) == ["", "", " cut"]
    assert re.findall(r'style="width: ([\d.]+)%', drawn) == ["25.0", "50.0", "100.0"]
    assert re.findall(r'class="factor">([^<]+)<', drawn) == ["1.00×", "2.00×", "34.0×"]


def test_the_command_writes_json_csv_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, drawn = tmp_path / "rows.csv", tmp_path / "page.html"
    arguments = ["kernels", "--backend", "torch,sdpa,triton", "--shapes", "2q1s64,1q16", "--model", "tiny"]
    arguments += [
        "--device",
        "cpu",
        "--seconds",
        "0.001",
        "--json",
        "--csv",
        str(written),
        "--html",
        str(drawn),
    ]
    assert run_command(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader(io.StringIO(written.read_text())))
    assert len(rows) == len(printed["rows"]) == 6
    assert {row["backend"] for row in rows} == {"torch", "sdpa", "triton"}
    assert all(row["correct"] == "True" for row in rows if row["backend"] != "triton")
    html = drawn.read_text()
    assert "2q1s64" in html and "needs an NVIDIA or AMD GPU" in html and "http" not in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "8x1"], "not like 8q1s32k"),
        (["--kinds", "attn"], "Unknown kind 'attn'"),
        (["--tokens", "0"], "whole numbers from 1"),
        (["--dtype", "int4"], "not 'int4'"),
        (["--backend", "torhc"], "did you mean torch"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["kernels", "--device", "cpu", "--model", "tiny", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_what_is_compared_takes_turns_and_the_list_is_measured_twice(
    monkeypatch: pytest.MonkeyPatch, cpu: Device
) -> None:
    log: list[str] = []
    one_round = Cell.one_round

    def logged(cell: Cell) -> None:
        log.append(cell.problem.name[0] + cell.backend.name)
        one_round(cell)

    monkeypatch.setattr(Cell, "one_round", logged)
    problems = [attention_problem((Row(1, 20),) * count, GEOMETRY) for count in (1, 2)]
    backends = [replace(registry.load("torch"), name=name) for name in "AB"]
    results = run(problems, backends, cpu)
    assert log[:8] == ["1A", "1B", "1B", "1A", "1B", "1A", "1A", "1B"]
    assert [each[0] for each in log] == ["1"] * 8 + ["2"] * 16 + ["1"] * 8
    assert log[16:24] == ["2B", "2A", "2A", "2B", "2A", "2B", "2B", "2A"]
    assert [result.timing and result.timing.rounds for result in results] == [8] * 4


def test_an_interval_covers_a_drift_between_the_passes(monkeypatch: pytest.MonkeyPatch, cpu: Device) -> None:
    """Launches of one round agree within a percent; the machine is half as fast in the second pass."""
    from backbench.harness.kernels import timing

    drifting = iter([1.0e-3] * 5 + [1.5e-3] * 5)
    monkeypatch.setattr(timing.Stopwatch, "round", lambda self: next(drifting))
    (result,) = run([attention_problem((Row(1, 20),), GEOMETRY)], [registry.load("torch")], cpu)
    assert result.timing is not None
    assert result.timing.low_s == 1.0e-3 and result.timing.high_s == 1.5e-3


def test_a_large_call_on_a_cpu_is_announced_and_one_past_the_memory_refused(
    cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backbench.errors import HarnessError
    from backbench.harness.kernels import cost

    small = attention_problem((Row(1, 20),), GEOMETRY)
    large = attention_problem((Row(1, 32768),) * 64, replace(GEOMETRY, kv_heads=8))
    assert cost.warning([small], 2, cpu, PEAKS) == ""
    assert "16.0 GiB on a CPU" in cost.warning([small, large], 2, cpu, PEAKS)
    slow = cost.warning([small], 2, cpu, Peaks(1e6, 1e6))
    assert slow.startswith("this takes about ") and "min on a CPU" in slow
    cost.require_memory([small], cpu)
    monkeypatch.setattr(cost, "free_bytes", lambda device: 2**30)
    with pytest.raises(HarnessError, match="needs about 16"):
        cost.require_memory([large], cpu)


def test_the_block_size_is_the_engines_own(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []

    def prepare(rows: Any, geometry: Geometry, *_: Any) -> list[str]:
        seen.append(geometry.block_size)
        return ["no"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backbench.harness.kernels.attention.prepare", prepare)
        for given in ([], ["--block-size", "32"]):
            assert (
                run_command(["kernels", "--device", "cpu", "--model", "tiny", "--shapes", "1q8", *given]) == 0
            )
    capsys.readouterr()
    assert set(seen) == {16, 32}
