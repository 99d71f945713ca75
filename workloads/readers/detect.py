"""The formats there are, and which one a file has: told by its first line, never by its name.

A folder is of the format of whose files it has some; those are told by their names.
"""

from __future__ import annotations

from pathlib import Path

from backbench.declared import declared
from backbench.errors import WorkloadError, shown
from backbench.workloads import readers
from backbench.workloads.readers.format import Format, read_head
from backbench.workloads.readers.text import is_file


def formats() -> tuple[Format, ...]:
    """What the modules beside this one declare as `FORMAT`, by name; those without one are helpers."""
    return declared(readers, "FORMAT")


def detect(path: Path) -> Format | None:
    """The format that knows most of the first line's names, or a folder's; None: no file, and no such folder.

    Raises:
        WorkloadError: no format knows the file, or two know it alike.
    """
    if not is_file(path):
        return _of_folder(path)
    head = read_head(path)
    known = formats()
    scores = [each.recognise(head) for each in known]
    best = max(scores)
    found = [each for each, score in zip(known, scores, strict=True) if score == best > 0]
    if not found:
        raise WorkloadError(
            f"{shown(str(path), 150)} is no trace known here (its first line: {shown(head.text)}); formats: "
            f"{', '.join(each.name for each in known)}."
        )
    if len(found) > 1:
        raise WorkloadError(
            f"{shown(str(path), 150)} may be {' or '.join(each.name for each in found)}; leave out the names "
            "that belong to the other."
        )
    return found[0]


def _of_folder(path: Path) -> Format | None:
    try:
        if not path.is_dir():
            return None
        return next((each for each in formats() if each.folder and any(path.glob(each.folder))), None)
    except (OSError, ValueError):
        # Too long, not to be read, or with a NUL: nothing that could be opened.
        return None
