"""One run's tables as the metrics see them: requests, steps, telemetry, and the stretches they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from backbench.reports.metrics.requests import Context, Requests, read_requests, read_with_warmup
from backbench.reports.metrics.steps import step_times_ns
from backbench.reports.metrics.window import Window, steady_state

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class RunTables:
    """Everything a metric may follow from. Made anew for every computation; nothing writes to it."""

    rows: Requests
    """The measured requests that were due."""
    everyone: Requests
    """Those and the warm-up requests: whoever asked for the tokens that a window made."""
    steps: pd.DataFrame
    """All steps, the warm-up's too."""
    context: Context
    telemetry: pd.DataFrame | None = None
    """None = not at hand, which is not the same as nothing sampled."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """The record's sections, for what no table says: idle power, why a sensor is missing."""

    @classmethod
    def read(
        cls,
        requests: pd.DataFrame,
        steps: pd.DataFrame,
        context: Context,
        telemetry: pd.DataFrame | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> RunTables:
        """From the tables of a run directory."""
        rows, everyone = read_requests(requests, context), read_with_warmup(requests)
        return cls(rows, everyone, steps, context, telemetry, given or {})

    @cached_property
    def whole(self) -> Window:
        """From the run's start to its last token, or to the interruption."""
        last = self.rows.last_ns[~np.isnan(self.rows.last_ns)]
        interrupted = self.context.interrupted or not len(last)
        return Window(0.0, float(self.context.end_ns) if interrupted else float(last.max()))

    @cached_property
    def steady_or_why_not(self) -> tuple[Window | None, str | None]:
        return steady_state(self.rows, self.context)

    @property
    def steady(self) -> Window | None:
        return self.steady_or_why_not[0]

    @cached_property
    def measured_steps(self) -> pd.DataFrame:
        """The steps that ended after the run's start."""
        return self.steps[self.steps["end_ns"] > 0]

    @cached_property
    def step_times_ns(self) -> np.ndarray:
        """What each measured step added to the run, inside it: f64[measured steps]."""
        return step_times_ns(self.measured_steps, self.whole)

    @property
    def busy_s(self) -> float:
        return float(self.step_times_ns.sum()) / 1e9
