"""What quantization costs, from the sums that a record keeps."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from backbench.reports.metrics.accuracy import METRICS, SUMS, summarised
from backbench.reports.metrics.metric import Missing
from backbench.reports.quantities import quantity, read
from backbench.reports.record import RunDirectory, RunRecord, sign
from backbench.reports.verify import examine, verify

OLD = Path(__file__).parents[1] / "fixtures" / "schema-1" / "torch"
SEQUENCES: dict[str, list[float]] = {
    "tokens": [10, 30],
    "nll": [22.0, 58.0],
    "nll_unquantized": [20.0, 56.0],
    "kl_divergence": [0.5, 0.3],
    "top1_agreements": [9, 21],
}


def test_numbers_are_means_over_tokens_not_over_sequences() -> None:
    found = summarised(SEQUENCES)
    values = {name: each["value"] for name, each in found.items() if name != "tokens"}
    assert values == pytest.approx(
        {
            "perplexity": math.exp(80 / 40),
            "perplexity_unquantized": math.exp(76 / 40),
            "perplexity_change": math.exp(4 / 40) - 1,
            "kl_divergence": 0.8 / 40,
            "top1_unchanged": 30 / 40,
        }
    )
    assert found["tokens"] == 40


def test_intervals_draw_whole_sequences_and_keep_pairs() -> None:
    """With two sequences a draw is one of three; a common loss a token has no spread, whatever the text's."""
    found = summarised(SEQUENCES)
    assert (found["kl_divergence"]["low"], found["kl_divergence"]["high"]) == pytest.approx((0.01, 0.05))
    alike = SEQUENCES | {"nll": [20.0 + 1.0, 56.0 + 3.0]}
    change = summarised(alike)["perplexity_change"]
    assert change["low"] == pytest.approx(change["high"]) == pytest.approx(math.exp(0.1) - 1)


def test_intervals_cover_the_mean_of_many_sequences() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        kl = random.gamma(4.0, 0.25, 32)
        each = {name: [1.0] * 32 for name in SUMS} | {"kl_divergence": kl.tolist()}
        found = summarised(each)["kl_divergence"]
        covered += found["low"] <= 1.0 <= found["high"]
    assert 85 <= covered <= 99  # 95, less what a percentile interval of 32 lacks; 3 sd of a binomial of 100


def test_one_sequence_has_no_interval() -> None:
    one = {name: values[:1] for name, values in SEQUENCES.items()}
    found = summarised(one)["perplexity"]
    assert found["value"] == pytest.approx(math.exp(2.2))
    assert (found["low"], found["high"], found["reason"]) == (None, None, "one sequence has no interval")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A measured run whose tables give its numbers; it is older than this section."""
    return RunDirectory.open(shutil.copytree(OLD, tmp_path / "run"))


def signed(run: RunDirectory, accuracy: dict[str, Any]) -> RunRecord:
    record = sign(run, replace(run.read_record(), accuracy=accuracy))
    run.write_record(record)
    return record


def test_verify_recomputes_them(run: RunDirectory) -> None:
    before = set(verify(run))
    whole = {"corpus": "a text", "sequences": SEQUENCES} | summarised(SEQUENCES)
    signed(run, whole)
    assert set(verify(run)) == before
    assert not any("accuracy." in each for each in examine(run).unchecked)
    signed(run, whole | {"kl_divergence": {"value": 0.001, "low": 0.01, "high": 0.05}})
    assert any(each.startswith("accuracy.kl_divergence.value is 0.001") for each in verify(run))
    signed(run, whole | {"sequences": SEQUENCES | {"nll": [20.0, 56.0]}})
    assert any(each.startswith("accuracy.perplexity_change.value") for each in verify(run))
    signed(run, whole | {"sequences": SEQUENCES | {"nll": [20.0]}})
    assert any("cannot be recomputed" in each for each in verify(run))


def test_a_run_without_says_why(run: RunDirectory) -> None:
    record = signed(run, {"reason": "nothing is quantized"})
    reading = read(record, quantity("accuracy", "kl_divergence"))
    assert (reading.value, reading.reason) == (None, "nothing is quantized")
    assert not [each for each in verify(run) if each.startswith("accuracy")]


def test_a_record_of_before_has_no_such_section(run: RunDirectory) -> None:
    record = replace(run.read_record(), accuracy={})
    text = sign(run, record).to_json().replace('"accuracy": {},', "")
    assert '"accuracy"' not in text
    (run.path / "run.json").write_text(text)
    assert run.read_record().accuracy == {}
    assert not [each for each in verify(run) if "digest" in each]


def test_nothing_kept_is_missing() -> None:
    run = SimpleNamespace(given={})
    for metric in METRICS:
        assert metric.compute is not None
        assert metric.compute(run) == Missing("not measured")  # type: ignore[arg-type]
