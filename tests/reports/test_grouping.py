"""Runs pooled by what they share: pairs stay pairs, and what is not one configuration is no sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from backbench.errors import ReportError
from backbench.reports.arms import Arm, Run, against
from backbench.reports.conclusion import conclusion, left_out
from backbench.reports.grouping import grouped, incomparable_groups, require_key, value_of
from backbench.reports.quantities import quantity
from backbench.reports.record import RunRecord

RATE = quantity("metrics", "output_tokens_per_s", "whole_run")


def record(rate: float, seed: int, device: str, backend: str, **asked: object) -> RunRecord:
    return RunRecord(
        run={"status": "complete", "seed": seed, "asked": asked, "tags": {"card": device}},
        workload={"name": "w", "content_hash": f"draw {seed}"},
        model={"name": "tiny"},
        system={"device": {"name": device, "vendor": "cpu"}},
        backend={"asked": backend},
        metrics={"output_tokens_per_s": {"whole_run": rate, "steady_state": None}},
    )


def experiment(name: str, device: str, level: float, blocks: int = 3, **asked: object) -> list[Arm]:
    """torch and sdpa in turns, sdpa a tenth faster; the blocks' levels differ by half."""
    arms = []
    for backend, faster in (("torch", 1.0), ("sdpa", 1.1)):
        rates = [level * faster * (1 + block / 2 + block / 1000) for block in range(blocks)]
        runs = [Run(record(rate, block, device, backend, **asked), block) for block, rate in enumerate(rates)]
        arms.append(Arm(f"{backend} {name}", tuple(runs), Path(name)))
    return arms


def test_pairs_of_several_experiments_stay_pairs() -> None:
    """The machines differ tenfold and the blocks by half: only pairs can see a tenth."""
    arms = grouped([*experiment("x", "a", 10.0), *experiment("y", "b", 100.0)], "backend")
    assert [(arm.label, len(arm.runs)) for arm in arms] == [("torch", 6), ("sdpa", 6)]
    assert incomparable_groups(arms, "backend") == []
    found = against(*arms, RATE)
    assert found.value == pytest.approx(1.1) and found.n == 6 and found.verdict == "better"
    assert conclusion(arms).endswith("n = 6 pairs.")


def test_a_run_without_its_pair_is_in_no_ratio() -> None:
    x, y = experiment("x", "a", 10.0), experiment("y", "b", 100.0)
    arms = grouped([*x, y[0]], "backend")
    assert against(*arms, RATE).n == 3
    first = replace(x[0].runs[0].record, validity=["throttled"])
    doubtful = replace(x[0], runs=(replace(x[0].runs[0], record=first), *x[0].runs[1:]))
    assert left_out(grouped([doubtful, x[1]], "backend")) == ["pair 1 of x left out: torch: throttled"]


def test_single_runs_of_one_machine_are_pooled_without_a_verdict() -> None:
    runs = [
        Arm("", (Run(record(rate, 0, "a", backend)),))
        for backend, rates in (("torch", (10.0, 10.1, 9.9)), ("sdpa", (20.0, 20.1, 19.9)))
        for rate in rates
    ]
    arms = grouped(runs, "backend")
    found = against(*arms, RATE)
    assert found.low is not None and found.low > 1 and found.verdict == "unclear"
    assert "did not take turns" in conclusion(arms)


def test_a_group_of_two_configurations_is_refused() -> None:
    arms = grouped([*experiment("x", "a", 10.0, max_seqs=8), *experiment("y", "a", 10.0)], "backend")
    found = incomparable_groups(arms, "backend")
    assert [str(each) for each in found] == ["max_seqs within torch: 8 vs —"]


def test_machines_are_grouped_by_tag_and_by_vendor() -> None:
    arms = [experiment("x", "a", 10.0)[0], experiment("y", "b", 20.0)[0]]
    assert [arm.label for arm in grouped(arms, "tag:card")] == ["a", "b"]
    assert against(*grouped(arms, "tag:card"), RATE).verdict in ("better", "same")
    assert [arm.label for arm in grouped(arms, "vendor")] == ["cpu"]
    assert [arm.label for arm in grouped(arms, "tag:room")] == ["no tag:room"]


def test_runs_that_took_turns_are_not_pooled_with_each_other() -> None:
    with pytest.raises(ReportError, match="compared with each other"):
        grouped(experiment("x", "a", 10.0), "vendor")


@pytest.mark.parametrize("key", ["model", "quantization"])
def test_models_compare_where_that_was_asked(key: str) -> None:
    plain, other = experiment("x", "a", 10.0)[0], experiment("x", "a", 20.0)[0]
    model = {"name": "tiny-fp8", "quantization": "fp8", "config_hash": "other"}
    runs = [replace(run, record=replace(run.record, model=model)) for run in other.runs]
    arms = grouped([plain, replace(other, runs=tuple(runs))], key)
    assert [arm.label for arm in arms] == (
        ["tiny", "tiny-fp8"] if key == "model" else ["not quantized", "fp8"]
    )
    assert incomparable_groups(arms, key) == []
    assert {each.field for each in incomparable_groups(arms, None)} == {"model", "model config"}


@pytest.mark.parametrize("key", ["", "colour", "tag:", "Backend"])
def test_an_unknown_key_is_one_line(key: str) -> None:
    with pytest.raises(ReportError, match="--group-by takes backend, vendor, quantization, model or tag:KEY"):
        require_key(key)
    assert require_key("tag:card") == "tag:card"


def test_what_a_record_lacks_groups_it_too() -> None:
    bare = RunRecord(run={"status": "complete"})
    assert value_of(bare, "vendor") == value_of(bare, "model") == "—"
    assert value_of(bare, "quantization") == "not quantized"
