"""`bench run --speculate`: options, the record's section, its table, and what compares with what."""

from __future__ import annotations

from pathlib import Path

import pytest
from eagle3_fixtures import head_folder

from backbench.engine.models.checkpoint import find_model
from backbench.harness.cli import run_command
from backbench.reports.compare import incomparable
from backbench.reports.record import RunDirectory, RunRecord
from backbench.reports.tables import summary_rows
from backbench.reports.verify import examine

COMMON = ["run", "-w", "batch:2x24+24", "-b", "torch", "-m", "tiny-draft", "-q", "--no-check"]


def run(tmp_path: Path, name: str, *options: str) -> RunRecord:
    out = tmp_path / name
    run_command([*COMMON, *options, "--out", str(out)])
    assert examine(RunDirectory.open(out)).problems == ()
    return RunDirectory.open(out).read_record()


def test_the_record_tells_what_was_drafted(tmp_path: Path) -> None:
    record = run(tmp_path, "a", "--speculate", "synthetic:2.5:4", "--no-adaptive-drafts")
    section = record.speculation
    assert section["asked"] == section["synthetic"] == "synthetic:2.5:4" and section["sampling"] == "exact"
    assert section["drafts"] == sum(section["outcomes"]["drafts"]) > 0
    assert section["accepted_tokens"] + section["wasted_tokens"] == section["drafted_tokens"]
    assert 1 < section["mean_length"] < 5
    assert record.metrics["output_tokens"] == 48
    labels = {line.label for line in summary_rows(record)}
    assert {"Acceptance length, bonus included", "ICL p50"} <= labels
    assert "speculation-section" in (tmp_path / "a" / "report.html").read_text()
    assert any("acceptance was drawn" in reason for reason in record.validity)


def test_a_model_that_drafts_is_named_and_counted(tmp_path: Path) -> None:
    record = run(tmp_path, "a", "-m", "tiny", "--speculate", "draft:tiny-draft:2", "--no-adaptive-drafts")
    assert record.engine["draft_model"]["name"] == "tiny-draft"
    assert record.engine["draft_model"]["num_parameters"] < record.model["num_parameters"]
    assert record.speculation["accepted_tokens"] > 0 and 0 < record.speculation["draft_share"] < 1
    assert record.speculation["drafted_step_s"] > 0
    plain = run(tmp_path, "b", "-m", "tiny")
    assert "draft_model" not in plain.engine
    assert record.memory["weights_bytes"] > plain.memory["weights_bytes"]


def test_a_head_over_hidden_states_is_named_and_counted(tmp_path: Path) -> None:
    folder = head_folder(find_model("tiny").config)
    record = run(tmp_path, "a", "-m", "tiny", "--speculate", f"eagle3:{folder}:2", "--no-adaptive-drafts")
    assert record.engine["draft_model"]["num_parameters"] < record.model["num_parameters"]
    assert record.speculation["drafted_tokens"] > 0 and 0 < record.speculation["draft_share"] < 1
    plain = run(tmp_path, "b", "-m", "tiny")
    assert record.memory["weights_bytes"] > plain.memory["weights_bytes"]
    assert incomparable([record, plain]) == []


def test_drawn_acceptance_compares_with_its_like_alone(tmp_path: Path) -> None:
    plain = run(tmp_path, "plain")
    ngram = run(tmp_path, "ngram", "--speculate", "ngram:3")
    drawn = run(tmp_path, "drawn", "--speculate", "synthetic:2:3")
    again = run(tmp_path, "again", "--speculate", "synthetic:2:3")
    assert plain.speculation == {} and "synthetic" not in ngram.speculation
    assert incomparable([plain, ngram]) == []
    assert incomparable([drawn, again]) == []
    assert [each.field for each in incomparable([ngram, drawn])] == ["drawn acceptance"]


def test_a_model_that_drafts_must_speak_the_same_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_command([*COMMON, "--speculate", "draft:shape:qwen3-0.6b:2", "--out", str(tmp_path / "a")])
    error = capsys.readouterr().err
    assert code == 2 and "same vocabulary" in error and len(error) < 300
