"""What must be the same for two runs to say anything of the code alone: machine, model, workload."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from backbench.reports.record import RunRecord

HARD = (
    "system.device.name",
    "system.device.partitioned",
    "system.device.power_limit_w",
    "metrics.context.gpus",
    "system.cpu.name",
    "system.cpu.cores_usable",
    "model.name",
    "model.config_hash",
    "model.dtype",
    "model.quantization",
    "workload.name",
    "workload.parameters",
)
"""Runs that differ in one of these are never compared to judge code."""
SOFT = (
    "system.device.driver",
    "system.os",
    "software.python",
    "software.packages.torch",
    "software.packages.triton",
    "software.torch_threads",
)
"""These are shown: they may differ between the arms, and be what is judged."""


@dataclass(frozen=True)
class Fingerprint:
    """One run's keys; values as in its record."""

    hard: dict[str, Any]
    soft: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of the hard keys."""
        return hashlib.sha256(json.dumps(self.hard, sort_keys=True).encode()).hexdigest()[:16]

    def against(self, other: Fingerprint) -> str | None:
        """The first hard key that differs, in words."""
        for key, value in self.hard.items():
            if (theirs := other.hard.get(key)) != value:
                return f"{key} differs: {_short(value)} vs {_short(theirs)}"
        return None


def fingerprint(record: RunRecord) -> Fingerprint:
    """The record's. The seed is no part of the workload's: every pair has a new one."""
    hard = {key: at(record, key) for key in HARD}
    parameters = hard["workload.parameters"] or {}
    hard["workload.parameters"] = {key: value for key, value in parameters.items() if key != "seed"}
    return Fingerprint(hard, {key: at(record, key) for key in SOFT})


def at(record: RunRecord, dotted: str) -> Any:
    """The value at "section.key.key"; None where there is none."""
    section, *keys = dotted.split(".")
    value: Any = getattr(record, section)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
