"""`bench run --tp 2` end to end on the bundled model, on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from divided_runs import exit_code, lose_a_rank

from backbench.reports.record import RunDirectory
from backbench.reports.verify import verify

CLIENTS = ("--concurrency", "2")


def test_the_record_of_two_devices(tmp_path: Path) -> None:
    assert exit_code(*CLIENTS, "--tp", "2", "-o", str(tmp_path / "two")) == 0
    assert exit_code(*CLIENTS, "-o", str(tmp_path / "one")) == 0
    directory = RunDirectory.open(tmp_path / "two")
    record, one = directory.read_record(), RunDirectory.open(tmp_path / "one").read_record()
    assert verify(directory) == []
    assert record.correctness["passed"] is True and record.correctness["against_itself"] is False
    assert record.engine["tp"] == 2 and "collectives" not in one.engine
    assert record.backend["used"]["collectives"] == "torch" and "collectives" not in one.backend["used"]
    assert record.engine["collectives"] == [
        {"operation": operation, "up_to_bytes": None, "served_by": "gloo"}
        for operation in ("all_reduce", "all_gather")
    ]
    held = [row["weights_bytes"] for row in record.memory["devices"]]
    assert len(held) == 2 and record.memory["weights_bytes"] == held[0]
    assert sum(held) == pytest.approx(one.memory["weights_bytes"], rel=0.05)
    shape, whole = (each.metrics["context"]["shape"] for each in (record, one))
    assert 2 * shape["q_heads"] == whole["q_heads"]
    assert 2 * shape["kv_bytes_per_token"] == whole["kv_bytes_per_token"]
    assert 2 * shape["linear_parameters"] == whole["linear_parameters"]


def test_a_model_that_drafts_counts_on_the_first_device(tmp_path: Path) -> None:
    drafting = ("--speculate", "draft:tiny-draft:2", "--no-adaptive-drafts")
    assert exit_code(*CLIENTS, "--tp", "2", *drafting, "-o", str(tmp_path / "run")) == 0
    record = RunDirectory.open(tmp_path / "run").read_record()
    assert record.correctness["passed"] is True
    assert record.engine["draft_model"]["name"] == "tiny-draft" and record.speculation["drafts"] > 0
    first, other = record.memory["devices"]
    assert first["weights_bytes"] == record.memory["weights_bytes"] > other["weights_bytes"]
    assert first["kv_pool_bytes"] == record.memory["kv_pool_bytes"] > other["kv_pool_bytes"]


def test_a_lost_rank_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lose_a_rank("--tp", "2", *CLIENTS, folder=tmp_path / "run", monkeypatch=monkeypatch, capsys=capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tp", "3"), "4 query heads and 2 KV heads cannot be divided among 3 devices; use another --tp."),
        (("--collectives", "torch"), "--collectives is for several devices; give --tp as well."),
        (("--tp", "2", "--collectives", "triton"), "needs an NVIDIA or AMD GPU"),
        (("--tp", "0"), "--tp"),
        (
            ("--tp", "2", "--speculate", "ngram:2", "--speculation-sampling", "rejection"),
            "with --tp leave out --speculation-sampling rejection",
        ),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*CLIENTS, *arguments, "-o", str(tmp_path / "run")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line and len(line) < 300
