"""docs/map.md names every module, and fits on a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("workloads", "backends", "engine", "harness", "reports")


def section(room: str) -> str:
    text = (ROOT / "docs" / "map.md").read_text()
    return text.split(f"## {room}:")[1].split("\n## ")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_is_named_in_its_rooms_section(room: str) -> None:
    named = set(re.findall(r"[a-z0-9_]+", section(room)))
    modules = {path.stem for path in (ROOT / room).rglob("*.py")} - {"__init__"}
    assert modules - named == set()


def test_it_fits_on_a_page() -> None:
    assert len((ROOT / "docs" / "map.md").read_text().splitlines()) <= 60
