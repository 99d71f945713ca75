"""`bench run --pp 2` end to end on the bundled model, on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from divided_runs import exit_code, lose_a_rank

from backbench.reports.record import RunDirectory
from backbench.reports.verify import verify

CLIENTS = ("--concurrency", "4")


def test_the_record_of_two_stages(tmp_path: Path) -> None:
    asked = tmp_path / "bench.toml"
    asked.write_text("pp = 2\n")
    assert exit_code(*CLIENTS, "--config", str(asked), "-o", str(tmp_path / "two")) == 0
    assert exit_code(*CLIENTS, "-o", str(tmp_path / "one")) == 0
    directory = RunDirectory.open(tmp_path / "two")
    record, one = directory.read_record(), RunDirectory.open(tmp_path / "one").read_record()
    assert verify(directory) == []
    assert record.correctness["passed"] is True and record.correctness["against_itself"] is False
    assert record.engine["pp"] == record.engine["max_steps_in_flight"] == 2
    assert record.engine["stages_served_by"] == "gloo" and "stage_layers" not in one.engine
    assert sum(record.engine["stage_layers"]) == 5
    last, first = record.memory["devices"]
    ends = record.engine["stage_layers"][0]
    assert (first["layers"], last["layers"]) == (f"0-{ends - 1}", f"{ends}-4")
    assert record.memory["weights_bytes"] == last["weights_bytes"]
    # The tied embedding is at both ends: it is looked up in the first, and the head of the last.
    table = 4096 * 256 * 4
    assert last["weights_bytes"] + first["weights_bytes"] == one.memory["weights_bytes"] + table
    shape, whole = (each.metrics["context"]["shape"] for each in (record, one))
    share = len(shape["windows"]) / 5
    assert len(shape["windows"]) == record.engine["stage_layers"][1]
    assert shape["linear_parameters"] == pytest.approx(share * whole["linear_parameters"])
    assert shape["kv_bytes_per_token"] == pytest.approx(share * whole["kv_bytes_per_token"])
    assert shape["head_parameters"] == whole["head_parameters"]


def test_a_lost_stage_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lose_a_rank("--pp", "2", *CLIENTS, folder=tmp_path / "run", monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--pp", "6"), "5 layers cannot be divided among 6 stages; use a lower --pp."),
        (("--pp", "2", "--collectives", "torch"), "--collectives is for several devices; give --tp as well."),
        (("--pp", "2", "--tp", "2"), "--tp and --pp divide a model in two ways; give one of them."),
        (("--pp", "2", "--speculate", "ngram:2"), "--speculate and --pp do not go together"),
        (("--pp", "0"), "--pp"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*CLIENTS, *arguments, "-o", str(tmp_path / "run")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line and len(line) < 300
