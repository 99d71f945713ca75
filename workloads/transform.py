"""What may be done to a trace before it is replayed. Each returns rows and its record for the parameters.

Window, sampling, session limit and tick spreading work on rows as they stream by; clipping and scaling, on
those chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from backbench.workloads.streams import stream
from backbench.workloads.trace import Segment, TraceRow

Record = dict[str, Any]
TICK_ROWS = 1000
TICK_SLACK_NS = 1_000_000


def scale_time(rows: Iterable[TraceRow], factor: float) -> tuple[Iterator[TraceRow], Record]:
    """Multiply every recorded time by `factor`, think times too: 0.5 sends twice as fast."""
    scaled = (
        _rethought(replace(row, arrival_ns=round(row.arrival_ns * factor)), lambda ns: round(ns * factor))
        for row in rows
    )
    return scaled, {"kind": "time_scale", "factor": factor}


def scale_rate(rows: Iterable[TraceRow], factor: float) -> tuple[Iterator[TraceRow], Record]:
    """Let `factor` times as many arrive a second; think times stay as they are."""
    scaled = (replace(row, arrival_ns=round(row.arrival_ns / factor)) for row in rows)
    return scaled, {"kind": "rate_scale", "factor": factor}


def scale_think(rows: Iterable[TraceRow], factor: float) -> tuple[Iterator[TraceRow], Record]:
    """Multiply think and tool times alone by `factor`; 0 sends a turn as soon as the answer before ended."""
    scaled = (_rethought(row, lambda ns: round(ns * factor)) for row in rows)
    return scaled, {"kind": "think_scale", "factor": factor}


def _rethought(row: TraceRow, change: Callable[[int], int]) -> TraceRow:
    """The row with another think time, where it has one."""
    if row.follow is None or row.follow.think_ns is None:
        return row
    return replace(row, follow=replace(row.follow, think_ns=change(row.follow.think_ns)))


def scale_lengths(rows: Iterable[TraceRow], factor: float) -> tuple[list[TraceRow], Record]:
    """Multiply prompts and outputs by `factor`, at least 1 token; blocks with them, so that the same share of
    a prompt is shared. Recorded text cannot be scaled and is cut or kept as it is."""
    scaled: list[TraceRow] = []
    blocks: dict[str, int] = {}
    for row in rows:
        # A block stays whole tokens long, and the prompt made of blocks follows it.
        block_tokens = max(1, round(row.block_tokens * factor)) if row.block_ids else row.block_tokens
        if row.block_ids:
            blocks[str(row.block_tokens)] = block_tokens
        own = block_tokens / row.block_tokens if row.block_ids else factor
        segments = (Segment(each.stream, each.index, _scaled(each.tokens, own)) for each in row.segments)
        follow = row.follow
        if follow is not None:
            follow = replace(follow, kept_tokens=round(follow.kept_tokens * own))
        scaled.append(
            replace(
                row,
                input_tokens=_scaled(row.input_tokens, own),
                output_tokens=_scaled(row.output_tokens, factor),
                block_tokens=block_tokens,
                segments=tuple(segments),
                follow=follow,
                answer=None if row.answer is None else row.answer[: _scaled(len(row.answer), factor)],
            )
        )
    return scaled, {"kind": "length_scale", "factor": factor, "block_tokens": blocks}


def _scaled(tokens: int, factor: float) -> int:
    return max(1, round(tokens * factor))


def rebase(rows: Iterable[TraceRow]) -> tuple[Iterator[TraceRow], Record | None]:
    """Let the first row arrive at 0; no record where it does already, or there is no row."""
    rest = iter(rows)
    first = next(rest, None)
    if first is None:
        return iter(()), None
    offset_ns = first.arrival_ns
    every = itertools.chain([first], rest)
    if offset_ns == 0:
        return every, None
    moved = (replace(row, arrival_ns=row.arrival_ns - offset_ns) for row in every)
    return moved, {"kind": "rebase", "offset_s": offset_ns / 1e9}


def cap_gaps(rows: Iterable[TraceRow], longest_s: float) -> tuple[list[TraceRow], Record]:
    """Shorten every silence between two arrivals to `longest_s`; what follows moves up. Think times, too."""
    longest_ns = round(longest_s * 1e9)
    capped: list[TraceRow] = []
    removed_ns = gaps = previous_ns = 0
    for row in rows:
        excess_ns = row.arrival_ns - previous_ns - longest_ns
        previous_ns = row.arrival_ns
        if capped and excess_ns > 0:
            removed_ns += excess_ns
            gaps += 1
        moved = replace(row, arrival_ns=row.arrival_ns - removed_ns)
        capped.append(_rethought(moved, lambda ns: min(ns, longest_ns)))
    return capped, {"kind": "max_gap", "seconds": longest_s, "gaps": gaps, "removed_s": removed_ns / 1e9}


def cap_think(rows: Iterable[TraceRow], longest_s: float) -> tuple[list[TraceRow], Record]:
    """Shorten every think time to `longest_s`."""
    longest_ns = round(longest_s * 1e9)
    given = list(rows)
    capped = [_rethought(row, lambda ns: min(ns, longest_ns)) for row in given]
    turns = sum(before.follow != after.follow for before, after in zip(given, capped, strict=True))
    return capped, {"kind": "max_gap", "seconds": longest_s, "turns": turns}


def on_ticks(rows: Iterable[TraceRow], tick_ns: int) -> tuple[Iterator[TraceRow], bool]:
    """The same rows, and whether they were recorded on ticks, going by the first TICK_ROWS.

    Then every time lies on a multiple of the tick (or a millisecond beside it, as the real trace has them),
    and requests share times.
    """
    rest = iter(rows)
    head = list(itertools.islice(rest, TICK_ROWS))
    times = [row.arrival_ns for row in head]
    off = (min(time % tick_ns, -time % tick_ns) for time in times)
    found = len(set(times)) < len(times) and all(each <= TICK_SLACK_NS for each in off)
    return itertools.chain(head, rest), found


def window(rows: Iterable[TraceRow], start_s: float, end_s: float) -> tuple[Iterator[TraceRow], Record]:
    """Keep arrivals in [start, end) seconds; the window's start becomes time 0. Stops reading at its end."""
    start_ns, end_ns = round(start_s * 1e9), round(end_s * 1e9)
    before_end = itertools.takewhile(lambda row: row.arrival_ns < end_ns, rows)
    kept = (
        replace(row, arrival_ns=row.arrival_ns - start_ns) for row in before_end if row.arrival_ns >= start_ns
    )
    return kept, {"kind": "window", "start_s": start_s, "end_s": end_s}


