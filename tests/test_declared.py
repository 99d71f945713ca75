"""What a folder's files declare is found by itself, in order, and helpers declare nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from backbench.declared import declared


def test_files_are_found_and_sorted_by_what_they_declare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "declaring_things"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("OTHER = 1\n")
    for file, name in (("a", "later"), ("b", "earlier")):
        (package / f"{file}.py").write_text(f"class THING:\n    name = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    import declaring_things  # type: ignore[import-not-found]

    try:
        assert [each.name for each in declared(declaring_things, "THING")] == ["earlier", "later"]
        assert declared(declaring_things, "NONE") == ()
    finally:
        for name in [name for name in sys.modules if name.startswith("declaring_things")]:
            del sys.modules[name]
