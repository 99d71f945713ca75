"""The directory of one run: run.json, three Parquet tables and report.html."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backbench.errors import ReportError
from backbench.reports.record.bundle import expand, is_dir, read_bytes
from backbench.reports.record.schema import (
    ADDED_COLUMNS,
    LATER_COLUMNS,
    RECORD_FILE,
    REPORT_FILE,
    REQUEST_COLUMNS,
    REQUESTS_FILE,
    SCHEMA_VERSION,
    STEP_COLUMNS,
    STEPS_FILE,
    TELEMETRY_COLUMNS,
    TELEMETRY_FILE,
    RunRecord,
    check_version,
)

if TYPE_CHECKING:  # imported where used: `bench --help` must not pay for them
    import pandas as pd
    import pyarrow as pa


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run: run.json, three Parquet tables and report.html."""

    path: Path

    @classmethod
    def create(cls, path: Path | str) -> RunDirectory:
        """Make a new directory (an existing one must be empty).

        Raises:
            ReportError: it exists and is not empty, is no directory, or cannot be written.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ReportError(f"{path} exists and is not a directory; choose another --out.")
        try:
            path.mkdir(parents=True, exist_ok=True)
            occupied = any(path.iterdir())
        except OSError as error:
            raise ReportError(f"Cannot create {path}: {error.strerror}; choose another --out.") from None
        if occupied:
            raise ReportError(f"{path} exists and is not empty; choose another --out or remove it.")
        if not os.access(path, os.W_OK | os.X_OK):
            raise ReportError(f"Cannot write in {path}: permission denied; choose another --out.")
        return cls(path)

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """An existing run directory, the run.json inside it, or a bundle of one run."""
        path = Path(path)
        if path.name == RECORD_FILE:
            path = path.parent
        if not is_dir(path):
            raise ReportError(f"There is no run directory {path}; `bench run` makes one.")
        inside = expand(path)
        if len(inside) > 1:
            raise ReportError(f"{path} holds {len(inside)} runs and experiments; name one, like {inside[0]}.")
        return cls(inside[0])

    @property
    def report_path(self) -> Path:
        return self.path / REPORT_FILE

    def write_record(self, record: RunRecord) -> None:
        """Write run.json; a reader sees the old file or the new one, never a part."""
        text = record.to_json()
        self._replace(RECORD_FILE, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def read_record(self) -> RunRecord:
        path = self.path / RECORD_FILE
        try:
            text = read_bytes(path).decode("utf-8")
        except FileNotFoundError:
            raise ReportError(f"{path} is missing; {self.path} is not a whole run directory.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ReportError(
                f"{path} cannot be read ({_one_line(error)}); run again or restore it."
            ) from None
        return RunRecord.from_json(text, str(path))

    def write_requests(self, requests: pd.DataFrame) -> None:
        """`requests` has `REQUEST_COLUMNS`."""
        self._write_table(REQUESTS_FILE, requests, REQUEST_COLUMNS)

    def read_requests(self) -> pd.DataFrame:
        """Nullable integer columns come as Int64; list columns as numpy arrays (unknown counts NaN)."""
        return self._read_table(REQUESTS_FILE, REQUEST_COLUMNS)

    def write_steps(self, steps: pd.DataFrame) -> None:
        """`steps` has `STEP_COLUMNS`."""
        self._write_table(STEPS_FILE, steps, STEP_COLUMNS)

    def read_steps(self) -> pd.DataFrame:
        return self._read_table(STEPS_FILE, STEP_COLUMNS)

    def write_telemetry(self, telemetry: pd.DataFrame) -> None:
        """`telemetry` has `TELEMETRY_COLUMNS`; an empty frame says that nothing was sampled."""
        self._write_table(TELEMETRY_FILE, telemetry, TELEMETRY_COLUMNS)

    def read_telemetry(self) -> pd.DataFrame:
        return self._read_table(TELEMETRY_FILE, TELEMETRY_COLUMNS)

    def _write_table(self, name: str, frame: pd.DataFrame, columns: dict[str, str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        if missing := [column for column in columns if column not in frame.columns]:
            raise ReportError(f"{name} needs the column {missing[0]!r}; the table has {list(frame.columns)}.")
        try:
            table = pa.Table.from_pandas(
                frame[list(columns)], schema=_arrow_schema(columns), preserve_index=False
            ).replace_schema_metadata({"schema_version": str(SCHEMA_VERSION)})
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
            raise ReportError(f"{name} cannot be written: {_one_line(error)}.") from None
        self._replace(name, lambda temporary: pa.parquet.write_table(table, temporary))

    def _read_table(self, name: str, columns: dict[str, str]) -> pd.DataFrame:
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet

        path = self.path / name
        try:
            with pa.parquet.ParquetFile(pa.BufferReader(read_bytes(path))) as file:
                table = file.read()
        except FileNotFoundError:
            raise ReportError(f"{path} is missing; {self.path} is not a whole run directory.") from None
        except (pa.ArrowException, OSError) as error:
            raise ReportError(
                f"{path} is truncated or not Parquet ({_one_line(error)}); run again or restore it."
            ) from None
        version = (table.schema.metadata or {}).get(b"schema_version", b"none").decode()
        check_version(int(version) if version.isdigit() else version, str(path))
        added = {name: value for name, (since, value) in ADDED_COLUMNS.items() if int(version) < since}
        added |= {name: value for name, value in LATER_COLUMNS.items() if name not in table.schema.names}
        expected = {name: kind for name, kind in columns.items() if name not in added}
        if table.schema.names != list(expected):
            odd = sorted(set(table.schema.names) ^ set(expected))
            raise ReportError(f"{path} has other columns than its schema: {', '.join(odd) or 'their order'}.")
        if odd := [
            each.name
            for each, right in zip(table.schema, _arrow_schema(expected), strict=True)
            if each != right
        ]:
            raise ReportError(f"{path} has columns of other types than its schema: {', '.join(odd)}.")
        frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
        for name in [name for name in columns if name in added]:
            kind = {"int64?": "Int64", "float64?": "float64"}.get(columns[name])
            frame[name] = pd.Series([added[name]] * len(frame), index=frame.index, dtype=kind)
        for column, kind in expected.items():
            if kind == "int64?":
                # Through Arrow, not through float64, which would round large values.
                frame[column] = pd.array(table.column(column).to_pylist(), dtype="Int64")
        return frame

    def _replace(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a temporary neighbour and rename it over `name`: an interruption leaves no half file."""
        target = self.path / name
        temporary = self.path / f".{name}.tmp"
        try:
            write(temporary)
            temporary.replace(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ReportError(f"Cannot write {target}: {error.strerror or error}.") from None


def typed(frame: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """The frame with each of `columns` in its type: the nullable whole numbers as Int64."""
    import numpy as np
    import pandas as pd

    for column, kind in columns.items():
        if kind == "int64?":
            frame[column] = pd.array(frame[column].tolist(), dtype="Int64")
        else:
            frame[column] = frame[column].astype(np.dtype(kind.rstrip("?")))
    return frame


def _arrow_schema(columns: dict[str, str]) -> pa.Schema:
    import pyarrow as pa

    types = {
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "string": pa.string(),
        "list<int64>": pa.list_(pa.int64()),
        "list<int32>": pa.list_(pa.int32()),
    }
    return pa.schema(
        [
            pa.field(name, types[kind.rstrip("?")], nullable=kind.endswith("?"))
            for name, kind in columns.items()
        ]
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
