"""The decode fit recovers a known line, and the roofline counts known bytes and FLOPs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness import decode_fit, roofline
from harness.metrics import read_requests

SHAPE = {
    "windows": [None, 8],
    "q_heads": 2,
    "head_dim": 16,
    "linear_parameters": 1000,
    "head_parameters": 100,
    "weight_bytes_per_step": 4400,
    "kv_bytes_per_token": 64,
}


def back_to_back(make_steps: Any, durations_ns: Any, **columns: Any) -> Any:
    ends = np.cumsum(durations_ns)
    rows = [
        {"start_ns": int(end - duration), "end_ns": int(end), **{k: int(v[i]) for k, v in columns.items()}}
        for i, (end, duration) in enumerate(zip(ends, durations_ns, strict=True))
    ]
    return make_steps(*rows)


def test_fit_recovers_the_line(make_steps: Any) -> None:
    tokens = np.arange(100, 2100, 50)
    steps = back_to_back(make_steps, 1_000_000 + 250 * tokens, context_tokens=tokens, num_decodes=tokens)
    found = decode_fit.fit(steps, decode_fit.floors(SHAPE, {"measured_bytes_per_s": 1e9}))
    assert found["intercept_s"] == pytest.approx(1e-3)
    assert found["slope_s_per_token"] == pytest.approx(2.5e-7)
    assert found["r_squared"] == pytest.approx(1.0)
    assert found["intercept_floor_s"] == pytest.approx(4.4e-6)
    assert found["slope_floor_s_per_token"] == pytest.approx(64e-9)


def test_steps_with_prefill_and_warmup_steps_play_no_part(make_steps: Any) -> None:
    tokens = np.arange(100, 2100, 50)
    steps = back_to_back(
        make_steps, 1_000_000 + 250 * tokens, context_tokens=tokens, num_decodes=np.ones_like(tokens)
    )
    steps.loc[3, "num_prefill_tokens"] = 512
    steps.loc[3, "end_ns"] += 0
    steps[["start_ns", "end_ns"]] -= int(steps["end_ns"].iloc[4])
    found = decode_fit.fit(steps, decode_fit.floors(None, {}))
    assert found["steps"] == len(tokens) - 5
    assert found["slope_s_per_token"] == pytest.approx(2.5e-7)
    assert found["intercept_floor_s"] is None


def test_overlapped_steps_count_once(make_steps: Any) -> None:
    """Each step is launched while the one before runs: what it adds is end to end, not start to end."""
    steps = make_steps(
        {"start_ns": 0, "end_ns": 100},
        {"start_ns": 50, "end_ns": 200},
        {"start_ns": 150, "end_ns": 300},
        {"start_ns": 1000, "end_ns": 1100},
    )
    assert decode_fit.step_times_ns(steps).tolist() == [100, 100, 100, 100]


@pytest.mark.parametrize("tokens", [np.arange(1, 6), np.full(40, 7)])
def test_no_fit_says_why(make_steps: Any, tokens: Any) -> None:
    steps = back_to_back(
        make_steps, np.full(len(tokens), 1000), context_tokens=tokens, num_decodes=np.ones_like(tokens)
    )
    found = decode_fit.fit(steps, {})
    assert found["intercept_s"] is None
    assert found["reason"]


def test_decode_bytes_and_use(make_steps: Any, make_context: Any) -> None:
    """Two sequences, 40 keys in all: the full layer reads 40, the window of 8 at most 16."""
    steps = make_steps({"start_ns": 0, "end_ns": 1000, "num_decodes": 2, "num_seqs": 2, "context_tokens": 40})
    found = roofline.section(empty_rows(make_context), steps, SHAPE, {"measured_bytes_per_s": 1e13})
    needed = 4400 + (40 + 16) / 2 * 64
    assert found["decode_bytes_per_s"] == pytest.approx(needed / 1e-6)
    assert found["mbu"] == {"measured": pytest.approx(needed / 1e-6 / 1e13), "datasheet": None}
    assert found["mfu"]["measured"] is None


def empty_rows(make_context: Any) -> Any:
    import pandas as pd

    from reports.record import REQUEST_COLUMNS

    frame = pd.DataFrame({name: [] for name in REQUEST_COLUMNS})
    return read_requests(frame, make_context())


def test_run_flops(make_steps: Any, make_context: Any) -> None:
    """One request of 10 + 3 tokens, 4 of them from the cache: by hand."""
    import pandas as pd

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
    found = roofline.section(rows, steps, SHAPE, {})
    keys = sum(range(1, 13)) + sum(min(i, 8) for i in range(1, 13))
    needed = 2 * 1000 * (12 - 4) + 2 * 100 * 3 + 4 * 2 * 16 * keys
    assert found["flops_per_s"] == pytest.approx(needed / 1e-6)


def test_the_longest_name_of_the_data_sheet_wins() -> None:
    assert roofline.datasheet("NVIDIA H200") == (4.8e12, 0.989e15)
    assert roofline.datasheet("NVIDIA H100 PCIe") == (2.0e12, 0.756e15)
    assert roofline.datasheet("AMD Instinct MI300X OAM") == (5.3e12, 1.307e15)
    assert roofline.datasheet("AMD EPYC") is None
