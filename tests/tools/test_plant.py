"""The planting tool: on a toy tree, and that its list fits this one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def plant() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        import plant
    finally:
        sys.path.remove(str(TOOLS))
    return plant


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A tree of one module, whose test looks at one of its two functions."""
    root = tmp_path / "toy"
    (root / "tests").mkdir(parents=True)
    (root / "sums.py").write_text(
        "def add(a, b):\n    return a + b\n\n\ndef double(a):\n    return 2 * a\n\n\n"
        "def count_down(a):\n    while a:\n        a -= 1\n    return a\n"
    )
    (root / "tests" / "test_sums.py").write_text(
        "from sums import add, count_down\n\n\ndef test_add():\n    assert add(2, 3) == 5\n\n\n"
        "def test_count_down():\n    assert count_down(3) == 0\n"
    )
    return root


def fault(plant: ModuleType, text: str, planted: str, **changes: Any) -> Any:
    given = {"area": "toy", "fault": text, "where": "*.py", "tests": ("tests/test_sums.py",)}
    return plant.Mutation(text=text, planted=planted, **(given | changes))


@pytest.mark.slow
def test_a_killed_a_surviving_a_hanging_and_a_broken_fault(plant: ModuleType, toy: Path) -> None:
    faults = [
        fault(plant, "return a + b", "return a - b"),
        fault(plant, "return 2 * a", "return 3 * a"),
        fault(plant, "return 2 * a", "return a * 2", survives="the same product"),
        fault(plant, "return a + b", "return a - b", survives="so it was thought"),
        fault(plant, "a -= 1", "a -= 0"),
        fault(plant, "def add(a, b):", "def added(a, b):"),
    ]
    before = (toy / "sums.py").read_text()
    results = plant.plant(toy, faults, jobs=2, timeout_s=20)
    assert [result.outcome for result in results] == [
        plant.KILLED,
        plant.SURVIVED,
        plant.SURVIVED,
        plant.KILLED,
        plant.HUNG,
        plant.BROKEN,
    ]
    assert [result.is_explained for result in results] == [True, False, True, False, True, False]
    assert (toy / "sums.py").read_text() == before, "only copies are touched"
    page = plant.table([*faults, fault(plant, "while a:", "while not a:")], results)
    assert "7 faults, 6 run, 3 killed." in page
    assert "| toy | return 2 * a | `tests/test_sums.py` | survived: the same product |" in page
    assert "| toy | while a: | `tests/test_sums.py` | not run |" in page


def test_tests_that_fail_by_themselves_plant_nothing(plant: ModuleType, toy: Path) -> None:
    (toy / "tests" / "test_sums.py").write_text("def test_wrong():\n    assert False\n")
    with pytest.raises(plant.PlantError, match="do not pass without any fault"):
        plant.plant(toy, [fault(plant, "return a + b", "return a - b")], timeout_s=60)


@pytest.mark.parametrize(
    ("text", "planted", "changes", "complaint"),
    [
        ("return a % b", "return a", {}, r"stands 0 times in \*.py, not once"),
        ("return a", "return b", {}, "stands 2 times"),
        ("return a + b", "return a + b", {}, "plants what already stands there"),
        (
            "return a + b",
            "return a",
            {"tests": ("tests/test_absent.py",)},
            "no tests at tests/test_absent.py",
        ),
        ("return a + b", "return a", {"where": "absent.py"}, "stands 0 times in absent.py"),
    ],
)
def test_a_fault_that_does_not_fit_the_tree_is_refused(
    plant: ModuleType, toy: Path, text: str, planted: str, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(plant.PlantError, match=complaint):
        plant.plant(toy, [fault(plant, text, planted, **changes)])


def test_every_fault_of_the_list_fits_the_tree(plant: ModuleType) -> None:
    """A fault whose text has moved would be planted nowhere: the list is mended with the code."""
    assert len(plant.MUTATIONS) >= 60
    assert len({(each.area, each.fault) for each in plant.MUTATIONS}) == len(plant.MUTATIONS)
    for mutation in plant.MUTATIONS:
        plant.find(plant.ROOT, mutation)


def test_the_command_names_its_mistakes(plant: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert plant.main(["--only", "no such fault"]) == 2
    assert "no fault's area or name holds no such fault" in capsys.readouterr().err
    assert plant.main(["--list", "--only", "preempts the oldest"]) == 0
    assert capsys.readouterr().out == "engine/scheduling/scheduler.py: preempts the oldest\n"
