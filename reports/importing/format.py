"""What an import declares about itself, and which of them a file is of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbench.declared import declared
from backbench.errors import ReportError
from backbench.reports import importing
from backbench.reports.importing.foreign import Foreign, digest_of
from backbench.reports.importing.foreign import write as write_foreign
from backbench.reports.record import RunDirectory, RunRecord

MOST_BYTES = 2**30
Documents = Sequence[dict[str, Any]]
"""The objects of a file: one, or one a line."""


@dataclass(frozen=True)
class Import:
    """A format. Its module in `reports/importing` holds it as `IMPORT`; nothing else names it."""

    name: str
    description: str
    recognises: Callable[[dict[str, Any]], bool]
    """Whether the file's first object is of this format."""
    read: Callable[[Path, Documents], list[Foreign]]
    """Its runs; ReportError, or LookupError, TypeError and the like where it is malformed."""


def imports() -> tuple[Import, ...]:
    """What the modules beside this one declare as `IMPORT`, by name; those without one are helpers."""
    return declared(importing, "IMPORT")


def import_file(path: Path, out: Path) -> list[tuple[RunDirectory, RunRecord]]:
    """Make a run directory of the file's run at `out`; of several runs, `out`/1, `out`/2, ...

    Raises ReportError where the file cannot be read, is of no known format, or `out` is taken.
    """
    content = read_limited(path)
    documents = parse(content, path)
    wanted = next((each for each in imports() if each.recognises(documents[0])), None)
    if wanted is None:
        known = ", ".join(each.name for each in imports())
        raise ReportError(f"{path} is of no format that is known here ({known}).")
    try:
        runs = wanted.read(path, documents)
    except ReportError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:100]
        raise ReportError(f"{path} is not as {wanted.name} writes it ({why}).") from None
    if not runs:
        raise ReportError(f"{path} holds no run; there is nothing to import.")
    places = [out] if len(runs) == 1 else [out / str(number) for number in range(1, len(runs) + 1)]
    digest = digest_of(content)
    written = [write_foreign(run, path, digest, place) for run, place in zip(runs, places, strict=True)]
    return [(RunDirectory.open(place), record) for place, record in zip(places, written, strict=True)]


def read_limited(path: Path) -> bytes:
    """The file's bytes; ReportError where it cannot be read or is too large."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from None
    if len(content) > MOST_BYTES:
        raise ReportError(f"{path} is larger than {MOST_BYTES / 2**30:g} GiB; cut it to the run you want.")
    return content


def parse(content: bytes, path: Path) -> Documents:
    """The object of a JSON file, or one a line; ReportError where it is neither."""
    try:
        decoded = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ReportError(f"{path} is no UTF-8 text; give the tool's JSON file.") from None
    try:
        found = json.loads(decoded)
        documents = found if isinstance(found, list) else [found]
    except (ValueError, RecursionError):
        documents = _lines(decoded, path)
    if not documents or not all(isinstance(each, dict) for each in documents):
        raise ReportError(f"{path} holds no JSON object; give the tool's JSON file.")
    return documents


def _lines(decoded: str, path: Path) -> list[Any]:
    documents = []
    for place, line in enumerate(decoded.splitlines(), 1):
        if not line.strip():
            continue
        try:
            documents.append(json.loads(line))
        except (ValueError, RecursionError):
            raise ReportError(f"{path}, line {place}, is no JSON; is the file cut off?") from None
    return documents
