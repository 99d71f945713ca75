"""What an export declares about itself: the one thing that a new format's file must hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbench.declared import declared
from backbench.errors import ReportError, shown
from backbench.reports import export
from backbench.reports.arms import Arm, compared_in, measured
from backbench.reports.metrics.metric import Quantity
from backbench.reports.quantities import Reading
from backbench.reports.record import finite


@dataclass(frozen=True)
class Export:
    """A format. Its module in `reports/export` holds it as `EXPORT`; nothing else names it."""

    name: str
    """As it is typed."""
    description: str
    write: Callable[[Sequence[Arm]], dict[str, Any]]
    """Arms to JSON values by part: "" is the file itself, another goes before its suffix (FILE.part.json).
    Raises ReportError where the format cannot hold them."""


def exports() -> tuple[Export, ...]:
    """What the modules beside this one declare as `EXPORT`, by name; those without one are helpers."""
    return declared(export, "EXPORT")


def export_named(name: str) -> Export:
    """The format of this name; ReportError with all of them where there is none."""
    found = {each.name: each for each in exports()}
    if name not in found:
        raise ReportError(f"There is no export format {shown(name)}; there are {', '.join(found)}.")
    return found[name]


def write_export(wanted: Export, arms: Sequence[Arm], out: Path) -> list[Path]:
    """Write the arms in a format; the files written. FileExistsError rather than overwriting one."""
    written = []
    for part, content in wanted.write(arms).items():
        path = out.with_name(f"{out.stem}.{part}{out.suffix}") if part else out
        text = json.dumps(finite(content), indent=1, allow_nan=False) + "\n"
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        written.append(path)
    return written


def values(arms: Sequence[Arm]) -> Iterator[tuple[Arm, Quantity, Reading]]:
    """Every quantity that an arm has, with its interval: between runs, or within a single one."""
    for arm in arms:
        for each in compared_in([arm]):
            reading = measured(arm, each)
            if reading.value is not None:
                yield arm, each, reading


def interval_words(arm: Arm) -> str:
    """What the interval of an arm's values is."""
    runs = len(arm.runs)
    return f"median of {runs} runs, 95 % between runs" if runs > 1 else "one run, 95 % within it"
