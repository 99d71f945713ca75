"""The house's arrows: no import circle anywhere, imports for type checking included.

Which room may import which is import-linter's contract in pyproject.toml.
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp


def test_no_module_imports_itself_through_others() -> None:
    graph = grimp.build_graph("backbench", exclude_type_checking_imports=False)
    arrows = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(arrows) > 150  # the links of the rooms were followed
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as circle:
        raise AssertionError(f"import circle: {' -> '.join(circle.args[1])}") from None
