"""MBU and MFU against figures worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from backbench.reports.metrics import roofline
from backbench.reports.metrics.metric import resolved
from backbench.reports.metrics.run import RunTables
from backbench.reports.record import REQUEST_COLUMNS

SHAPE = {
    "windows": [None, 4],
    "q_heads": 2,
    "head_dim": 8,
    "linear_parameters": 100,
    "head_parameters": 50,
    "weight_bytes_per_step": 300,
    "kv_bytes_per_token": 20,
}
PEAKS = {"measured_bytes_per_s": 2e6, "datasheet_bytes_per_s": 4e6, "measured_flops_per_s": 1e7}


WIDE = SHAPE | {
    "windows": [None, 8],
    "head_dim": 16,
    "linear_parameters": 1000,
    "head_parameters": 100,
    "weight_bytes_per_step": 4400,
    "kv_bytes_per_token": 64,
}


def section(
    steps: pd.DataFrame, make_context: Any, shape: Any, peaks: Any, *requests: dict[str, Any]
) -> dict[str, Any]:
    frame = pd.DataFrame([request(**each) for each in requests], columns=list(REQUEST_COLUMNS))
    run = RunTables.read(frame, steps, make_context(shape=shape, peaks=peaks))
    return resolved(roofline.section(run))


def request(
    prompt: int, times: list[int], counts: list[int | None] | None = None, warmup: bool = False
) -> dict[str, Any]:
    """A finished request whose chunks came at these times (ns)."""
    counts = [1] * len(times) if counts is None else counts
    return {
        "request_id": -1 if warmup else 0,
        "session": None,
        "intended_ns": 0,
        "sent_ns": 0,
        "first_ns": times[0],
        "last_ns": times[-1],
        "prompt_tokens": prompt,
        "requested_tokens": len(times),
        "output_tokens": sum(each or 0 for each in counts),
        "token_ns": times,
        "token_counts": counts,
        "finished": True,
        "error": None,
        "warmup": warmup,
    }


MS = 1_000_000


@pytest.fixture
def steps(make_steps: Any) -> Callable[..., pd.DataFrame]:
    """Steps of one sequence's decode and one millisecond each, one after the other."""

    def make(*rows: dict[str, Any]) -> pd.DataFrame:
        ends = [(i + 1) * 1_000_000 for i in range(len(rows))]
        one = {"num_decodes": 1, "num_seqs": 1}
        timed = [{"start_ns": end - 1_000_000, "end_ns": end} for end in ends]
        return make_steps(*(one | time | row for time, row in zip(timed, rows, strict=True)))

    return make


def test_bytes_of_decode_steps(steps: Any, make_context: Any) -> None:
    table = steps(
        {"context_tokens": 10, "num_prefill_tokens": 5},
        {"context_tokens": 10},
        {"context_tokens": 22, "num_seqs": 2},
    )
    found = section(table, make_context, SHAPE, PEAKS, {"prompt": 5, "times": [MS, 2 * MS, 3 * MS]})
    # Half the layers see all keys, half at most four a sequence: (10 + 4) / 2 and (22 + 8) / 2 tokens.
    needed = 2 * 300 + (7 + 15) * 20
    assert found["decode_bytes_per_s"] == pytest.approx(needed / 2e-3)
    assert found["mbu"] == {
        "measured": pytest.approx(needed / 2e-3 / 2e6),
        "datasheet": pytest.approx(needed / 2e-3 / 4e6),
    }


def test_flops_of_the_answered_requests(steps: Any, make_context: Any) -> None:
    table = steps(
        {"context_tokens": 5, "num_prefill_tokens": 5, "prefix_hit_tokens": 2}, {"context_tokens": 6}
    )
    found = section(table, make_context, SHAPE, PEAKS, {"prompt": 5, "times": [MS, 2 * MS, 2 * MS]})
    # 5 + 3 - 1 = 7 tokens computed, 2 of them found in the prefix cache, 3 rows of logits.
    linear = 2 * 100 * (7 - 2) + 2 * 50 * 3
    # Keys each of 7 queries sees: 1..7 = 28 without a window, 1 + 2 + 3 + 4 * 4 = 22 with a window of 4.
    attention = 4 * 2 * 8 * (28 + 22)
    assert found["flops_per_s"] == pytest.approx((linear + attention) / 2e-3)
    assert found["mfu"]["measured"] == pytest.approx((linear + attention) / 2e-3 / 1e7)
    assert found["mfu"]["datasheet"] is None
    assert "datasheet peak" in found["absent"]["mfu.datasheet"]


def test_flops_of_a_handed_over_warm_up_request(steps: Any, make_context: Any) -> None:
    """Two of its four tokens came inside: positions 7 and 8 (prompt 5), and two rows of logits."""
    table = steps({"context_tokens": 7}, {"context_tokens": 8})
    warm = {"prompt": 5, "times": [-2 * MS, -MS, MS, 2 * MS], "warmup": True}
    last = {"prompt": 1, "times": [2 * MS]}
    found = section(table, make_context, SHAPE, PEAKS, last, warm)
    linear = 2 * 100 * (2 + 1) + 2 * 50 * (2 + 1)
    attention = 4 * 2 * 8 * ((7 + 8) + (4 + 4) + 1 + 1)
    assert found["flops_per_s"] == pytest.approx((linear + attention) / 2e-3)


def test_unknown_output_counts_give_no_flops(steps: Any, make_context: Any) -> None:
    table = steps({"context_tokens": 5})
    found = section(table, make_context, SHAPE, PEAKS, {"prompt": 5, "times": [MS], "counts": [None]})
    assert found["mfu"] == {"measured": None, "datasheet": None}
    assert "unknown" in found["absent"]["mfu.measured"]


def test_decode_bytes_and_use(make_steps: Any, make_context: Any) -> None:
    """Two sequences, 40 keys in all: the full layer reads 40, the window of 8 at most 16."""
    steps = make_steps({"start_ns": 0, "end_ns": 1000, "num_decodes": 2, "num_seqs": 2, "context_tokens": 40})
    peaks = {"measured_bytes_per_s": 1e13}
    found = section(steps, make_context, WIDE, peaks, {"prompt": 1, "times": [1000]})
    needed = 4400 + (40 + 16) / 2 * 64
    assert found["decode_bytes_per_s"] == pytest.approx(needed / 1e-6)
    assert found["mbu"] == {"measured": pytest.approx(needed / 1e-6 / 1e13), "datasheet": None}
    assert found["mfu"]["measured"] is None


def test_run_flops(make_steps: Any, make_context: Any) -> None:
    """One request of 10 + 3 tokens, 4 of them from the cache: by hand."""
    steps = make_steps({"start_ns": 0, "end_ns": 1000, "prefix_hit_tokens": 4})
    found = section(steps, make_context, WIDE, {}, {"prompt": 10, "times": [1, 2, 1000]})
    keys = sum(range(1, 13)) + sum(min(i, 8) for i in range(1, 13))
    needed = 2 * 1000 * (12 - 4) + 2 * 100 * 3 + 4 * 2 * 16 * keys
    assert found["flops_per_s"] == pytest.approx(needed / 1e-6)
