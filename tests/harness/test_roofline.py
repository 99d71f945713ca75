"""MBU and MFU against figures worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness import roofline

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


class Rows:
    """The columns of `harness.metrics.Requests` that the roofline reads."""

    def __init__(self, prompts: list[int], outputs: list[int]) -> None:
        self.first_ns = np.zeros(len(prompts))
        self.prompt_tokens = np.asarray(prompts, dtype=float)
        self.output_tokens = np.asarray(outputs, dtype=float)


def steps(*rows: dict[str, Any]) -> pd.DataFrame:
    """Steps of one millisecond each, one after the other."""
    defaults = {"num_prefill_tokens": 0, "num_decodes": 1, "num_seqs": 1, "prefix_hit_tokens": 0}
    made = [
        defaults | {"start_ns": i * 1_000_000, "end_ns": (i + 1) * 1_000_000, "host_ns": 0} | row
        for i, row in enumerate(rows)
    ]
    return pd.DataFrame(made)


def test_bytes_of_decode_steps() -> None:
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


def test_flops_of_the_answered_requests() -> None:
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


def test_unknown_output_counts_give_no_flops() -> None:
    rows = Rows([5], [3])
    rows.output_tokens[0] = np.nan
    found = roofline.section(rows, steps({"context_tokens": 5}), SHAPE, PEAKS)  # type: ignore[arg-type]
    assert found["mfu"] == {"measured": None, "datasheet": None}


@pytest.mark.parametrize(
    ("name", "bytes_per_s"),
    [("NVIDIA H200", 4.8e12), ("NVIDIA H100 PCIe", 2.0e12), ("NVIDIA H100 80GB HBM3", 3.35e12)],
)
def test_the_longest_name_wins(name: str, bytes_per_s: float) -> None:
    found = roofline.datasheet(name)
    assert found is not None and found[0] == bytes_per_s


def test_an_unknown_device_has_no_datasheet() -> None:
    assert roofline.datasheet("AMD EPYC") is None
