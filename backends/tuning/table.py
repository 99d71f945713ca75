"""Measured launches as data: JSON files keyed by architecture and compute units.

Files are read when a kernel's table is first asked for and never while serving; what nobody measured runs
on a rule written in Python. An entry holds for the kernel sources it was measured with and no others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backbench.backends.interface import Config
from backbench.errors import BackendError


@dataclass(frozen=True)
class Entry:
    """The fastest launch found for one bucket of shapes."""

    operation: str
    """Such as "gemm"."""
    bucket: str
    """The shapes it serves, such as "m16 n4096 k4096"."""
    dtype: str
    sources: str
    """`source_hash` of the kernel's files as they were measured."""
    config: Config | None
    """None = the vendor's library was fastest."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.operation, self.bucket, self.dtype


@dataclass(frozen=True)
class Table:
    """Every entry for one kind of device."""

    place: str
    """Architecture and compute units, such as "sm90-132"."""
    entries: Mapping[tuple[str, str, str], Entry]

    def lookup(self, operation: str, bucket: str, dtype: str, sources: str) -> Entry | None:
        """The entry measured with these very sources, or None."""
        entry = self.entries.get((operation, bucket, dtype))
        return entry if entry is not None and entry.sources == sources else None

    def complaint(self, operation: str, bucket: str, dtype: str, sources: str) -> str | None:
        """Why `lookup` gives nothing; None = it gives an entry."""
        entry = self.entries.get((operation, bucket, dtype))
        if entry is None:
            return f"no entry for {self.place}"
        return None if entry.sources == sources else f"entry for {self.place} is of other kernel sources"

    def merged(self, entries: Iterable[Entry]) -> Table:
        """This table with `entries` added, in place of those with the same operation, bucket and dtype."""
        return replace(self, entries=MappingProxyType({**self.entries, **{e.key: e for e in entries}}))


def place(arch: str, units: int) -> str:
    """What a table is keyed and its file named by."""
    return f"{arch}-{units}"


def source_hash(files: Iterable[Path]) -> str:
    """16 hex digits over the files' names and text, whatever their line ends."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_text(encoding="utf-8").encode() + b"\0")
    return digest.hexdigest()[:16]


def read(file: Path, where: str) -> Table:
    """The table of `where` in `file`; empty where there is no such file.

    Raises:
        BackendError: the file is not a table, or one of another kind of device.
    """
    if not file.is_file():
        return Table(where, MappingProxyType({}))
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        entries = [Entry(**each) for each in found["entries"]]
        if not all(isinstance(entry.config, dict | None) for entry in entries):
            raise TypeError("a config is neither an object nor null")
        held = found["place"]
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(f"{file} is no tuning table ({error}); remove it or tune again.") from None
    if held != where:
        raise BackendError(f"{file} was tuned on {held}, not on {where}; give another --out.")
    return Table(where, MappingProxyType({})).merged(entries)


def write(file: Path, table: Table) -> None:
    """Write the table, sorted, one entry a line.

    Raises:
        BackendError: the file cannot be written.
    """
    entries = [asdict(entry) for entry in sorted(table.entries.values(), key=_order)]
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    text = f'{{\n "place": {json.dumps(table.place)},\n "entries": [\n{lines}\n ]\n}}\n'
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise BackendError(f"{file} cannot be written ({error.strerror}); give another --out.") from None


def _order(entry: Entry) -> tuple[Any, ...]:
    """Numbers inside a bucket sort by value."""
    words = [
        (word.rstrip("0123456789"), int("0" + word[len(word.rstrip("0123456789")) :]))
        for word in entry.bucket.split()
    ]
    return entry.operation, words, entry.dtype
