"""Measured launches as data: JSON files keyed by architecture and compute units.

Files are read when a kernel's table is first asked for and never while serving; what nobody measured runs
on a rule written in Python. An entry holds for the kernel sources it was measured with and no others.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backbench.backends.interface import Config, Crossover
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
    """`kernel_hash` of the kernels as they were measured."""
    config: Config | None
    """None = the vendor's library was fastest."""
    us: float | None = None
    """Of a product by a quantized or sparse weight: what a call takes, in a graph and with cold caches. Where
    several numbers of rows of the bucket were timed, at the one where it does worst beside `dense_us`."""
    dense_us: float | None = None
    """What the fastest product by the dense weight took there, timed alike in the same process."""

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


def crossover(entries: Mapping[int, Entry | None]) -> Crossover | None:
    """From a shape's entries by their buckets' rows; None = none was timed beside the dense product."""
    timed = [
        (rows, entry.us < entry.dense_us)
        for rows, entry in sorted(entries.items())
        if entry is not None and entry.us is not None and entry.dense_us is not None
    ]
    if not timed:
        return None
    slower_from = next((rows for rows, faster in timed if not faster), None)
    below = [rows for rows, _ in timed if slower_from is None or rows < slower_from]
    return Crossover(max(below, default=0), slower_from)


def place(arch: str, units: int) -> str:
    """What a table is keyed and its file named by."""
    return f"{arch}-{units}"


def kernel_hash(file: Path, kernels: Collection[str]) -> str:
    """16 hex digits over the text of `triton.jit` functions in `file` and of what they call and read.

    Followed are jit functions and `tl.constexpr` constants at the top of `file` and of files beside it that
    it imports from; the text around them, and where they stand, does not count. Nothing is imported.

    Raises:
        BackendError: `file` has no such kernel.
    """
    texts: dict[tuple[str, str], str] = {}
    files: dict[Path, Parts] = {}
    waiting = [(file, kernel) for kernel in kernels]
    for where, name in waiting:
        if where not in files:
            files[where] = _jit_parts(where)
        known, imported = files[where]
        if name in imported:
            waiting.append((imported[name], name))
        elif name in known and (where.name, name) not in texts:
            texts[where.name, name], used = known[name]
            waiting += [(where, other) for other in used]
        elif where == file and name in kernels:
            raise BackendError(f"{file.name} has no triton.jit function {name!r}; mend the table of kernels.")
    digest = hashlib.sha256()
    for (_, name), text in sorted(texts.items(), key=lambda item: item[0][1]):
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:16]


Parts = tuple[dict[str, tuple[str, tuple[str, ...]]], dict[str, Path]]
"""Name -> (text, names in it) of each jit function and constant; name -> file of each import beside."""


def _jit_parts(file: Path) -> Parts:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    known: dict[str, tuple[str, tuple[str, ...]]] = {}
    imported: dict[str, Path] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom):
            beside = file.with_name(f"{(node.module or '').rpartition('.')[2]}.py")
            if beside.is_file():
                imported |= {alias.asname or alias.name: beside for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            if not any("triton.jit" in ast.unparse(each) for each in node.decorator_list):
                continue
            source = "\n".join(lines[node.decorator_list[0].lineno - 1 : node.end_lineno])
            used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
            known[node.name] = source, tuple(sorted(used - {node.name}))
        elif isinstance(node, ast.Assign) and "constexpr" in ast.unparse(node.value):
            known[ast.unparse(node.targets[0])] = ast.unparse(node.value), ()
    return known, imported


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
        if not all(isinstance(us, float | int | None) for each in entries for us in (each.us, each.dense_us)):
            raise TypeError("a time is neither a number nor null")
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
    lines = ",\n".join(
        "  " + json.dumps(_written(entry)) for entry in sorted(table.entries.values(), key=_order)
    )
    text = f'{{\n "place": {json.dumps(table.place)},\n "entries": [\n{lines}\n ]\n}}\n'
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise BackendError(f"{file} cannot be written ({error.strerror}); give another --out.") from None


def _written(entry: Entry) -> dict[str, Any]:
    """Times that were not taken are left out."""
    return {key: value for key, value in asdict(entry).items() if key == "config" or value is not None}


def _order(entry: Entry) -> tuple[Any, ...]:
    """Numbers inside a bucket sort by value."""
    words = [
        (word.rstrip("0123456789"), int("0" + word[len(word.rstrip("0123456789")) :]))
        for word in entry.bucket.split()
    ]
    return entry.operation, words, entry.dtype
