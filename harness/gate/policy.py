"""What a gate measures and how much worse is too much: policy, kept in a committed TOML file.

workload = "sharegpt"
options = ["--num-requests", "64"]

[margins]            # relative loss that is too much; only what stands here is gated
throughput = 0.03
tpot_p50 = 0.03
ttft_p50 = 0.05
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from types import MappingProxyType

from backbench.errors import HarnessError, shown
from backbench.reports.metrics.metric import Quantity
from backbench.reports.quantities import quantity, read
from backbench.reports.record import RunRecord

POLICY_FILE = "bench-gate.toml"
SET_BY_THE_GATE = ("--seed", "--out", "--repeat")
"""Options of `bench run` that are different in every run of a gate."""


@dataclass(frozen=True)
class GatedMetric:
    """A number of a run's record that a gate may judge."""

    quantity: Quantity
    margin: float
    """The relative loss that is too much, where the policy names none."""
    least: float = 0.0
    """A loss too small to matter however large its share is, in the quantity's unit."""

    def read(self, record: RunRecord) -> float | None:
        """The run's value; None where it was not measured, or is 0 and has no logarithm."""
        value = read(record, self.quantity).value
        return value if value is not None and value > 0 else None

    def difference(self, baseline: float, candidate: float) -> float:
        """ln(candidate / baseline), oriented so that + is worse."""
        ratio = log(candidate / baseline)
        return -ratio if self.quantity.higher_is_better else ratio


METRICS: Mapping[str, GatedMetric] = MappingProxyType(
    {
        "throughput": GatedMetric(quantity("metrics", "output_tokens_per_s", "whole_run"), 0.03),
        "tpot_p50": GatedMetric(quantity("metrics", "tpot_s", "p50"), 0.03),
        "ttft_p50": GatedMetric(quantity("metrics", "ttft_s", "p50"), 0.05),
        "joules_per_token": GatedMetric(quantity("energy", "joules_per_output_token"), 0.05),
        "goodput": GatedMetric(quantity("metrics", "goodput_requests_per_s"), 0.03),
        "peak_memory": GatedMetric(quantity("memory", "total_bytes"), 0.01, least=64 * 2**20),
    }
)
"""Everything that may be gated. Tail percentiles are not: three identical runs gave 533, 741 and 597 ms."""


DEFAULT_MARGINS = {name: METRICS[name].margin for name in ("throughput", "tpot_p50", "ttft_p50")}


@dataclass(frozen=True)
class Policy:
    """One gate cell: what both arms run, and the margins of what is judged."""

    workload: str = "sharegpt"
    options: tuple[str, ...] = ()
    """Of `bench run`, given to both arms."""
    margins: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_MARGINS))
    seed: int = 0
    """Of the first pair; each pair has the next one."""

    def __post_init__(self) -> None:
        for name, margin in self.margins.items():
            if name not in METRICS:
                raise HarnessError(f"{shown(name)} cannot be gated; choose from {', '.join(METRICS)}.")
            if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < 1:
                raise HarnessError(f"The margin of {name} must lie between 0 and 1, not {shown(margin)}.")
        if not self.margins:
            raise HarnessError(f"A gate judges at least one metric; choose from {', '.join(METRICS)}.")
        if taken := next((each for each in self.options if each.split("=")[0] in SET_BY_THE_GATE), None):
            raise HarnessError(f"{taken} is set by the gate for every run; leave it out of the options.")
        if isinstance(self.seed, bool) or self.seed < 0:
            raise HarnessError(f"The seed must be a whole number from 0 on, not {shown(self.seed)}.")

    def margin(self, name: str, baseline: float) -> float:
        """The relative loss of a metric that is too much where the baseline has this value."""
        return max(self.margins[name], METRICS[name].least / baseline)


def read_policy(path: Path) -> Policy:
    """The policy in a TOML file; HarnessError in one line where it is none."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HarnessError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise HarnessError(f"{path} is no gate policy: {' '.join(str(error).split())}.") from None
    kinds: dict[str, tuple[type, str]] = {
        "workload": (str, "a text"),
        "options": (list, "a list of texts"),
        "margins": (dict, "a table"),
        "seed": (int, "a whole number"),
    }
    for key, value in found.items():
        if key not in kinds:
            raise HarnessError(f"{path}: unknown key {shown(key)}; known are {', '.join(kinds)}.")
        kind, words = kinds[key]
        odd = key == "options" and not all(isinstance(each, str) for each in value)
        if not isinstance(value, kind) or odd:
            raise HarnessError(f"{path}: {key} must be {words}, not {shown(value)}.")
    if "options" in found:
        found["options"] = tuple(found["options"])
    return Policy(**found)
