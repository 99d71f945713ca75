"""Time in steps stays inside the run, and the host's share of it below one."""

from __future__ import annotations

from typing import Any

import pytest

from backbench.reports.metrics.compute import sections
from backbench.reports.metrics.engine_steps import host_share, time_shares
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.steps import step_times_ns
from backbench.reports.metrics.window import Window

MS = 1_000_000


def of(steps: Any, make_context: Any, **context: Any) -> RunTables:
    """Without a request the run lasts until `end_ns`."""
    import pandas as pd

    from backbench.reports.record import REQUEST_COLUMNS

    frame = pd.DataFrame({name: [] for name in REQUEST_COLUMNS})
    return RunTables.read(frame.astype({"warmup": bool}), steps, make_context(**context))


def test_busy_time_lies_inside_the_run(make_steps: Any, make_context: Any) -> None:
    """A step that began before the run and one that ended after it: 10 + 10 + 5 ms of 25."""
    steps = make_steps(
        {"start_ns": -30 * MS, "end_ns": 10 * MS, "host_ns": 2 * MS, "num_decodes": 1},
        {"start_ns": 10 * MS, "end_ns": 20 * MS, "host_ns": 2 * MS, "num_decodes": 1},
        {"start_ns": 20 * MS, "end_ns": 40 * MS, "host_ns": 2 * MS, "num_decodes": 1},
    )
    run = of(steps, make_context, end_ns=25 * MS)
    assert run.busy_s == pytest.approx(0.025)
    assert step_times_ns(steps, Window(0, 25 * MS)).tolist() == [10 * MS, 10 * MS, 5 * MS]
    assert host_share(run) == pytest.approx(6 / 25)


def test_the_hosts_share_is_at_most_one(make_steps: Any, make_context: Any) -> None:
    """A synchronous step is the host's throughout, and what it does after the step's end comes on top."""
    steps = make_steps({"start_ns": 0, "end_ns": 10 * MS, "host_ns": 11 * MS, "num_decodes": 1})
    run = of(steps, make_context, end_ns=12 * MS)
    assert host_share(run) == 1
    shares = time_shares(run)
    assert shares is not None
    assert (shares.decode_only, shares.host) == (1, 1)


def test_prefill_counts_prompt_tokens_over_the_steps_that_computed_any(
    make_steps: Any, make_context: Any
) -> None:
    """100 and 50 tokens in 10 + 20 ms; neither the decode nor the step that began before the run counts."""
    steps = make_steps(
        {"start_ns": -5 * MS, "end_ns": 5 * MS, "num_prefill_tokens": 999},
        {"start_ns": 5 * MS, "end_ns": 15 * MS, "num_prefill_tokens": 100},
        {"start_ns": 15 * MS, "end_ns": 18 * MS, "num_prefill_tokens": 0, "num_decodes": 2},
        {"start_ns": 16 * MS, "end_ns": 38 * MS, "num_prefill_tokens": 50, "num_decodes": 2},
    )
    found = sections(of(steps, make_context, end_ns=40 * MS), ["metrics"])["metrics"]["steps"]
    assert found["prefill_tokens_per_s"] == pytest.approx(150 / 0.030)
    found = sections(of(steps[2:3], make_context, end_ns=40 * MS), ["metrics"])["metrics"]
    assert found["steps"]["prefill_tokens_per_s"] is None
    assert found["absent"]["steps.prefill_tokens_per_s"] == "no step computed a prompt"
