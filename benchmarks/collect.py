"""Collect the measured rows: `python benchmarks/collect.py` merges benchmarks/parts into h200.json.

Each part is what one benchmark script wrote, with the conditions it ran under; a row keeps the name of its
part, so that its conditions can be found. Two parts may not hold the same row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def main() -> None:
    rows: list[dict[str, Any]] = []
    conditions: dict[str, Any] = {}
    for path in sorted((HERE / "parts").glob("*.json")):
        part = json.loads(path.read_text())
        conditions[path.stem] = part["conditions"]
        rows += [
            {key: row.get(key) for key in ("name", "value", "unit", "spread")} | {"part": path.stem}
            for row in part["rows"]
        ]
    names = [row["name"] for row in rows]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SystemExit(f"Measured twice: {', '.join(sorted(twice))}; remove one of the parts.")
    rows.sort(key=lambda row: row["name"])
    collected = {"conditions": conditions, "rows": rows}
    (HERE / "h200.json").write_text(json.dumps(collected, indent=1) + "\n")
    print(f"{len(rows)} rows from {len(conditions)} parts")


if __name__ == "__main__":
    main()
