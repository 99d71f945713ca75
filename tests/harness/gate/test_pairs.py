"""Why a pair does not count, and what its runs must share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from gate.conftest import RECORD, changed

from backbench.harness.gate.fingerprint import HARD, fingerprint
from backbench.harness.gate.outcome import Pair
from backbench.harness.gate.pairs import Observation, incomparable, make_pair
from backbench.harness.gate.policy import Policy
from backbench.reports.metrics import validity
from backbench.reports.metrics.validity import NOT_ASKED_FOR
from backbench.reports.record import RunRecord

ORDER = ("baseline", "candidate")


def pair(candidate: RunRecord, clocks: tuple[float | None, float | None] = (None, None)) -> Pair:
    runs = {"baseline": Observation(RECORD, clocks[0]), "candidate": Observation(candidate, clocks[1])}
    return make_pair(0, 0, ORDER, runs, Policy())


def test_equal_runs_are_a_pair() -> None:
    found = pair(RECORD)
    assert found.void == () and found.wrong is None
    assert found.values.keys() == {"throughput", "tpot_p50", "ttft_p50"}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("run.status", "interrupted", "candidate run was interrupted"),
        ("validity", ["3 requests failed"], "candidate: 3 requests failed"),
        ("validity", ["the client was saturated: ..."], "client was saturated"),
        ("metrics.output_tokens", 1, "metrics.output_tokens differs"),
        ("metrics.prompt_tokens", 1, "metrics.prompt_tokens differs"),
        ("workload.content_hash", "beef", "workload.content_hash differs"),
        ("metrics.schema", 1, "metrics.schema differs"),
    ],
)
def test_what_voids_a_pair(path: str, value: Any, words: str) -> None:
    assert any(words in reason for reason in pair(changed(RECORD, path, value)).void)


@pytest.mark.parametrize(
    "change",
    [
        {"metrics.counts.failed": 2},
        {"schedule.client_saturated": True},
        {"metrics.counts.wrong_length": 1},
    ],
)
def test_a_run_with_failures_or_a_saturated_client_has_a_reason_that_voids(change: dict[str, Any]) -> None:
    """The reasons are the record's own; a pair is void by any of them."""
    from gate.conftest import TELEMETRY

    base = changed(RECORD, "metrics.counts.wrong_length", 0)
    for path, value in change.items():
        base = changed(base, path, value)
    reasons = validity.of_record(base, TELEMETRY)
    assert reasons and len(pair(replace(base, validity=reasons)).void) == len(reasons)


@pytest.mark.parametrize(
    ("clocks", "void"),
    [((1980, 1980), 0), ((1980, 1942), 0), ((1980, 1930), 1), ((1930, 1980), 1), ((None, 1980), 0)],
)
def test_clocks_may_differ_by_two_percent(clocks: tuple[float | None, float | None], void: int) -> None:
    assert len(pair(RECORD, clocks).void) == void


def test_wrong_results_of_the_candidate_are_told_apart() -> None:
    bad = replace(RECORD, correctness={"passed": False, "reason": "off by 0.3"})
    assert pair(bad).wrong == "off by 0.3"
    assert pair(replace(RECORD, correctness={"passed": None})).wrong is None


def test_a_value_that_one_run_lacks_is_no_value_of_the_pair() -> None:
    assert "tpot_p50" not in pair(changed(RECORD, "metrics.tpot_s.p50.value", None)).values
    assert not pair(changed(RECORD, "metrics.output_tokens_per_s.whole_run", 0)).compares("throughput")


def test_a_run_that_was_not_to_be_checked_is_no_void_pair() -> None:
    unasked = replace(
        RECORD, correctness={"passed": None, "reason": NOT_ASKED_FOR}, validity=[validity.UNCHECKED]
    )
    runs = {"baseline": Observation(RECORD), "candidate": Observation(unasked)}
    found = make_pair(0, 0, ORDER, runs, Policy(), check=False)
    assert found.void == () and not found.checked and runs["candidate"].finished
    assert make_pair(0, 0, ORDER, runs, Policy()).void == (f"candidate: {validity.UNCHECKED}",)
    assert make_pair(0, 0, ORDER, runs | {"candidate": Observation(RECORD)}, Policy()).checked


@pytest.mark.parametrize("path", [each for each in HARD if each != "workload.parameters"])
def test_every_hard_key_makes_runs_incomparable(path: str) -> None:
    runs = {"candidate": Observation(changed(RECORD, path, "other"))}
    assert path in (incomparable(runs, fingerprint(RECORD)) or "")


def test_the_seed_is_no_part_of_the_workload() -> None:
    seeded = changed(RECORD, "workload.parameters.seed", 8)
    assert incomparable({"candidate": Observation(seeded)}, fingerprint(RECORD)) is None
    longer = changed(RECORD, "workload.parameters.num_requests", 8)
    assert "workload.parameters" in (
        incomparable({"candidate": Observation(longer)}, fingerprint(RECORD)) or ""
    )
    assert fingerprint(RECORD).digest == fingerprint(seeded).digest != fingerprint(longer).digest
