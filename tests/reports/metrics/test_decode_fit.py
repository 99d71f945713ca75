"""The decode fit recovers a known line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backbench.reports.metrics import decode_fit

SHAPE = {"weight_bytes_per_step": 4400, "kv_bytes_per_token": 64}


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


@pytest.mark.parametrize("tokens", [np.arange(1, 6), np.full(40, 7)])
def test_no_fit_says_why(make_steps: Any, tokens: Any) -> None:
    steps = back_to_back(
        make_steps, np.full(len(tokens), 1000), context_tokens=tokens, num_decodes=np.ones_like(tokens)
    )
    found = decode_fit.fit(steps, {})
    assert found["intercept_s"] is None
    assert found["reason"]
