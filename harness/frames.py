"""A replay and an engine's step statistics as the record's tables, in time relative to the run's start."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from backbench.harness.replay import Replay, Trace

if TYPE_CHECKING:
    import pandas as pd

    from backbench.engine.request import StepStats


def request_frame(replay: Replay) -> pd.DataFrame:
    """One row a request, with `reports.record.REQUEST_COLUMNS`; the warm-up's that were sent stand last.

    A closed-loop request that the run never came to is intended at the run's end: it was not due before.
    """
    import pandas as pd

    rows = [_request_row(trace, replay) for trace in replay.traces]
    rows += [_request_row(trace, replay) for trace in replay.warmup if trace.sent_ns is not None]
    frame = pd.DataFrame(rows)
    for column in ("sent_ns", "first_ns", "last_ns", "usage_tokens"):
        frame[column] = pd.array(frame[column].tolist(), dtype="Int64")
    for column in ("session", "error"):
        frame[column] = frame[column].astype(object)
    return frame


def _request_row(trace: Trace, replay: Replay) -> dict[str, Any]:
    start_ns = replay.start_ns
    intended_ns = replay.end_ns if trace.intended_ns is None else trace.intended_ns
    chunks = [time_ns - start_ns for time_ns in trace.chunk_ns]
    return {
        "request_id": trace.request.id,
        "session": trace.request.session,
        "intended_ns": intended_ns - start_ns,
        "sent_ns": None if trace.sent_ns is None else trace.sent_ns - start_ns,
        "first_ns": chunks[0] if chunks else None,
        "last_ns": chunks[-1] if chunks else None,
        "prompt_tokens": len(trace.request.prompt),
        "requested_tokens": trace.request.output_tokens,
        "output_tokens": sum(count or 0 for count in trace.chunk_tokens),
        "token_ns": chunks,
        "token_counts": list(trace.chunk_tokens),
        "usage_tokens": trace.usage_tokens,
        "finished": trace.finished,
        "error": trace.error,
        "warmup": trace.request.id < 0,
    }


def step_frame(stats: Iterable[StepStats], start_ns: int) -> pd.DataFrame:
    """One row an engine step, with `reports.record.STEP_COLUMNS`; warm-up steps have negative times."""
    import dataclasses

    import pandas as pd

    from backbench.reports.record import STEP_COLUMNS

    frame = pd.DataFrame([dataclasses.asdict(each) for each in stats], columns=list(STEP_COLUMNS))
    frame = frame.astype(STEP_COLUMNS)
    frame["start_ns"] -= start_ns
    frame["end_ns"] -= start_ns
    return frame


def telemetry_frame(rows: Iterable[dict[str, Any]], start_ns: int) -> pd.DataFrame:
    """One row a sample and device, with `reports.record.TELEMETRY_COLUMNS`."""
    import numpy as np
    import pandas as pd

    from backbench.reports.record import TELEMETRY_COLUMNS

    frame = pd.DataFrame(list(rows), columns=list(TELEMETRY_COLUMNS))
    for column, kind in TELEMETRY_COLUMNS.items():
        if kind == "int64?":
            frame[column] = pd.array(frame[column].tolist(), dtype="Int64")
        else:
            frame[column] = frame[column].astype(np.dtype(kind.rstrip("?")))
    frame["time_ns"] -= start_ns
    return frame
