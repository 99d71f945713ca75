"""Every metric, in the order in which tables show them. A metric is defined in its family's file."""

from __future__ import annotations

from backbench.reports.metrics import (
    accuracy,
    correctness,
    decode_fit,
    disturbance,
    energy,
    engine_steps,
    fidelity,
    latency,
    memory,
    outcome,
    roofline,
    schedule,
    speculation,
    throughput,
)
from backbench.reports.metrics.metric import Metric

METRICS: tuple[Metric, ...] = (
    *throughput.METRICS,
    *latency.METRICS,
    *outcome.METRICS,
    *memory.METRICS,
    *energy.METRICS,
    *roofline.METRICS,
    *decode_fit.METRICS,
    *engine_steps.METRICS,
    *schedule.METRICS,
    *fidelity.METRICS,
    *correctness.METRICS,
    *accuracy.METRICS,
    *speculation.METRICS,
    *disturbance.METRICS,
)

METRIC_SCHEMA = 2
"""Raised when a metric's definition changes; two records compare only within one. 1: a closed loop's
handed-over warm-up requests took time and gave no tokens; see each metric's `since`."""
