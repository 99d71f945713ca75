"""The results as a table, CSV, JSON or one self-contained page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from importlib import resources
from typing import Any

from backbench.harness.kernels.measure import KernelResult
from backbench.reports.quantities import DASH, digits, format_value, scale

LONGEST_BAR = 4
"""Times the shortest: what takes longer is drawn cut off, or nobody could tell the short ones apart."""
COLUMNS = ("Problem", "Backend", "Mode", "Time (95 %)", "GB/s", "TFLOP/s", "Of roofline", "Error")


def table_rows(results: Sequence[KernelResult]) -> list[tuple[str, ...]]:
    """One row a result, in `COLUMNS`."""
    return [
        (
            result.problem,
            result.backend,
            result.mode or DASH,
            time_text(result) or result.note,
            rate(result.bytes_per_s, 1e9),
            rate(result.flops_per_s, 1e12),
            format_value(result.roofline_share, "ratio"),
            error_text(result),
        )
        for result in results
    ]


def time_text(result: KernelResult) -> str:
    """The median and its interval in one unit; empty without a time."""
    timing = result.timing
    if timing is None:
        return ""
    factor, unit = scale(timing.median_s, "s")
    low, high = digits(timing.low_s / factor), digits(timing.high_s / factor)
    return f"{digits(timing.median_s / factor)} {unit} ({low}–{high})"


def rate(value: float | None, unit: float) -> str:
    """`value` in `unit`s; a dash where there is none or it is not what the operation costs."""
    return digits(value / unit) if value else DASH


def error_text(result: KernelResult) -> str:
    """The largest error, and WRONG beside it where it is past the limit."""
    if result.error is None:
        return DASH
    text = f"{result.error:.1e}" if result.error else "exact"
    return text if result.correct else f"WRONG {text} > {result.limit:.1e}"


def to_csv(results: Sequence[KernelResult]) -> str:
    """Every field of every result, a header first."""
    rows = [result.to_json() for result in results]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_html(results: Sequence[KernelResult], facts: dict[str, str]) -> str:
    """One page: per problem a bar for each backend, the shortest time first."""
    from jinja2 import Environment

    template = resources.files("backbench.harness.kernels").joinpath("kernels.html").read_text()
    style = resources.files("backbench.reports.page").joinpath("templates/report.css").read_text()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page: str = environment.from_string(template).render(groups=_groups(results), facts=facts, style=style)
    return page


def _groups(results: Sequence[KernelResult]) -> list[dict[str, Any]]:
    """Results of one problem together; a bar's length is in percent of the longest one drawn whole."""
    groups: dict[tuple[str, str], list[KernelResult]] = {}
    for result in results:
        groups.setdefault((result.operation, result.problem), []).append(result)
    found = []
    for (operation, problem), members in groups.items():
        timed = sorted((each for each in members if each.timing), key=_median_s)
        shortest = _median_s(timed[0]) if timed else 1.0
        whole = min(_median_s(timed[-1]), LONGEST_BAR * shortest) if timed else 1.0
        bars = [
            {
                "name": f"{each.backend} {each.mode}",
                "width": min(100.0, 100 * _median_s(each) / whole),
                "cut": _median_s(each) > whole,
                "factor": f"{digits(_median_s(each) / shortest)}×",
                "roof": 100 * each.roofline_s / whole if each.roofline_s else None,
                "time": time_text(each),
                "rates": f"{rate(each.bytes_per_s, 1e9)} GB/s · {rate(each.flops_per_s, 1e12)} TFLOP/s · "
                f"{format_value(each.roofline_share, 'ratio')} of roofline",
                "error": error_text(each),
                "correct": each.correct,
            }
            for each in timed
        ]
        refused = [{"name": each.backend, "note": each.note} for each in members if not each.timing]
        found.append({"operation": operation, "problem": problem, "bars": bars, "refused": refused})
    return found


def _median_s(result: KernelResult) -> float:
    assert result.timing is not None
    return result.timing.median_s
