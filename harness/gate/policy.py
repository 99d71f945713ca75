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
from typing import Any

from backbench.errors import HarnessError
from backbench.reports.record import RunRecord

POLICY_FILE = "bench-gate.toml"
MOST_GATED = 6
"""More gated metrics cost more pairs each than anyone waits for."""


@dataclass(frozen=True)
class GatedMetric:
    """A number of a run's record that a gate may judge."""

    path: tuple[str, ...]
    higher_is_better: bool
    margin: float
    """The margin where the policy names none."""

    def read(self, record: RunRecord) -> float | None:
        """The run's value; None where it was not measured."""
        value: Any = getattr(record, self.path[0])
        for key in self.path[1:]:
            value = value.get(key) if isinstance(value, dict) else None
        return float(value) if isinstance(value, int | float) and value > 0 else None

    def difference(self, baseline: float, candidate: float) -> float:
        """ln(candidate / baseline), oriented so that + is worse."""
        ratio = log(candidate / baseline)
        return -ratio if self.higher_is_better else ratio


METRICS: Mapping[str, GatedMetric] = MappingProxyType(
    {
        "throughput": GatedMetric(("metrics", "output_tokens_per_s", "whole_run"), True, 0.03),
        "tpot_p50": GatedMetric(("metrics", "tpot_s", "p50", "value"), False, 0.03),
        "ttft_p50": GatedMetric(("metrics", "ttft_s", "p50", "value"), False, 0.05),
        "joules_per_token": GatedMetric(("energy", "joules_per_output_token"), False, 0.05),
        "goodput": GatedMetric(("metrics", "goodput_requests_per_s"), True, 0.03),
        "peak_memory": GatedMetric(("memory", "total_bytes"), False, 0.01),
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
                raise HarnessError(f"{name!r} cannot be gated; choose from {', '.join(METRICS)}.")
            if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < 1:
                raise HarnessError(f"The margin of {name} must lie between 0 and 1, not {margin!r}.")
        if not 1 <= len(self.margins) <= MOST_GATED:
            raise HarnessError(f"A gate judges 1 to {MOST_GATED} metrics, not {len(self.margins)}.")


def read_policy(path: Path) -> Policy:
    """The policy in a TOML file; HarnessError in one line where it is none."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HarnessError(f"{path} is no gate policy: {error}.") from None
    known = {"workload": str, "options": list, "margins": dict, "seed": int}
    for key, value in found.items():
        if key not in known:
            raise HarnessError(f"{path}: unknown key {key!r}; known are {', '.join(known)}.")
        if not isinstance(value, known[key]):
            raise HarnessError(f"{path}: {key} must be a {known[key].__name__}.")
    if "options" in found:
        found["options"] = tuple(map(str, found["options"]))
    return Policy(**found)
