"""Every metric is defined whole and once."""

from __future__ import annotations

import pytest

from backbench.reports.metrics.catalogue import METRIC_SCHEMA, METRICS
from backbench.reports.metrics.metric import Metric, Missing, resolved
from backbench.reports.quantities import QUANTITIES

SECTIONS = {"metrics", "memory", "energy", "schedule", "roofline", "correctness", "accuracy", "speculation"}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.dotted)
def test_a_metric_says_what_it_is(metric: Metric) -> None:
    assert metric.path[0] in SECTIONS
    assert metric.label
    assert metric.definition.endswith(".")
    assert 1 <= metric.since <= METRIC_SCHEMA
    assert not metric.parts or metric.group


def test_no_two_metrics_have_one_place() -> None:
    assert len({metric.path for metric in METRICS}) == len(METRICS)


def test_what_is_shown_follows_from_the_metrics() -> None:
    assert [each.path for each in QUANTITIES] == [
        each.path for metric in METRICS for each in metric.quantities()
    ]


def test_missing_values_become_nulls_with_their_reasons() -> None:
    section = {"a": 1, "b": Missing("not here"), "c": {"d": Missing("nor here"), "e": 0.5}}
    assert resolved(section) == {
        "a": 1,
        "b": None,
        "c": {"d": None, "e": 0.5},
        "absent": {"b": "not here", "c.d": "nor here"},
    }
    assert resolved({"a": 1}) == {"a": 1}
