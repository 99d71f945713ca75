"""The pages' tables are the figures that `benchmarks/` keeps, and each file says how they came about."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from backbench.backends.interface import Device, Scheme, WeightSpec
from backbench.backends.quantization import SCHEMES
from backbench.backends.triton import configs
from backbench.backends.triton.linear import TritonLinear
from backbench.backends.triton.quantized_configs import Way, choose, way
from benchmarks.quantized_gemm import SHAPES
from benchmarks.quantized_tiles import entries_of

ROOT = Path(__file__).parents[1]
FILES = ("h100-speculation", "h100x2-tensor-parallel", "h100-energy", "h100-quantized-tiles")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def kept(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


def table(page: str, first: str) -> dict[str, list[str]]:
    """Rows of the table whose first column is headed `first`: their first cell -> the others."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


def assert_is(cell: str, *values: float) -> None:
    """The cell's numbers are the values, rounded to the digits that it shows."""
    shown = [text.replace(",", "") for text in NUMBER.findall(cell)]
    assert len(shown) == len(values), cell
    for text, value in zip(shown, values, strict=True):
        digits = len(text.partition(".")[2])
        assert abs(float(text) - value) <= 0.5 * 10**-digits + 1e-9, (cell, value)


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_how_its_figures_came_about(name: str) -> None:
    conditions = kept(name)["conditions"]
    devices = conditions.get("devices") or [conditions["device"]]
    assert all(each == "NVIDIA H100 80GB HBM3" for each in devices)
    assert {"torch", "triton", "date", "method", "command"} <= conditions.keys()
    commands = conditions["command"]
    for command in commands.values() if isinstance(commands, dict) else [commands]:
        assert (ROOT / command.split()[1]).exists(), command


def test_speculation() -> None:
    data = kept("h100-speculation")
    rows = {row["name"]: row for row in data["rows"]}
    shown = table("speculation.md", "model, batch")
    assert len(shown) == len(rows)
    for name, (speed_up, at_length, asked, running, length, even, share) in shown.items():
        key = name.replace(", ", " bs")
        row = rows[f"{key} synthetic:2.5:4"]
        assert_is(speed_up, row["speed_up"], row["lowest"], row["highest"])
        assert_is(at_length, row["speed_up_at_asked_length"])
        assert_is(asked, data["asked"][key])
        assert_is(running, row["speed_up_full_batch"])
        assert_is(length, row["mean_length"])
        assert_is(even, row["break_even"])
        assert_is(share, 100 * row["drafted_share"])
    page = (ROOT / "docs" / "speculation.md").read_text()
    given = re.search(r"would give: ([\d., and]+\d)\.", page)
    assert given is not None
    bounds = [row["mean_length"] / row["break_even"] for row in data["rows"] if "bs256" not in row["name"]]
    assert_is(given[1], *bounds)
    ways = data["check"]["ways"]
    plain = [way for way in ways if way["steps"] == "captured" and way["speculate"] is None]
    assert data["check"]["passed"]
    assert all(way["same_tokens"] for way in ways)
    assert f"all {len(ways) - len(plain)} other ways" in page


def test_sums_between_two_devices() -> None:
    data = kept("h100x2-tensor-parallel")
    took = {(row["bytes"], row["served_by"]): row["us"] for row in data["sums"]}
    servers = ("triton, 64 programs", "NCCL", "torch one-shot", "torch two-shot")
    shown = table("several-devices.md", "a device's input")
    assert len(shown) == 9
    for name, cells in shown.items():
        count, unit = name.split()
        size = int(count) * {"KiB": 2**10, "MiB": 2**20}[unit]
        for cell, server in zip(cells, servers, strict=True):
            assert_is(cell, *(us for us in [took.get((size, server))] if us is not None))
    for each in data["conformance"].values():
        assert each["passed"] == each["cases"] == 138
    for each in data["identity"].values():
        assert each["identical"]
        assert each["tokens_alike"] == 256


def test_rows_over_two_devices() -> None:
    data = kept("h100x2-tensor-parallel")
    rows = {(row["name"], row["call"]): row["value"] for row in data["rows"]}
    names = {
        "TPOT ms, 1 x 128": "tpot_bs1_in128",
        "TPOT ms, 256 x 1024": "tpot_bs256_in1024",
        "nano256 tok/s": "nano256",
    }
    lines = (ROOT / "docs" / "performance.md").read_text().splitlines()
    found = [line for line in lines if re.match(r"\| qwen3-\w+ [Tn]", line) and line.count("|") == 7]
    assert len(found) == 5
    for line in found:
        title, one, before, after, speed_up, efficiency = (
            cell.strip() for cell in line.strip("|").split("|")
        )
        model, _, row = title.partition(" ")
        first = "first" if model == "qwen3-8b" else "second"
        values = [
            rows.get((f"engine/{model}/tp{tp}/{names[row]}", call))
            for tp, call in ((1, first), (2, first), (2, "third"))
        ]
        for cell, value in zip((one, before, after), values, strict=True):
            assert_is(cell, *([] if value is None else [value]))
        single, *double = values
        last = [value for value in double if value is not None][-1]
        ratio = [] if single is None else [last / single if "tok/s" in row else single / last]
        assert_is(speed_up, *ratio)
        assert_is(efficiency, *(50 * each for each in ratio))


