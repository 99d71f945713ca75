"""The history of gates: what each said, and by how much. It informs and never blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from backbench.errors import HarnessError
from backbench.harness.gate.outcome import SCHEMA_VERSION

Row = dict[str, Any]


def history(directory: Path) -> tuple[list[Row], list[str]]:
    """One row a metric and gate under the directory, oldest first; and the files that are no gate.json.

    Raises:
        HarnessError: no such directory, or no gate in it.
    """
    if not directory.is_dir():
        raise HarnessError(f"There is no directory {directory}; `bench gate --out` makes one.")
    rows: list[Row] = []
    odd: list[str] = []
    for file in sorted(directory.rglob("gate.json")):
        try:
            rows += _rows(
                json.loads(file.read_text(encoding="utf-8")), str(file.parent.relative_to(directory))
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            odd.append(f"{file}: {' '.join(str(error).split())}")
    if not rows:
        raise HarnessError(f"There is no gate.json under {directory}; `bench gate` writes them.")
    return sorted(rows, key=lambda row: str(row["utc"])), odd


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
    name = described.get("ref") or described.get("checkout") or described.get("options") or "as installed"
    return f"{name} ({code})" if code and name != described.get("options") else name


def to_markdown(rows: list[Row]) -> str:
    """A table, newest last."""
    lines = ["| when | gate | verdict | baseline | candidate | metric | loss | 95 % interval | could see |"]
    lines.append("|---" * 9 + "|")
    for row in rows:
        measured = row["metric"] is not None
        loss = f"{row['loss']:+.2%}" if measured else "—"
        span = f"{row['low']:+.2%} to {row['high']:+.2%}" if measured else "—"
        least = f"{row['detectable']:.2%}" if measured else "—"
        cells = [row["utc"], row["gate"], row["verdict"], row["baseline"], row["candidate"]]
        cells += [row["metric"] or "—", loss, span, least]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
