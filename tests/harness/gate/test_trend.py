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
    found = history(tmp_path)
    rows, odd = found.rows, found.odd
    assert [row["gate"] for row in rows] == ["z", "b", "c/deep"] and not odd
    table = to_markdown(found).splitlines()
    assert table[2].count("main (ababababab)") == 1 and "--backend a\\|b" in table[2]
    assert "| +1.00% | -1.00% to +2.00% | 1.60% |" in table[2] and "| invalid |" in table[-1]


def test_what_is_no_gate_is_named_and_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a", "2031-02-01T00:00:00+00:00")
    write(tmp_path / "b", "2031-02-01T00:00:00+00:00", schema_version=9)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "gate.json").write_text("[]")
    found = history(tmp_path)
    assert len(found.rows) == 1 and len(found.odd) == 2


def nights(folder: Path, levels: list[float], month: int = 1, **changes: Any) -> None:
    for day, level in enumerate(levels):
        pairs = [
            {"void": [], "values": {"throughput": [400.0, level * slow]}, "seed": 0}
            for slow in (0.99, 1, 1.2)
        ]
        pairs.append({"void": ["throttled"], "values": {"throughput": [400.0, 1.0]}, "seed": 0})
        content = {
            "fingerprint": {"hard": {"system.device.name": "card"}, "soft": {}},
            "policy": {"workload": "synthetic", "options": []},
            "pairs": pairs,
        }
        write(folder / f"{day:02d}", f"2031-{month:02d}-{day + 1:02d}T00:00:00+00:00", **content | changes)


def test_a_level_that_changed_is_told_with_its_day(tmp_path: Path) -> None:
    nights(tmp_path, [400.0 + day % 3 for day in range(10)] + [360.0 + day % 3 for day in range(8)])
    (change,) = history(tmp_path).changes
    assert change["since"] == "2031-01-11T00:00:00+00:00" and change["gate"] == "10"
    assert (change["before"], change["after"], change["gates"]) == (401.0, 361.0, 18)
    said = to_markdown(history(tmp_path)).splitlines()[-1]
    assert said.startswith("- throughput: 401 tok/s to 361 tok/s since 2031-01-11") and "0.900x" in said


def test_levels_of_two_machines_or_arms_are_two_series(tmp_path: Path) -> None:
    nights(tmp_path / "a", [400.0 + day % 3 for day in range(10)])
    other = {"fingerprint": {"hard": {"system.device.name": "another"}, "soft": {}}}
    nights(tmp_path / "b", [360.0 + day % 3 for day in range(8)], month=2, **other)
    arms = {"baseline": {}, "candidate": {"options": "--backend triton"}}
    nights(tmp_path / "c", [900.0 + day % 3 for day in range(8)], month=3, arms=arms)
    found = history(tmp_path)
    assert not found.changes and not found.odd and "Levels" not in to_markdown(found)


@pytest.mark.parametrize("folder", ["", "none"])
def test_no_gates_are_one_line(tmp_path: Path, folder: str) -> None:
    with pytest.raises(HarnessError, match="bench gate"):
        history(tmp_path / folder)
