"""What a gate measures and how much worse is too much: policy, kept in a committed TOML file.

workload = "sharegpt"
options = ["--num-requests", "64"]

[margins]            # relative loss that is too much; only what stands here is gated
throughput = 0.03
tpot_p50 = 0.03
ttft_p50 = 0.05

[floors]             # the worst value that passes, in the metric's unit: at least, or at most
throughput = 100
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, log
from pathlib import Path
from types import MappingProxyType
from typing import TypeGuard

from backbench.errors import HarnessError, shown
from backbench.reports.metrics.metric import Quantity
from backbench.reports.quantities import quantity, read
from backbench.reports.record import RunRecord

POLICY_FILE = "bench-gate.toml"
SET_BY_THE_GATE = ("--seed", "--out", "--repeat", "--find-load")
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
        """The run's value; None where it was not measured."""
        return read(record, self.quantity).value

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
        "prefill": GatedMetric(quantity("metrics", "steps", "prefill_tokens_per_s"), 0.03),
        "goodput": GatedMetric(quantity("metrics", "goodput_requests_per_s"), 0.03),
        "peak_memory": GatedMetric(quantity("memory", "total_bytes"), 0.01, least=64 * 2**20),
    }
)
"""Everything of a run that may be gated. Tail percentiles are not: three identical runs gave 533, 741 and
597 ms."""
MOST_METRICS = 6
"""Of a policy: every further one makes each of them harder to tell (Holm)."""
DEFAULT_MARGINS = {name: METRICS[name].margin for name in ("throughput", "tpot_p50", "ttft_p50")}

KERNEL_TIME = "kernel_time"
"""The one margin of a policy of kernels, for each of them."""
KERNEL = GatedMetric(Quantity(("kernels", "seconds"), "Time of a call", "s", False, "Kernels"), 0.05)
CHECKS = ("every", "first")


def gated(name: str) -> GatedMetric:
    """What is judged under this name: a metric of runs, else one kernel's time."""
    return METRICS.get(name, KERNEL)


@dataclass(frozen=True)
class Policy:
    """One gate cell: what both arms run, and the margins of what is judged."""

    workload: str = "sharegpt"
    options: tuple[str, ...] = ()
    """Of `bench run`, given to both arms."""
    margins: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_MARGINS))
    seed: int = 0
    """Of the first pair; each pair has the next one."""
    check: str = "every"
    """Which runs of an arm check their results: every one, or the first."""
    floors: Mapping[str, float] = field(default_factory=dict)
    """Metric -> the worst value, in its own unit, that any candidate may have: least or most."""
    kernels: tuple[str, ...] | None = None
    """Options of `bench kernels`, given to both arms, whose kernels run in place of a workload."""

    def __post_init__(self) -> None:
        known = (KERNEL_TIME,) if self.kernels is not None else tuple(METRICS)
        for name, margin in self.margins.items():
            if name not in known:
                raise HarnessError(f"{shown(name)} cannot be gated; choose from {', '.join(known)}.")
            if not _is_number(margin) or not 0 < margin < 1:
                raise HarnessError(f"The margin of {name} must lie between 0 and 1, not {shown(margin)}.")
        if not self.margins:
            raise HarnessError(f"A gate judges at least one metric; choose from {', '.join(known)}.")
        if len(self.margins) > MOST_METRICS:
            raise HarnessError(f"A gate judges at most {MOST_METRICS} metrics, not {len(self.margins)}.")
        for name, floor in self.floors.items():
            if name not in METRICS or self.kernels is not None:
                raise HarnessError(f"{shown(name)} has no floor; choose from {', '.join(METRICS)}, of runs.")
            if not _is_number(floor) or not 0 < floor < inf:
                raise HarnessError(f"The floor of {name} must be a positive number, not {shown(floor)}.")
        if taken := next((each for each in self.options if each.split("=")[0] in SET_BY_THE_GATE), None):
            raise HarnessError(f"{taken} is set by the gate for every run; leave it out of the options.")
        if isinstance(self.seed, bool) or self.seed < 0:
            raise HarnessError(f"The seed must be a whole number from 0 on, not {shown(self.seed)}.")
        if self.check not in CHECKS:
            raise HarnessError(f"check must be {' or '.join(CHECKS)}, not {shown(self.check)}.")

    def margin(self, name: str, baseline: float) -> float:
        """The relative loss that is too much of a metric or kernel where the baseline has this value."""
        return max(self.margins[_margin_name(name)], gated(name).least / baseline)

    def share(self, name: str) -> float | None:
        """The margin as the policy states it; None = not judged."""
        return self.margins.get(_margin_name(name))


def _margin_name(name: str) -> str:
    return name if name in METRICS else KERNEL_TIME


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


KINDS: Mapping[str, tuple[type, str]] = MappingProxyType(
    {
        "workload": (str, "a text"),
        "options": (list, "a list of texts"),
        "margins": (dict, "a table"),
        "seed": (int, "a whole number"),
        "check": (str, "a text"),
        "floors": (dict, "a table"),
        "kernels": (list, "a list of texts"),
    }
)
"""What a policy file may hold."""


def read_policy(path: Path) -> Policy:
    """The policy in a TOML file; HarnessError in one line where it is none."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HarnessError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise HarnessError(f"{path} is no gate policy: {' '.join(str(error).split())}.") from None
    for key, value in found.items():
        if key not in KINDS:
            raise HarnessError(f"{path}: unknown key {shown(key)}; known are {', '.join(KINDS)}.")
        kind, words = KINDS[key]
        odd = kind is list and isinstance(value, list) and not all(isinstance(each, str) for each in value)
        if not isinstance(value, kind) or odd:
            raise HarnessError(f"{path}: {key} must be {words}, not {shown(value)}.")
    if "kernels" in found:
        if other := next((each for each in ("workload", "options") if each in found), None):
            raise HarnessError(f"{path}: kernels run without {other}; make two policies of it.")
        found.setdefault("margins", {KERNEL_TIME: KERNEL.margin})
    for key in ("options", "kernels"):
        if key in found:
            found[key] = tuple(found[key])
    return Policy(**found)
