"""A bundle: run and experiment directories in one zip file, read in place.

`bundle.zip/run-1` is a path like one on disk, and `read_bytes`, `is_file` and `is_dir` take both, so that
nothing is unpacked. A bundle comes from a stranger: its directory is checked before a byte of it is read, and
every file against the digest in `bundle.json` when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from backbench.errors import INVALID, ReportError, shown
from backbench.reports.record.schema import check_version

BUNDLE_FILE = "bundle.json"
BUNDLE_VERSION = 1
SUFFIX = ".zip"

MOST_BYTES = 2**30
"""Of all files of a bundle together, unpacked."""
MOST_FILES = 20_000

RUN, EXPERIMENT = "run", "experiment"
NAME = re.compile(
    rf"{BUNDLE_FILE}|{EXPERIMENT}-[0-9]+/experiment\.json"
    rf"|({RUN}-[0-9]+|{EXPERIMENT}-[0-9]+/[0-9]+)/(run\.json|(requests|steps|telemetry)\.parquet)"
)
"""What a file in a bundle may be called; nothing else is looked at, written out or followed."""

UNREADABLE = (BadZipFile, OSError, EOFError, struct.error, zlib.error, ValueError, RuntimeError)
"""What zipfile raises on a damaged or hostile file."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, checked."""

    path: Path
    archive: ZipFile
    files: Mapping[str, ZipInfo]

    def read(self, name: str) -> bytes:
        """A file's bytes; no more of them than the zip's directory says."""
        info = self.files[name]
        try:
            with self.archive.open(info) as file:
                return file.read(info.file_size)
        except UNREADABLE as error:
            raise _damaged(self.path, f"{name}: {_said(error)}") from None

    @property
    def entries(self) -> list[str]:
        """run-1, run-2, experiment-1, ...: what was packed, in that order."""
        found = {name.split("/")[0] for name in self.files if "/" in name}
        return sorted(found, key=lambda name: int(name.rpartition("-")[2]))


def expand(path: Path) -> list[Path]:
    """The run and experiment directories in a bundle; any other path alone."""
    found = _inside(path)
    if found is None or found[1]:
        return [path]
    return [path / entry for entry in found[0].entries]


def read_object(file: Path, what: str, version: int) -> dict[str, Any]:
    """A JSON object, on disk or in a bundle. ReportError where it cannot be read or is no such `what`."""
    try:
        data = json.loads(read_bytes(file).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{file} cannot be read: {type(error).__name__}; restore it.") from None
    if not isinstance(data, dict):
        raise ReportError(f"{file} holds no {what}.")
    check_version(data.get("schema_version"), str(file), (version,))
    return data


def read_bytes(path: Path) -> bytes:
    """A file's bytes, on disk or in a bundle; OSError where there is none, ReportError if it is damaged."""
    found = _inside(path)
    if found is None:
        return path.read_bytes()
    bundle, name = found
    if name not in bundle.files:
        raise FileNotFoundError(2, "No such file in the bundle", str(path))
    return bundle.read(name)


def is_file(path: Path) -> bool:
    """Whether there is such a file, on disk or in a bundle."""
    found = _inside(path)
    return path.is_file() if found is None else found[1] in found[0].files


def is_dir(path: Path) -> bool:
    """Whether there is such a directory, on disk or in a bundle; a bundle itself is one."""
    found = _inside(path)
    if found is None:
        return path.is_dir()
    return not found[1] or any(name.startswith(f"{found[1]}/") for name in found[0].files)


def _inside(path: Path) -> tuple[Bundle, str] | None:
    """The bundle that a path leads into, and the name inside it, "" at its root; None = it is on disk."""
    for above in (path, *path.parents):
        if above.suffix.lower() == SUFFIX and above.is_file():
            told = above.stat()
            return _open(above, told.st_size, told.st_mtime_ns), path.relative_to(above).as_posix().strip(".")
    return None


@lru_cache(maxsize=16)
def _open(path: Path, size: int, mtime_ns: int) -> Bundle:
    """The checked bundle; size and time are there to tell a replaced file from the one that was opened."""
    try:
        archive = ZipFile(path)
        infos = archive.infolist()
    except UNREADABLE as error:
        raise ReportError(
            f"{path} is no whole zip file ({_said(error)}); copy it or pack it again with `bench pack`."
        ) from None
    if (odd := _hostile(infos, size)) is not None:
        archive.close()
        raise ReportError(f"{path} is no bundle of `bench pack`: {odd}; nothing of it was read.")
    bundle = Bundle(path, archive, {info.filename: info for info in infos})
    _check_digests(bundle)
    return bundle


def _hostile(infos: list[ZipInfo], size: int) -> str | None:
    """The first thing in a zip's directory that no bundle has, in a few words."""
    if len(infos) > MOST_FILES:
        return f"it has {len(infos):,} files, more than {MOST_FILES:,}"
    seen: set[str] = set()
    for info in infos:
        if not NAME.fullmatch(info.filename) or info.orig_filename != info.filename:
            return f"it holds {shown(info.orig_filename, 60)}, which no run directory has"
        if info.filename in seen:
            return f"it holds {info.filename} twice"
        seen.add(info.filename)
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            return f"{info.filename} is a link or no regular file"
        if info.flag_bits & 1 or info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            return f"{info.filename} is encrypted or compressed in another way than deflate"
    if (total := sum(info.file_size for info in infos)) > MOST_BYTES:
        return f"it unpacks to {total / 2**30:,.1f} GiB, more than {MOST_BYTES / 2**30:g} GiB"
    if sum(info.compress_size for info in infos) > size:
        return "its files overlap"
    return None if BUNDLE_FILE in seen else f"it holds no {BUNDLE_FILE}"


def _check_digests(bundle: Bundle) -> None:
    """Raises ReportError where bundle.json is none, of another version, or does not fit the files."""
    where = f"{bundle.path}/{BUNDLE_FILE}"
    try:
        data = json.loads(bundle.read(BUNDLE_FILE))
    except (ValueError, RecursionError):
        raise _damaged(bundle.path, f"{BUNDLE_FILE} is no JSON") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    check_version(version, where, (BUNDLE_VERSION,))
    digests: Any = data.get("files")
    if not isinstance(digests, dict) or digests.keys() != bundle.files.keys() - {BUNDLE_FILE}:
        raise _changed(bundle.path, f"{BUNDLE_FILE} lists other files than are there")
    if not digests:
        raise ReportError(f"{bundle.path} holds no run.")
    for name, digest in digests.items():
        if hashlib.sha256(bundle.read(name)).hexdigest() != digest:
            raise _changed(bundle.path, f"{name} is not the file that was packed (its digest differs)")


def _damaged(path: Path, why: str) -> ReportError:
    return ReportError(f"{path} is damaged ({why}); copy it again, or pack it again with `bench pack`.")


def _changed(path: Path, why: str) -> ReportError:
    return ReportError(f"{path} was changed after it was packed: {why}; ask for it again.", exit_code=INVALID)


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:120] or type(error).__name__
