"""The run record: the one schema that everything reads and writes, and the directory that holds it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbench.errors import ReportError

if TYPE_CHECKING:  # imported where used: `bench --help` must not pay for them
    import pandas as pd
    import pyarrow as pa

SCHEMA_VERSION = 1
"""Raised whenever a field's meaning changes; two records compare only within one version."""

STATUSES = ("complete", "interrupted", "failed")

RECORD_FILE = "run.json"
REQUESTS_FILE = "requests.parquet"
STEPS_FILE = "steps.parquet"
TELEMETRY_FILE = "telemetry.parquet"
REPORT_FILE = "report.html"

REQUEST_COLUMNS: dict[str, str] = {
    "request_id": "int64",
    "session": "string?",
    "intended_ns": "int64",
    "sent_ns": "int64?",
    "first_ns": "int64?",
    "last_ns": "int64?",
    "prompt_tokens": "int64",
    "requested_tokens": "int64",
    "output_tokens": "int64",
    "token_ns": "list<int64>",
    "token_counts": "list<int32>",
    "finished": "bool",
    "error": "string?",
}
"""One row a request. Times are relative to the run's start; `token_ns` has the time of every chunk and
`token_counts` how many tokens it held (null inside the list when unknown)."""

STEP_COLUMNS: dict[str, str] = {
    "step": "int64",
    "start_ns": "int64",
    "end_ns": "int64",
    "host_ns": "int64",
    "num_seqs": "int64",
    "num_tokens": "int64",
    "num_prefill_tokens": "int64",
    "num_decodes": "int64",
    "context_tokens": "int64",
    "running": "int64",
    "waiting": "int64",
    "kv_blocks_used": "int64",
    "kv_blocks_total": "int64",
    "prefix_hit_tokens": "int64",
    "preemptions": "int64",
    "graph": "bool",
}
"""One row an engine step: `engine.request.StepStats`, times relative to the run's start."""

TELEMETRY_COLUMNS: dict[str, str] = {
    "time_ns": "int64",
    "device": "int64",
    "power_w": "float64?",
    "energy_j": "float64?",
    "sm_clock_mhz": "float64?",
    "memory_clock_mhz": "float64?",
    "temperature_c": "float64?",
    "memory_used_bytes": "int64?",
    "utilization": "float64?",
    "throttle_reasons": "int64?",
    "host_cpu_percent": "float64?",
    "host_rss_bytes": "int64?",
}
"""One row a sample and device; device -1 is the host."""


@dataclass(frozen=True)
class RunRecord:
    """What one run was and what came out of it. Every section is a plain dict that JSON can hold."""

    run: dict[str, Any]
    """uuid, utc, command, seed, status ("complete" | "interrupted" | "failed"), error of a failed one."""
    workload: dict[str, Any] = field(default_factory=dict)
    """name, parameters, content_hash, notes, ideal_prefix_hit_ratio."""
    model: dict[str, Any] = field(default_factory=dict)
    """name, revision, config_hash, dtype, quantization, num_parameters, shape facts."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Every setting of the engine."""
    backend: dict[str, Any] = field(default_factory=dict)
    """asked, used {operation: name}, passed_over, tuned {operation: "tuned" | "untuned: ..." | null},
    kernel_source_hash."""
    system: dict[str, Any] = field(default_factory=dict)
    """device {vendor, arch, name} the engine ran on; every GPU, CPU, RAM."""
    software: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    """docs/metrics.md names and defines every key."""
    memory: dict[str, Any] = field(default_factory=dict)
    energy: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    correctness: dict[str, Any] = field(default_factory=dict)
    roofline: dict[str, Any] = field(default_factory=dict)
    """mbu, mfu, decode_fit {intercept_s, slope_s_per_token, intercept_floor_s, slope_floor_s_per_token}."""
    warmup: dict[str, Any] = field(default_factory=dict)
    """seconds, requests."""
    validity: list[str] = field(default_factory=list)
    """Reasons why the run should not be believed; empty = valid."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        status = self.run.get("status")
        if status not in STATUSES:
            raise ReportError(f"run.status must be one of {', '.join(STATUSES)}, not {status!r}.")

    def to_json(self) -> str:
        """The text of run.json: keys sorted, infinities and NaN written as null."""
        return json.dumps(finite(asdict(self)), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> RunRecord:
        """Parse run.json; `source` names the file in errors."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ReportError(
                f"{source} is not valid JSON (line {error.lineno}: {error.msg}); it may be truncated. "
                "Run again or restore it."
            ) from None
        if not isinstance(data, dict):
            raise ReportError(f"{source} holds no run record: expected a JSON object.")
        _check_version(data.get("schema_version"), source)
        names = [each.name for each in fields(cls)]
        if missing := [name for name in names if name not in data]:
            raise ReportError(f"{source} lacks the section {missing[0]!r}; it is not a whole run record.")
        for name in names:
            expected = {"schema_version": int, "validity": list}.get(name, dict)
            if not isinstance(data[name], expected):
                raise ReportError(f"{source}: the section {name!r} must be a JSON {expected.__name__}.")
        return cls(**{name: data[name] for name in names})


def _check_version(version: object, source: str) -> None:
    if version != SCHEMA_VERSION:
        raise ReportError(
            f"{source} has schema_version {version!r}, but this Backbench reads {SCHEMA_VERSION}; "
            "use the version that wrote it."
        )


def finite(value: Any) -> Any:
    """`value` made of plain JSON types: numpy scalars unwrapped, tuples as lists, inf and NaN as None."""
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
        """An existing run directory (or the run.json inside it)."""
        path = Path(path)
        if path.name == RECORD_FILE:
            path = path.parent
        if not path.is_dir():
            raise ReportError(f"There is no run directory {path}; `bench run` makes one.")
        return cls(path)

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
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ReportError(f"{path} is missing; {self.path} is not a whole run directory.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ReportError(f"{path} cannot be read ({error}); run again or restore it.") from None
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
            # ParquetFile, not read_table: the latter would also take a directory.
            with pa.parquet.ParquetFile(path) as file:
                table = file.read()
        except FileNotFoundError:
            raise ReportError(f"{path} is missing; {self.path} is not a whole run directory.") from None
        except (pa.ArrowException, OSError) as error:
            raise ReportError(
                f"{path} is truncated or not Parquet ({_one_line(error)}); run again or restore it."
            ) from None
        version = (table.schema.metadata or {}).get(b"schema_version", b"none").decode()
        _check_version(int(version) if version.isdigit() else version, str(path))
        if table.schema.names != list(columns):
            odd = sorted(set(table.schema.names) ^ set(columns))
            raise ReportError(f"{path} has other columns than its schema: {', '.join(odd) or 'their order'}.")
        frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
        for column, kind in columns.items():
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
