"""Runs pooled by what they have in common: one arm a backend, vendor, quantization, model or tag."""

from __future__ import annotations

from collections.abc import Sequence

from backbench.errors import ReportError, shown
from backbench.reports.arms import Arm, Run, arms_incomparable
from backbench.reports.compare import Difference, backend_name, configured, show
from backbench.reports.record import RunRecord

KEYS = ("backend", "vendor", "quantization", "model")
TAG = "tag:"
COMPARED = {
    "model": ("model", "model config", "model dtype"),
    "quantization": ("model", "model config", "model dtype"),
}
"""Grouping key -> the fields that must agree elsewhere, and that it asks to compare."""
ELSEWHERE = "device"
"""The option that may differ in a group: its runs may be of several machines."""


def require_key(key: str) -> str:
    """`key`; raises ReportError where runs cannot be grouped by it."""
    if key not in KEYS and not (key.startswith(TAG) and len(key) > len(TAG)):
        raise ReportError(f"--group-by takes {', '.join(KEYS)} or tag:KEY; not {shown(key)}.")
    return key


def grouped(arms: Sequence[Arm], key: str) -> list[Arm]:
    """One arm a value of `key`, in order of appearance, of all the runs that have it.

    A run keeps its turn: runs of two groups in one block of one experiment are still a pair.

    Raises:
        ReportError: a group would have two runs of one block, which were made to be compared.
    """
    groups: dict[str, list[Run]] = {}
    for arm in arms:
        for run in arm.runs:
            experiment = run.experiment or arm.experiment
            pooled = Run(run.record, run.block, run.directory, experiment)
            groups.setdefault(value_of(run.record, key), []).append(pooled)
    found = [Arm(label, tuple(runs)) for label, runs in groups.items()]
    for arm in found:
        if len(arm.turns()) != len(arm.runs):
            raise ReportError(
                f"--group-by {key} would pool runs of {arm.label} that took turns in one experiment; "
                "they were made to be compared with each other."
            )
    return found


def value_of(record: RunRecord, key: str) -> str:
    """What groups this run by `key`."""
    if key == "backend":
        return backend_name(record)
    if key == "vendor":
        return show((record.system.get("device") or {}).get("vendor"))
    if key == "quantization":
        return str(record.model.get("quantization") or "not quantized")
    if key == "model":
        return show(record.model.get("name"))
    value = (record.run.get("tags") or {}).get(key.removeprefix(TAG))
    return f"no {key}" if value is None else str(value)


def incomparable_groups(arms: Sequence[Arm], key: str | None) -> list[Difference]:
    """Why these arms do not compare: what differs and was not to be compared, by `key` or within a group."""
    found = arms_incomparable(arms)
    if key is None:
        return found
    return [each for each in found if each.field not in COMPARED.get(key, ())] + mixed(arms, key)


def mixed(arms: Sequence[Arm], key: str) -> list[Difference]:
    """What is not the same in the runs of one group, though only `key` was to be compared.

    A median over two configurations is of neither, and their difference would pass for spread between runs.
    """
    found: dict[str, Difference] = {}
    for arm in arms:
        first, *others = (configured(record) for record in arm.records)
        for other in others:
            for name in first | other:
                if name not in (key, ELSEWHERE) and first.get(name) != other.get(name):
                    values = (first.get(name), other.get(name))
                    found.setdefault(name, Difference(f"{name} within {arm.label}", values))
    return list(found.values())
