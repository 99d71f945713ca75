"""The house's arrows: no import circle anywhere, imports for type checking included.

Which room may import which is import-linter's contract in pyproject.toml.
"""

from __future__ import annotations

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest


def test_no_module_imports_itself_through_others() -> None:
    graph = grimp.build_graph("backbench", exclude_type_checking_imports=False)
    arrows = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(arrows) > 150  # the links of the rooms were followed
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as circle:
        raise AssertionError(f"import circle: {' -> '.join(circle.args[1])}") from None


@pytest.mark.parametrize("room", ["backends", "engine", "harness", "reports", "workloads"])
def test_a_users_own_folder_of_a_rooms_name_breaks_nothing(room: str, tmp_path: Path) -> None:
    (tmp_path / room).mkdir()
    (tmp_path / room / "__init__.py").write_text("raise RuntimeError(__file__)")
    code = "from backbench.harness.cli import main; main(['workloads'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sharegpt" in done.stdout
