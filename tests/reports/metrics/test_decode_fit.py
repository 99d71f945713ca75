"""The decode fit recovers a known line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backbench.reports.metrics import decode_fit
from backbench.reports.metrics.metric import resolved

SHAPE = {"weight_bytes_per_step": 4400, "kv_bytes_per_token": 64}


def fitted(steps: Any, shape: Any = None, peaks: Any = None) -> dict[str, Any]:
    return resolved(decode_fit.fit(steps, decode_fit.floors(shape, peaks or {})))


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
    found = fitted(steps, SHAPE, {"measured_bytes_per_s": 1e9})
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
    found = fitted(steps)
    assert found["steps"] == len(tokens) - 5
    assert found["slope_s_per_token"] == pytest.approx(2.5e-7)
    assert found["intercept_floor_s"] is None


@pytest.mark.parametrize("tokens", [np.arange(1, 6), np.full(40, 7)])
def test_no_fit_says_why(make_steps: Any, tokens: Any) -> None:
    steps = back_to_back(
        make_steps, np.full(len(tokens), 1000), context_tokens=tokens, num_decodes=np.ones_like(tokens)
    )
    found = fitted(steps)
    assert found["intercept_s"] is None
    assert found["reason"]


def batches(seed: int = 0, steps: int = 400) -> tuple[Any, Any]:
    """A batch that fills and drains: sequences and their context rise and fall together, not in step."""
    rng = np.random.default_rng(seed)
    sequences = np.concatenate([np.arange(1, 65), np.full(steps - 128, 64), np.arange(64, 0, -1)])
    return sequences, (sequences * rng.uniform(200, 600, steps)).astype(int)


def test_what_a_sequence_costs_is_not_laid_at_the_kv_reads_door(make_steps: Any) -> None:
    """1 ms + 20 us a sequence + 50 ns a token; a fit in tokens alone would find 1.6 times the slope."""
    sequences, tokens = batches()
    durations = 1_000_000 + 20_000 * sequences + 50 * tokens
    steps = back_to_back(
        make_steps, durations, context_tokens=tokens, num_decodes=sequences, num_seqs=sequences
    )
    found = fitted(steps)
    assert found["intercept_s"] == pytest.approx(1e-3)
    assert found["per_sequence_s"] == pytest.approx(2e-5)
    assert found["slope_s_per_token"] == pytest.approx(5e-8)
    assert found["median_sequences"] == 64
    alone = np.polyfit(tokens, durations / 1e9, 1)[0]
    assert alone > 1.3 * found["slope_s_per_token"]
    context = np.array([0.0, 1e4])
    assert decode_fit.line(found, context) == pytest.approx([1e-3 + 64 * 2e-5, 1e-3 + 64 * 2e-5 + 5e-4])


def test_context_that_grows_with_the_sequences_is_not_told_apart(make_steps: Any) -> None:
    sequences = np.arange(1, 101)
    steps = back_to_back(
        make_steps,
        1_000_000 + 50 * 400 * sequences,
        context_tokens=400 * sequences + np.arange(100) % 3,
        num_decodes=sequences,
        num_seqs=sequences,
    )
    found = fitted(steps)
    assert found["slope_s_per_token"] is None
    assert "cannot be told apart" in found["absent"]["slope_s_per_token"]


def test_a_slope_that_means_nothing_is_withheld(make_steps: Any) -> None:
    """Step times that fall with the context, and ones that do not care."""
    _, tokens = batches()
    noise = np.random.default_rng(1).integers(0, 100_000, len(tokens))
    for durations, why in ((10_000_000 - 50 * tokens, "negative"), (1_000_000 + noise, "not distinguished")):
        ones = np.ones_like(tokens)
        found = fitted(
            back_to_back(make_steps, durations, context_tokens=tokens, num_decodes=ones, num_seqs=ones)
        )
        assert found["slope_s_per_token"] is None
        assert found["intercept_s"] is None
        assert why in found["absent"]["slope_s_per_token"]


def test_a_line_that_explains_next_to_nothing_is_withheld(make_steps: Any) -> None:
    """Over 4,000 steps a slope is told from zero by six standard errors, and explains a hundredth."""
    random = np.random.default_rng(3)
    tokens = np.tile(np.arange(100, 2100, 50), 100)
    noise = random.exponential(1_000_000, len(tokens))
    rows = {"context_tokens": tokens, "num_decodes": np.ones_like(tokens)}
    found = fitted(back_to_back(make_steps, (1_000_000 + 170 * tokens + noise).astype(int), **rows))
    assert 0 < found["r_squared"] < decode_fit.MIN_R_SQUARED
    assert found["slope_s_per_token"] is None and found["intercept_s"] is None
    assert "of the step times' variance, 10% needed" in found["absent"]["slope_s_per_token"]


def test_the_devices_own_times_are_fitted_where_every_decode_has_one(make_steps: Any) -> None:
    tokens = np.arange(100, 2100, 50)
    columns = {"context_tokens": tokens, "num_decodes": np.ones_like(tokens)}
    slowed_by_the_host = 5_000_000 + 250 * tokens
    steps = back_to_back(make_steps, slowed_by_the_host, **columns, device_ns=1_000_000 + 200 * tokens)
    found = fitted(steps)
    assert found["timed_by"] == "device events"
    assert found["intercept_s"] == pytest.approx(1e-3)
    assert found["slope_s_per_token"] == pytest.approx(2e-7)
    steps.loc[7, "device_ns"] = None
    found = fitted(steps)
    assert "timed_by" not in found
    assert found["intercept_s"] == pytest.approx(5e-3)
    assert found["slope_s_per_token"] == pytest.approx(2.5e-7)
