"""A run that another tool measured: what its file says, and the record that is made of it.

Our definitions are computed from the requests' own rows where the file has them; else the numbers of its
summary stand in their places, without intervals. Either way the record says that it was not measured here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbench.errors import ReportError, printable
from backbench.reports.metrics import compute, validity
from backbench.reports.metrics.memory import explained
from backbench.reports.metrics.metric import ABSENT
from backbench.reports.metrics.requests import Context
from backbench.reports.metrics.run import RunTables
from backbench.reports.record import (
    REQUEST_COLUMNS,
    STEP_COLUMNS,
    TELEMETRY_COLUMNS,
    RunDirectory,
    RunRecord,
    sign,
    typed,
)
from backbench.reports.record.redaction import Names, anonymous, redact, redacted

if TYPE_CHECKING:
    import pandas as pd

NOT_OURS = "another tool measured it, and its file does not say"
UNLIMITED = MOST = 2**31 - 1
LONGEST = 200
"""Characters of a text."""
LONGEST_S = 1e9
NO_ARRIVALS = (
    "the file has no intended times: those of sending stand for them, so waits in the client do not show"
)
UNTIMED = "the tokens' own times are not in the file: no ITL, no steady state"
LENGTHS = "the file does not say how many tokens were asked for: those that came stand for it"
SAMPLED = "the file keeps {kept} of {all} requests: the numbers are its summary's"


@dataclass(frozen=True)
class ForeignRequest:
    """One request by its tool's clock, in seconds from any origin."""

    sent_s: float
    prompt_tokens: int
    chunk_s: tuple[float, ...] = ()
    """When output became visible; of a tool that tells only the first and the last token, those two."""
    chunk_tokens: tuple[int, ...] = ()
    requested_tokens: int | None = None
    intended_s: float | None = None
    error: str | None = None
    finished: bool = True
    """Its answer came to its end; of a failed one, nothing."""
    session: str | None = None
    warmup: bool = False

    def __post_init__(self) -> None:
        times = (self.sent_s, *self.chunk_s)
        if any(late < early for early, late in itertools.pairwise(times)):
            raise ValueError("a request's times run backwards")


@dataclass(frozen=True)
class Foreign:
    """One run of another tool."""

    tool: str
    model: str | None
    backend: str | None
    workload: str
    utc: str | None = None
    duration_s: float | None = None
    concurrency: int | None = None
    rate: float | None = None
    """Requests a second that were offered; neither this nor a concurrency = all at once."""
    requests: tuple[ForeignRequest, ...] | None = None
    """None = the file has only a summary, or rows that do not give our numbers."""
    token_times: bool = True
    """Each chunk's time and tokens are known, and not the first and last token's alone."""
    summary: Mapping[str, float] = field(default_factory=dict)
    """Dotted place in `metrics` -> value, for where there are no rows."""
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else the file says of the run."""

    @property
    def mode(self) -> str:
        if self.concurrency is not None:
            return "closed"
        return "all_at_once" if self.rate is None else "open"


def number(value: Any) -> float | None:
    """A finite number, or None for whatever else stands in its place."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good and abs(value) < 1e18 else None


def positive(value: Any) -> float | None:
    """A finite number above 0, or None."""
    found = number(value)
    return found if found is not None and found > 0 else None


def whole(value: Any) -> int | None:
    """A count of tokens or requests, or None."""
    found = number(value)
    return int(found) if found is not None and 0 <= found < MOST and found == int(found) else None


def text(value: Any) -> str | None:
    """A printable text, or None."""
    return printable(value)[:LONGEST] if isinstance(value, str) and value else None


def known(found: float | None) -> float:
    """The number; ValueError where it is None."""
    if found is None:
        raise ValueError("a number is missing or no number")
    return found


