"""One pair of runs: its values, and why it may not count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from backbench.harness.gate.arms import BASELINE, CANDIDATE
from backbench.harness.gate.outcome import Pair
from backbench.harness.gate.policy import METRICS, Policy
from backbench.reports.record import RunRecord

SAME = (
    ("workload", "content_hash"),
    ("model", "config_hash"),
    ("metrics", "output_tokens"),
    ("system", "device", "name"),
)
"""What both runs of a pair must share to be one observation."""


def make_pair(
    index: int, seed: int, order: tuple[str, str], records: Mapping[str, RunRecord], policy: Policy
) -> Pair:
    """The pair of these two runs, by arm."""
    baseline, candidate = records[BASELINE], records[CANDIDATE]
    values = {}
    for name in policy.margins:
        before, after = METRICS[name].read(baseline), METRICS[name].read(candidate)
        if before is not None and after is not None:
            values[name] = (before, after)
    wrong = None
    if candidate.correctness.get("passed") is False:
        wrong = str(candidate.correctness.get("reason", "log-probabilities differ from the torch backend's"))
    return Pair(index, seed, order, values, tuple(_void(records)), wrong)


def _void(records: Mapping[str, RunRecord]) -> Iterator[str]:
    for arm, record in records.items():
        if record.run["status"] != "complete":
            yield f"the {arm} run was {record.run['status']}"
        for reason in record.validity:
            yield f"{arm}: {reason}"
    baseline, candidate = records[BASELINE], records[CANDIDATE]
    for path in SAME:
        before, after = _at(baseline, path), _at(candidate, path)
        if before != after:
            yield f"{'.'.join(path)} differs: {before} vs {after}"


def _at(record: RunRecord, path: tuple[str, ...]) -> object:
    value: object = getattr(record, path[0])
    for key in path[1:]:
        value = value.get(key) if isinstance(value, dict) else None
    return value
