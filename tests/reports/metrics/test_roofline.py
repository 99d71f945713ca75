"""MBU and MFU against figures worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from backbench.reports.metrics import roofline
from backbench.reports.metrics.requests import read_requests
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


class Rows:
    """The columns of `reports.metrics.compute.Requests` that the roofline reads."""

    def __init__(self, prompts: list[int], outputs: list[int]) -> None:
        self.first_ns = np.zeros(len(prompts))
        self.prompt_tokens = np.asarray(prompts, dtype=float)
        self.output_tokens = np.asarray(outputs, dtype=float)


@pytest.fixture
def steps(make_steps: Any) -> Callable[..., pd.DataFrame]:
    """Steps of one sequence's decode and one millisecond each, one after the other."""

    def make(*rows: dict[str, Any]) -> pd.DataFrame:
        ends = [(i + 1) * 1_000_000 for i in range(len(rows))]
        one = {"num_decodes": 1, "num_seqs": 1}
        timed = [{"start_ns": end - 1_000_000, "end_ns": end} for end in ends]
        return make_steps(*(one | time | row for time, row in zip(timed, rows, strict=True)))

    return make


def test_bytes_of_decode_steps(steps: Any) -> None:
    table = steps(
        {"context_tokens": 10, "num_prefill_tokens": 5},
        {"context_tokens": 10},
        {"context_tokens": 22, "num_seqs": 2},
    )
    found = roofline.section(Rows([5], [3]), table, SHAPE, PEAKS)  # type: ignore[arg-type]
    # Half the layers see all keys, half at most four a sequence: (10 + 4) / 2 and (22 + 8) / 2 tokens.
    needed = 2 * 300 + (7 + 15) * 20
    assert found["decode_bytes_per_s"] == pytest.approx(needed / 2e-3)
    assert found["mbu"] == {
        "measured": pytest.approx(needed / 2e-3 / 2e6),
        "datasheet": pytest.approx(needed / 2e-3 / 4e6),
    }


def test_flops_of_the_answered_requests(steps: Any) -> None:
    table = steps(
        {"context_tokens": 5, "num_prefill_tokens": 5, "prefix_hit_tokens": 2}, {"context_tokens": 6}
    )
    found = roofline.section(Rows([5], [3]), table, SHAPE, PEAKS)  # type: ignore[arg-type]
    # 5 + 3 - 1 = 7 tokens computed, 2 of them found in the prefix cache, 3 rows of logits.
    linear = 2 * 100 * (7 - 2) + 2 * 50 * 3
    # Keys each of 7 queries sees: 1..7 = 28 without a window, 1 + 2 + 3 + 4 * 4 = 22 with a window of 4.
    attention = 4 * 2 * 8 * (28 + 22)
    assert found["flops_per_s"] == pytest.approx((linear + attention) / 2e-3)
    assert found["mfu"]["measured"] == pytest.approx((linear + attention) / 2e-3 / 1e7)
    assert found["mfu"]["datasheet"] is None


def test_unknown_output_counts_give_no_flops(steps: Any) -> None:
    rows = Rows([5], [3])
    rows.output_tokens[0] = np.nan
    found = roofline.section(rows, steps({"context_tokens": 5}), SHAPE, PEAKS)  # type: ignore[arg-type]
    assert found["mfu"] == {"measured": None, "datasheet": None}


def test_decode_bytes_and_use(make_steps: Any, make_context: Any) -> None:
    """Two sequences, 40 keys in all: the full layer reads 40, the window of 8 at most 16."""
    steps = make_steps({"start_ns": 0, "end_ns": 1000, "num_decodes": 2, "num_seqs": 2, "context_tokens": 40})
    found = roofline.section(empty_rows(make_context), steps, WIDE, {"measured_bytes_per_s": 1e13})
    needed = 4400 + (40 + 16) / 2 * 64
    assert found["decode_bytes_per_s"] == pytest.approx(needed / 1e-6)
    assert found["mbu"] == {"measured": pytest.approx(needed / 1e-6 / 1e13), "datasheet": None}
    assert found["mfu"]["measured"] is None


def empty_rows(make_context: Any) -> Any:
    frame = pd.DataFrame({name: [] for name in REQUEST_COLUMNS})
    return read_requests(frame, make_context())


def test_run_flops(make_steps: Any, make_context: Any) -> None:
    """One request of 10 + 3 tokens, 4 of them from the cache: by hand."""
    row = {
        "request_id": 0,
        "session": None,
        "intended_ns": 0,
        "sent_ns": 0,
        "first_ns": 1,
        "last_ns": 3,
        "prompt_tokens": 10,
        "requested_tokens": 3,
        "output_tokens": 3,
        "token_ns": [1, 2, 3],
        "token_counts": [1, 1, 1],
        "finished": True,
        "error": None,
    }
    rows = read_requests(pd.DataFrame([row]), make_context())
    steps = make_steps({"start_ns": 0, "end_ns": 1000, "prefix_hit_tokens": 4})
    found = roofline.section(rows, steps, WIDE, {})
    keys = sum(range(1, 13)) + sum(min(i, 8) for i in range(1, 13))
    needed = 2 * 1000 * (12 - 4) + 2 * 100 * 3 + 4 * 2 * 16 * keys
    assert found["flops_per_s"] == pytest.approx(needed / 1e-6)
