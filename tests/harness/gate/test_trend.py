"""The history of gates as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backbench.errors import HarnessError
from backbench.harness.gate.trend import history, to_markdown


def write(folder: Path, utc: str, **changes: Any) -> None:
    finding = {"metric": "throughput", "loss": 0.01, "low": -0.01, "high": 0.02, "margin": 0.03}
    content: dict[str, Any] = {
        "schema_version": 1,
        "utc": utc,
        "verdict": "pass",
        "arms": {"baseline": {"ref": "main", "code": "ab" * 20}, "candidate": {"options": "--backend a|b"}},
        "findings": [finding | {"detectable": 0.016}],
    }
    folder.mkdir(parents=True)
    (folder / "gate.json").write_text(json.dumps(content | changes))


def test_gates_stand_in_the_order_of_time(tmp_path: Path) -> None:
    write(tmp_path / "b", "2031-02-01T00:00:00+00:00")
    write(tmp_path / "c" / "deep", "2031-03-01T00:00:00+00:00", verdict="invalid", findings=[])
    write(tmp_path / "z", "2031-01-01T00:00:00+00:00")
    rows, odd = history(tmp_path)
    assert [row["gate"] for row in rows] == ["z", "b", "c/deep"] and not odd
    table = to_markdown(rows).splitlines()
    assert table[2].count("main (ababababab)") == 1 and "--backend a\\|b" in table[2]
    assert "| +1.00% | -1.00% to +2.00% | 1.60% |" in table[2] and "| invalid |" in table[-1]


def test_what_is_no_gate_is_named_and_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a", "2031-02-01T00:00:00+00:00")
    write(tmp_path / "b", "2031-02-01T00:00:00+00:00", schema_version=9)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "gate.json").write_text("[]")
    rows, odd = history(tmp_path)
    assert len(rows) == 1 and len(odd) == 2


@pytest.mark.parametrize("folder", ["", "none"])
def test_no_gates_are_one_line(tmp_path: Path, folder: str) -> None:
    with pytest.raises(HarnessError, match="bench gate"):
        history(tmp_path / folder)
