"""The pages' tables are the figures that `benchmarks/` keeps, and each file says how they came about."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("h100-speculation", "h100x2-tensor-parallel", "h100-energy")
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
