"""Energy of the CPU packages, from counters that wrap around."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbench.harness.sensors.rapl import RaplSensor, packages


def zone(powercap: Path, name: str, energy_uj: int, most_uj: int = 1_000_000) -> Path:
    path = powercap / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{most_uj}\n")
    return path


def test_packages_count_and_their_parts_do_not(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        zone(tmp_path, name, 5)
    assert [each.name for each in packages(tmp_path)] == ["intel-rapl:0", "intel-rapl:1"]
    (tmp_path / "intel-rapl").mkdir()
    assert len(packages(tmp_path)) == 2


def test_joules_since_it_was_opened_over_a_wrap(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", 900_000), zone(tmp_path, "intel-rapl:1", 100)
    sensor = RaplSensor([str(first), str(second)])
    assert sensor.sample() == [{"device": -1, "energy_j": 0.0}]
    zone(tmp_path, "intel-rapl:0", 950_000)
    zone(tmp_path, "intel-rapl:1", 50_100)
    assert sensor.sample()[0]["energy_j"] == pytest.approx(0.1)
    zone(tmp_path, "intel-rapl:0", 49_999)  # 50,001 to the end of its range, and 49,999 from 0 on
    assert sensor.sample()[0]["energy_j"] == pytest.approx(0.2)


def test_a_system_without_counters_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no RAPL counters"):
        packages(tmp_path)