def test_the_sums_share_of_a_step_is_computed_from_what_is_kept() -> None:
    data = kept("h100x2-tensor-parallel")
    page = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    steps = {row["name"]: row["value"] for row in data["rows"] if row["call"] == "third"}
    found = re.findall(
        r"([\d.]+) us and ([\d.]+) ms of ([\d.]+) \(([\d.]+) %\) at (?:a batch of )?(\d+)", page
    )
    assert [batch for *_, batch in found] == ["1", "256"]
    for us, ms, step, share, batch in found:
        size = int(batch) * 4096 * 2
        (sum_us,) = (
            row["us"]
            for row in data["sums"]
            if row["bytes"] == size and row["served_by"] == "triton, 32 programs"
        )
        total = steps[f"engine/qwen3-8b/tp2/tpot_bs{batch}_in{128 if batch == '1' else 1024}"]
        assert_is(us, sum_us)
        assert_is(ms, 72 * sum_us / 1e3)
        assert_is(step, total)
        assert_is(share, 100 * 72 * sum_us / 1e3 / total)


def times_of(rows: int, scheme: str, serving: Way) -> list[tuple[float, float]]:
    """What 28672x4096 took served so, and bf16's of the same call; what was measured last comes first."""
    found = [
        (each["us"], row["bf16_us"])
        for row in reversed(kept("h100-quantized-tiles")["rows"])
        if (row["rows"], row["shape"], row["scheme"]) == (rows, "28672x4096", scheme)
        for each in row["ways"]
        if way(each["way"]) == serving
    ]
    return found + [
        (row["us"], min(row["bf16_us"].values()))
        for row in kept("h100-quantized-gemm")["rows"]
        if row["name"] == f"quantized_gemm/28672x4096/m{rows}/{scheme}" and way(row["way"]) == serving
    ]


def test_quantized_products_are_shown_as_the_backend_serves_them() -> None:
    shown = table("quantization.md", "rows | bf16 | int4-g128 | int4-g32")
    names = ("int4-g128", "int4-g32", "nvfp4", "int8", "fp8")
    assert len(shown) == 9
    for rows, (bf16, *cells) in shown.items():
        dense = []
        for name, cell in zip(names, cells, strict=True):
            count = int(rows)
            serving = choose("sm90", 132, count, *SHAPES["28672x4096"], SCHEMES[name], torch.bfloat16)
            times = times_of(count, name, serving)[:1]
            assert_is(cell, *(number for us, other in times for number in (us, other / us)))
            dense += [other for _, other in times]
        assert any(abs(float(bf16) - us) <= (0.05 if "." in bf16 else 0.5) + 1e-9 for us in dense)


def test_up_to_how_many_rows_quantized_products_are_faster() -> None:
    device = Device("nvidia", "sm90", "H100", 132, 2**36, 227 * 1024, torch.device("cpu"))

    def rows(scheme: Scheme, shape: str) -> int:
        found = TritonLinear().crossover(WeightSpec(shape, *SHAPES[shape], scheme, torch.bfloat16), device)
        assert found is not None
        return found.faster_up_to

    shapes = ("28672x4096", "qkv", "attention_output", "gate_up", "down")
    shown = table("quantization.md", "faster up to")
    assert len(shown) == 4
    for name, cells in shown.items():
        assert [int(cell) for cell in cells] == [rows(SCHEMES[name.strip("`")], shape) for shape in shapes]
    assert [rows(SCHEMES["fp8"], shape) for shape in shapes] == [8192, 64, 64, 64, 64]


def test_the_tuning_table_has_what_was_measured_of_tiles() -> None:
    data = kept("h100-quantized-tiles")
    measured = {}
    for call in data["conditions"]["command"]:
        rows = [row for row in data["rows"] if row["call"] == call]
        assert rows and not any(row["wrong"] for row in rows)
        measured |= {entry.key: entry for entry in entries_of(tuple(data["place"]), rows)}
    known = configs.table(*data["place"]).entries
    assert len(measured) > 90
    assert {key: known[key] for key in measured} == measured
    page = " ".join((ROOT / "docs" / "quantization.md").read_text().split())
    assert f"of {len(data['rows'])} products was wrong" in page
    counts = kept("h100-quantized-checks")["conformance"]["counts"]
    assert counts["wrong"] == counts["refused"] == 0
    assert f"in all {counts['pass']} cases" in page


def test_energy() -> None:
    runs = kept("h100-energy")["runs"]
    measured, hidden = runs["nvml"], runs["hidden"]
    page = " ".join((ROOT / "docs" / "metrics.md").read_text().split())
    said = re.search(
        r"over ([\d.]+) s of steady load, .*? was ([\d.]+) and .*? ([\d.]+) % .*? (\d+) ms", page
    )
    assert said is not None
    (ratio,) = measured["counter_over_power"]
    values = (
        measured["steady_state_s"],
        ratio,
        100 * measured["sampler_cpu_share"],
        1e3 * measured["sampling_period_s"],
    )
    for text, value in zip(said.groups(), values, strict=True):
        assert_is(text, value)
    assert abs(ratio - 1) < 0.05
    assert hidden["joules_per_output_token"] is None
    assert hidden["reasons"]
    assert measured["faults"] == hidden["faults"] == measured["validity"] == hidden["validity"] == []
