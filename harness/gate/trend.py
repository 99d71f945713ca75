"""The history of gates: what each said, by how much, and where a level changed. It never blocks."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbench.errors import HarnessError
from backbench.harness.gate.arms import CANDIDATE
from backbench.harness.gate.fingerprint import Fingerprint
from backbench.harness.gate.outcome import SCHEMA_VERSION
from backbench.harness.gate.policy import gated
from backbench.reports.metrics.change_points import ALARM, change_points
from backbench.reports.quantities import format_value

Row = dict[str, Any]


@dataclass(frozen=True)
class History:
    """All gates below a directory, oldest first."""

    rows: list[Row]
    """One a gate and metric."""
    changes: list[Row]
    """Where the candidates' level of a metric changed."""
    odd: list[str]
    """Files that are no gate.json, and why."""


def history(directory: Path) -> History:
    """Raises HarnessError where there is no such directory, or no gate in it."""
    if not directory.is_dir():
        raise HarnessError(f"There is no directory {directory}; `bench gate --out` makes one.")
    rows: list[Row] = []
    days: list[Row] = []
    odd: list[str] = []
    for file in sorted(directory.rglob("gate.json")):
        try:
            gate = json.loads(file.read_text(encoding="utf-8"))
            found = _rows(gate, str(file.parent.relative_to(directory))), _days(gate)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            odd.append(f"{file}: {' '.join(str(error).split())}")
            continue
        rows += found[0]
        days += [day | {"gate": found[0][0]["gate"]} for day in found[1]]
    if not rows:
        raise HarnessError(f"There is no gate.json under {directory}; `bench gate` writes them.")
    return History(sorted(rows, key=lambda row: str(row["utc"])), _changes(days), odd)


def _rows(gate: dict[str, Any], name: str) -> list[Row]:
    if gate["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version {gate['schema_version']!r}")
    arms = gate["arms"]
    common = {
        "utc": str(gate["utc"]),
        "gate": name,
        "verdict": gate["verdict"],
        "baseline": _arm(arms["baseline"]),
        "candidate": _arm(arms["candidate"]),
    }
    keys = ("metric", "loss", "low", "high", "margin", "detectable")
    findings = [{key: found[key] for key in keys} for found in gate["findings"]]
    return [common | found for found in findings or [dict.fromkeys(keys)]]


def _arm(described: dict[str, str]) -> str:
    code = (described.get("code") or "")[:10]
    name = next(filter(None, map(described.get, ("ref", "checkout", "options", "stored"))), "as installed")
    return f"{name} ({code})" if code and name != described.get("options") else name


def _days(gate: dict[str, Any]) -> list[Row]:
    """The candidate's median of each metric over the gate's valid pairs, with what it may be compared to."""
    known = gate.get("fingerprint")
    if known is None:
        return []
    policy, candidate = gate["policy"], gate["arms"][CANDIDATE]
    what = [policy["workload"], policy["options"], policy.get("kernels"), candidate.get("options", "")]
    series = json.dumps([Fingerprint(**known).digest, what])
    values: dict[str, list[float]] = defaultdict(list)
    for pair in gate["pairs"]:
        for metric, (_, after) in {} if pair["void"] else pair["values"].items():
            values[metric].append(float(after))
    common = {"utc": str(gate["utc"]), "series": series}
    return [
        common | {"metric": metric, "value": statistics.median(found)} for metric, found in values.items()
    ]


def _changes(days: list[Row]) -> list[Row]:
    series: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for day in sorted(days, key=lambda day: str(day["utc"])):
        series[day["metric"], day["series"]].append(day)
    return [
        {
            "metric": metric,
            "since": found[change.index]["utc"],
            "gate": found[change.index]["gate"],
            "before": change.before,
            "after": change.after,
            "p": change.p,
            "gates": len(found),
        }
        for (metric, _), found in series.items()
        for change in change_points([day["value"] for day in found])
    ]


def to_markdown(found: History) -> str:
    """A table, newest last, and the changes of level below it."""
    lines = ["| when | gate | verdict | baseline | candidate | metric | loss | 95 % interval | could see |"]
    lines.append("|---" * 9 + "|")
    for row in found.rows:
        measured = row["metric"] is not None
        loss = f"{row['loss']:+.2%}" if measured else "—"
        span = f"{row['low']:+.2%} to {row['high']:+.2%}" if measured else "—"
        least = f"{row['detectable']:.2%}" if measured else "—"
        cells = [row["utc"], row["gate"], row["verdict"], row["baseline"], row["candidate"]]
        cells += [row["metric"] or "—", loss, span, least]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    if found.changes:
        lines += ["", f"Levels that changed (by ranks; {ALARM:.0%} of series without a change show one):", ""]
    for change in found.changes:
        unit = gated(change["metric"]).quantity.unit
        before, after = (format_value(change[side], unit) for side in ("before", "after"))
        ratio = f"{change['after'] / change['before']:.3f}x, " if change["before"] else ""
        since = f"since {change['since']} ({change['gate']})"
        lines.append(f"- {change['metric']}: {before} to {after} {since}, {ratio}p = {change['p']:.3f}")
    return "\n".join(lines)
