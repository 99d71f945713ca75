"""A replay and an engine's step statistics as the record's tables, in time relative to the run's start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from backbench.harness.replay import Replay
from backbench.harness.sessions import Trace

if TYPE_CHECKING:
    import pandas as pd

    from backbench.engine.request import StepStats


def request_frame(replay: Replay) -> pd.DataFrame:
    """One row a request, with `reports.record.REQUEST_COLUMNS`; the warm-up's that were sent stand last.

    A closed-loop request or later turn that the run never came to is intended at the run's end: it was not
    due before. A turn that was given up is intended when that was decided.
    """
    import pandas as pd

    turns = _turns(replay.traces)
    rows = [_request_row(trace, replay, turns) for trace in replay.traces]
    rows += [_request_row(trace, replay, turns) for trace in replay.warmup if trace.sent_ns is not None]
    frame = pd.DataFrame(rows)
    for column in ("sent_ns", "first_ns", "last_ns", "turn", "follows", "think_ns", "usage_tokens"):
        frame[column] = pd.array(frame[column].tolist(), dtype="Int64")
    for column in ("session", "error"):
        frame[column] = frame[column].astype(object)
    return frame


def _turns(traces: Iterable[Trace]) -> dict[int, int]:
    """Of each request that belongs to a session, its turn, from 1."""
    turns: dict[int, int] = {}
    for trace in traces:
        request = trace.request
        if request.follows is not None:
            turns[request.id] = turns.get(request.follows, 1) + 1
        elif request.session is not None:
            turns[request.id] = 1
    return turns


def _request_row(trace: Trace, replay: Replay, turns: Mapping[int, int]) -> dict[str, Any]:
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
        "turn": turns.get(trace.request.id),
        "follows": trace.request.follows,
        "think_ns": None if trace.request.follows is None else trace.request.think_ns,
    }


def step_frame(stats: Iterable[StepStats], start_ns: int) -> pd.DataFrame:
    """One row an engine step, with `reports.record.STEP_COLUMNS`; warm-up steps have negative times."""
    import dataclasses

    import pandas as pd

    from backbench.reports.record import STEP_COLUMNS, typed

    frame = pd.DataFrame([dataclasses.asdict(each) for each in stats], columns=list(STEP_COLUMNS))
    frame = typed(frame, STEP_COLUMNS)
    frame["start_ns"] -= start_ns
    frame["end_ns"] -= start_ns
    return frame


def telemetry_frame(rows: Iterable[dict[str, Any]], start_ns: int) -> pd.DataFrame:
    """One row a sample and device, with `reports.record.TELEMETRY_COLUMNS`."""
    import pandas as pd

    from backbench.reports.record import TELEMETRY_COLUMNS, typed

    frame = typed(pd.DataFrame(list(rows), columns=list(TELEMETRY_COLUMNS)), TELEMETRY_COLUMNS)
    frame["time_ns"] -= start_ns
    return frame
