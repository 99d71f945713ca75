"""Settings and parameters outside their range are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
from engine_fixtures import open_small

from backbench.engine.config import EngineConfig
from backbench.engine.request import SamplingParams
from backbench.errors import EngineError


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.0},
        {"n": 0},
        {"max_tokens": 3, "forced_tokens": (1, 2)},
    ],
    ids=str,
)
def test_sampling_parameters(wrong: dict[str, Any]) -> None:
    with pytest.raises(EngineError) as caught:
        SamplingParams(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_size": 0},
        {"max_seqs": 0},
        {"max_step_tokens": -1},
        {"num_blocks": 0},
        {"max_len": 0},
        {"prefill_chunk": 0},
        {"kv_memory_fraction": 0.0},
        {"kv_memory_fraction": 1.5},
    ],
    ids=str,
)
def test_engine_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(EngineError) as caught:
        EngineConfig(**wrong)
    assert next(iter(wrong)).replace("_", "-") in str(caught.value)


def test_a_context_longer_than_the_models_is_refused() -> None:
    with pytest.raises(EngineError, match="exceeds the model's context of 128"):
        open_small(max_len=4096)