def plain(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of these settings that are a number or a text."""
    found = {}
    for name in names:
        readings = (read(data.get(name)) for read in (whole, number, text))
        found[name] = next((value for value in readings if value is not None), None)
    return {name: value for name, value in found.items() if value is not None}


def latencies(places: Mapping[str, str], statistics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Statistics in ms (theirs by name: {"mean", "p50", ...}) as our dotted places in seconds."""
    found = {}
    for theirs, ours in places.items():
        for name, value in (statistics.get(theirs) or {}).items():
            if (known_ms := number(value)) is not None:
                found[f"{ours}.{name}"] = known_ms / 1e3
    return found


def write(foreign: Foreign, source: Path, digest: str, out: Path) -> RunRecord:
    """Make the run directory `out` of a foreign run read from `source`; ReportError where it cannot be."""
    frame, end_ns = _frame(_requests(foreign))
    directory = RunDirectory.create(out)
    if foreign.duration_s is not None and foreign.requests is None:
        end_ns = round(foreign.duration_s * 1e9)
    steps = typed(_empty(STEP_COLUMNS), STEP_COLUMNS)
    telemetry = typed(_empty(TELEMETRY_COLUMNS), TELEMETRY_COLUMNS)
    context = Context(
        foreign.mode, end_ns, False, UNLIMITED, foreign.concurrency, token_times=foreign.token_times
    )
    reasons = [f"{foreign.tool} sampled none"]
    run = RunTables.read(frame, steps, context, telemetry, {"energy": {"sensor_reasons": reasons}})
    computed = compute.sections(run, (*compute.SECTIONS, "energy"))
    record = RunRecord(
        run=_run_section(foreign, source, digest),
        workload={
            "name": foreign.workload,
            "parameters": {"offered": {"rate": foreign.rate, "concurrency": foreign.concurrency}},
            "content_hash": None,
            "reason": NOT_OURS,
            "notes": list(foreign.notes),
        },
        model={"name": foreign.model, "dtype": None, "reason": NOT_OURS},
        engine=dict(foreign.settings) or {"reason": NOT_OURS},
        backend={"asked": foreign.backend or foreign.tool, "used": {}, "reason": NOT_OURS},
        system={"reason": NOT_OURS},
        software={"reason": NOT_OURS},
        metrics=computed["metrics"],
        schedule=computed["schedule"],
        roofline=computed["roofline"],
        energy=computed["energy"],
        memory=explained(dict.fromkeys(MEMORY), on_gpu=True),
        correctness={"passed": None, "reason": f"{foreign.tool}'s file holds no results to check"},
        accuracy={"reason": NOT_OURS},
        warmup={"reason": NOT_OURS},
    )
    if foreign.requests is None:
        record = replace(record, metrics=_told(record.metrics, foreign.summary))
    record = replace(
        record,
        workload=redacted(record.workload),
        model=redacted(record.model),
        engine=redacted(record.engine),
        validity=validity.of_record(record, telemetry),
    )
    directory.write_requests(frame)
    directory.write_steps(steps)
    directory.write_telemetry(telemetry)
    record = sign(directory, record)
    directory.write_record(record)
    return record


MEMORY = ("weights_bytes", "kv_pool_bytes", "total_bytes", "host_rss_peak_bytes")


def _run_section(foreign: Foreign, source: Path, digest: str) -> dict[str, Any]:
    return {
        "uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{digest} {foreign.workload} {foreign.rate}")),
        "utc": foreign.utc or datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redact(f"bench import {source.name}"),
        "status": "complete",
        "asked": {},
        "tags": {},
        "imported": {
            "tool": foreign.tool,
            "file": redact(source.name),
            "sha256": digest,
            "rows": foreign.requests is not None,
            "notes": list(foreign.notes),
        },
    }


def _requests(foreign: Foreign) -> Sequence[ForeignRequest]:
    measured = [each for each in foreign.requests or () if not each.warmup]
    if foreign.requests is not None and not measured:
        raise ReportError(f"The {foreign.tool} file holds no measured request; there is nothing to import.")
    return foreign.requests or ()


def _frame(requests: Sequence[ForeignRequest]) -> tuple[pd.DataFrame, int]:
    """The request table in time since the first measured request was due, and when the last one ended."""
    import pandas as pd

    intended = [each.sent_s if each.intended_s is None else each.intended_s for each in requests]
    starts = [at for at, each in zip(intended, requests, strict=True) if not each.warmup]
    begin_s = min(starts, default=0.0)

    def ns(at_s: float) -> int:
        if not abs(at_s - begin_s) < LONGEST_S:
            raise ReportError(
                f"The file's requests lie {abs(at_s - begin_s):.3g} s apart; its times are none."
            )
        return round((at_s - begin_s) * 1e9)

    rows: list[dict[str, Any]] = []
    names = Names.here()
    numbers = {False: iter(range(len(requests))), True: iter(range(-1, -1 - len(requests), -1))}
    for at_s, each in zip(intended, requests, strict=True):
        times = [ns(chunk_s) for chunk_s in each.chunk_s]
        output = sum(each.chunk_tokens)
        rows.append(
            {
                "request_id": next(numbers[each.warmup]),
                "session": each.session,
                "intended_ns": ns(at_s),
                "sent_ns": ns(each.sent_s),
                "first_ns": times[0] if times else None,
                "last_ns": times[-1] if times else None,
                "prompt_tokens": each.prompt_tokens,
                "requested_tokens": output if each.requested_tokens is None else each.requested_tokens,
                "output_tokens": output,
                "token_ns": times,
                "token_counts": list(each.chunk_tokens),
                "finished": each.finished and each.error is None,
                "error": None if each.error is None else anonymous(each.error, names=names),
                "warmup": each.warmup,
            }
        )
    frame = pd.DataFrame(rows, columns=list(REQUEST_COLUMNS))
    for column in ("sent_ns", "first_ns", "last_ns"):
        frame[column] = pd.array(frame[column].tolist(), dtype="Int64")
    for column in ("session", "error", "token_ns", "token_counts"):
        frame[column] = frame[column].astype(object)
    for column in ("finished", "warmup"):
        frame[column] = frame[column].astype(bool)
    ends = [row["last_ns"] for row in rows if row["last_ns"] is not None and not row["warmup"]]
    return frame, max(ends, default=0)


def _empty(columns: Iterable[str]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(columns=list(columns))


def _told(metrics: dict[str, Any], summary: Mapping[str, float]) -> dict[str, Any]:
    """The metrics with what the file's summary says in its places."""
    found = json.loads(json.dumps(metrics))
    absent = found.get(ABSENT) or {}
    for dotted, value in summary.items():
        *parents, last = dotted.split(".")
        place = found
        for key in parents:
            place = place.setdefault(key, {})
        told = {"value": value, "low": None, "high": None, "reason": "of the file's own summary"}
        place[last] = told if last in ("p10", "p50", "p90", "p95", "p99") else value
        absent.pop(dotted, None)
    for place, names in ((found["counts"], [*found["counts"]]), (found, ["prompt_tokens", "output_tokens"])):
        place |= {name: int(place[name]) for name in names if place.get(name) is not None}
    return found | ({ABSENT: absent} if absent else {})


def digest_of(content: bytes) -> str:
    """Hex SHA-256 of a file's bytes."""
    return hashlib.sha256(content).hexdigest()
