"""Packing runs for others: every record redacted and signed again, verified, in one zip of the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from backbench.errors import INVALID, ReportError, shown
from backbench.reports.metrics import validity
from backbench.reports.record import RECORD_FILE, REQUESTS_FILE, RunDirectory, RunRecord, sign
from backbench.reports.record.bundle import (
    BUNDLE_FILE,
    BUNDLE_VERSION,
    EXPERIMENT,
    RUN,
    SUFFIX,
    expand,
    read_bytes,
)
from backbench.reports.record.digests import TABLES
from backbench.reports.record.experiment import EXPERIMENT_FILE, is_experiment, read_experiment
from backbench.reports.record.redaction import Names, Redaction, unique
from backbench.reports.verify import examine, examine_stored

if TYPE_CHECKING:
    import pyarrow as pa

WHEN = (1980, 1, 1, 0, 0, 0)
"""The time of every file in a bundle: the earliest that a zip knows."""


@dataclass(frozen=True)
class Packed:
    """What a bundle holds."""

    path: Path
    entries: dict[str, list[str]]
    """Name in the bundle -> the fields that were redacted."""


def pack(paths: Sequence[Path], out: Path, words: Sequence[str] = ()) -> Packed:
    """Write run and experiment directories to the bundle `out`; the same runs give the same bytes.

    Absolute paths, host and user names, addresses, UUIDs and serial numbers leave every text, and `words`
    wherever they stand. No number that was measured changes.

    Raises:
        ReportError: a run cannot be read or does not verify, or `out` is there or cannot be written.
    """
    if out.suffix.lower() != SUFFIX:
        raise ReportError(f"{out} must end in {SUFFIX}: bundles are told by it.")
    if out.exists():
        raise ReportError(f"{out} exists; choose another -o or remove it.")
    if any(not word.strip() for word in words):
        raise ReportError("A word to redact must not be empty.")
    sources = [each for path in paths for each in expand(path)]
    with tempfile.TemporaryDirectory() as folder:
        entries: dict[str, list[str]] = {}
        names = Names.here()
        for number, source in enumerate(sources, 1):
            kind = EXPERIMENT if is_experiment(source) else RUN
            copy = Path(folder) / f"{kind}-{number}"
            redaction = Redaction(tuple(words), names)
            (_copy_experiment if kind == EXPERIMENT else _copy_run)(source, copy, redaction)
            if problems := examine_stored(copy).problems:
                raise _refused(source, problems[0])
            entries[copy.name] = list(redaction.changed)
        _write(Path(folder), out)
    return Packed(out, entries)


def _copy_experiment(source: Path, copy: Path, redaction: Redaction) -> None:
    """The experiment with its arms and runs under names that say nothing."""
    experiment = read_experiment(source)
    copy.mkdir()
    arms: dict[str, str] = {}
    for arm in experiment.arms:
        arms[arm] = unique(redaction.text(arm, "experiment.arms"), arms.values())
    runs = []
    for number, listed in enumerate(experiment.runs, 1):
        _copy_run(experiment.directory(listed).path, copy / str(number), redaction)
        runs.append(replace(listed, path=str(number), arm=arms[listed.arm]))
    command = redaction.text(experiment.command, "experiment.command")
    replace(experiment, path=copy, arms=tuple(arms.values()), runs=tuple(runs), command=command).write()


def _copy_run(source: Path, copy: Path, redaction: Redaction) -> None:
    """The run, redacted and signed again; refused where it does not verify."""
    original = RunDirectory.open(source)
    record = original.read_record()
    if problems := examine(original).problems:
        raise _refused(source, problems[0])
    directory = RunDirectory.create(copy)
    for name in TABLES:
        content = read_bytes(original.path / name)
        if name == REQUESTS_FILE:
            content = _redacted_requests(content, redaction)
        (directory.path / name).write_bytes(content)
    hidden = RunRecord(**redaction.data(asdict(record)))
    reasons = validity.of_record(hidden, directory.read_telemetry())  # they quote what was redacted
    before = record.run.get("redacted") or []
    run = hidden.run | {"redacted": sorted({*before, *redaction.changed})}
    directory.write_record(sign(directory, replace(hidden, run=run, validity=reasons)))


def _redacted_requests(content: bytes, redaction: Redaction) -> bytes:
    """The table with redacted errors and numbered sessions; the very same bytes where nothing changes."""
    import pyarrow as pa
    import pyarrow.parquet

    with pa.parquet.ParquetFile(pa.BufferReader(content)) as file:
        table = file.read()
    changed = table
    numbers: dict[str, str] = {}
    for name in ("session", "error"):
        values = table.column(name).to_pylist()
        if name == "session":
            found = [None if each is None else _numbered(each, numbers) for each in values]
        else:
            found = [None if each is None else redaction.text(each, "requests.error") for each in values]
        if found != values:
            redaction.changed[f"requests.{name}"] = None
            changed = _with_column(changed, name, found)
    if changed is table:
        return content
    written = io.BytesIO()
    pa.parquet.write_table(changed, written)
    return written.getvalue()


def _numbered(session: str, numbers: dict[str, str]) -> str:
    """session-1, session-2, ... in the order in which sessions are first seen."""
    return numbers.setdefault(session, f"session-{len(numbers) + 1}")


def _with_column(table: pa.Table, name: str, values: list[str | None]) -> pa.Table:
    import pyarrow as pa

    place = table.schema.get_field_index(name)
    kind = table.schema.field(place)
    return table.set_column(place, kind, pa.array(values, kind.type))


def _write(folder: Path, out: Path) -> None:
    files = {each.relative_to(folder).as_posix(): each.read_bytes() for each in _files(folder)}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest = {"schema_version": BUNDLE_VERSION, "files": digests}
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        # Stored, not compressed: the tables are compressed already, and zlibs differ in what they write.
        with ZipFile(temporary, "w", ZIP_STORED) as archive:
            for name, content in {BUNDLE_FILE: text.encode(), **files}.items():
                info = ZipInfo(name, WHEN)
                info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
                archive.writestr(info, content)
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ReportError(f"Cannot write {out}: {error.strerror}; choose another -o.") from None


def _files(folder: Path) -> Iterator[Path]:
    """The records and tables of a folder, in an order of their names."""
    names = {RECORD_FILE, EXPERIMENT_FILE, *TABLES}
    return iter(sorted(each for each in folder.rglob("*") if each.is_file() and each.name in names))


def _refused(source: Path, problem: str) -> ReportError:
    return ReportError(
        f"{source} does not verify ({shown(problem, 120)}), and a bundle holds only what does; "
        "`bench verify` says more.",
        exit_code=INVALID,
    )
