"""The run record: its schema, the directory that holds it, and the digests that say whether it was edited."""

from backbench.reports.record.digests import digest_problems, record_digest, sha256, sign
from backbench.reports.record.directory import RunDirectory, typed
from backbench.reports.record.schema import (
    RECORD_FILE,
    REPORT_FILE,
    REQUEST_COLUMNS,
    REQUESTS_FILE,
    SCHEMA_VERSION,
    STATUSES,
    STEP_COLUMNS,
    STEPS_FILE,
    TELEMETRY_COLUMNS,
    TELEMETRY_FILE,
    RunRecord,
    finite,
)

__all__ = [
    "RECORD_FILE",
    "REPORT_FILE",
    "REQUESTS_FILE",
    "REQUEST_COLUMNS",
    "SCHEMA_VERSION",
    "STATUSES",
    "STEPS_FILE",
    "STEP_COLUMNS",
    "TELEMETRY_COLUMNS",
    "TELEMETRY_FILE",
    "RunDirectory",
    "RunRecord",
    "digest_problems",
    "finite",
    "record_digest",
    "sha256",
    "sign",
    "typed",
]