def sample(rows: Iterable[TraceRow], fraction: float, seed: int) -> tuple[Iterator[TraceRow], Record]:
    """Keep each row (whole sessions, where rows have one) with probability `fraction`, at its own time."""
    draws = stream(seed, "sample")
    sessions: dict[str, bool] = {}

    def kept() -> Iterator[TraceRow]:
        for row in rows:
            if row.session is None:
                keep = bool(draws.random() < fraction)
            else:
                if row.session not in sessions:
                    sessions[row.session] = bool(draws.random() < fraction)
                keep = sessions[row.session]
            if keep:
                yield row

    return kept(), {"kind": "sample", "fraction": fraction, "seed": seed}


def limit_sessions(rows: Iterable[TraceRow], limit: int) -> tuple[Iterator[TraceRow], Record]:
    """Keep the first `limit` sessions; a row without a session is one of its own."""
    seen: set[str] = set()

    def kept() -> Iterator[TraceRow]:
        alone = 0
        for row in rows:
            if row.session in seen:
                yield row
            elif len(seen) + alone < limit:
                if row.session is None:
                    alone += 1
                else:
                    seen.add(row.session)
                yield row

    return kept(), {"kind": "session_limit", "sessions": limit}


def spread_ticks(rows: Iterable[TraceRow], seed: int, tick_ns: int) -> tuple[Iterator[TraceRow], Record]:
    """Move each arrival by a uniform time within its tick, keeping the order within the tick.

    A trace recorded on ticks and replayed literally makes bursts that never happened.
    """

    def spread() -> Iterator[TraceRow]:
        for arrival_ns, group in itertools.groupby(rows, key=lambda row: row.arrival_ns):
            tick = list(group)
            # One stream per tick: the draws of a tick do not depend on those before it.
            draws = stream(seed, "tick", arrival_ns).integers(tick_ns, size=len(tick))
            for row, offset_ns in zip(tick, sorted(draws.tolist()), strict=True):
                yield replace(row, arrival_ns=arrival_ns + offset_ns)

    # Ticks lie 1 ms early now and then (5999, 6000), which would let two ticks overlap by that much.
    return _in_order(spread(), tick_ns), {"kind": "spread_ticks", "tick_s": tick_ns / 1e9, "seed": seed}


def _in_order(rows: Iterator[TraceRow], slack_ns: int) -> Iterator[TraceRow]:
    """Sort rows that are out of order by less than `slack_ns`, holding back only that much."""
    held: list[TraceRow] = []
    for row in rows:
        held.append(row)
        if row.arrival_ns - held[0].arrival_ns > 2 * slack_ns:
            held.sort(key=lambda item: item.arrival_ns)
            ready = row.arrival_ns - slack_ns
            yield from [item for item in held if item.arrival_ns < ready]
            held = [item for item in held if item.arrival_ns >= ready]
    yield from sorted(held, key=lambda item: item.arrival_ns)


def clip_lengths(rows: Iterable[TraceRow], max_len: int) -> tuple[list[TraceRow], Record]:
    """Shorten requests to a context of `max_len` tokens, prompt and output together.

    The prompt gives way first, losing its end (so shared prefixes stay shared), down to half the context;
    then the output does.
    """
    clipped: list[TraceRow] = []
    record: Record = {
        "kind": "clip",
        "max_len": max_len,
        "requests": 0,
        "input_tokens": 0,
        "output_tokens": 0,
    }
    for row in rows:
        if row.input_tokens + row.output_tokens > max_len:
            input_tokens = min(row.input_tokens, max(max_len - row.output_tokens, (max_len + 1) // 2))
            output_tokens = min(row.output_tokens, max_len - input_tokens)
            record["requests"] += 1
            record["input_tokens"] += row.input_tokens - input_tokens
            record["output_tokens"] += row.output_tokens - output_tokens
            row = replace(row, input_tokens=input_tokens, output_tokens=output_tokens)
        clipped.append(row)
    return clipped, record
