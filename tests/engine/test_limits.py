"""Settings outside their range are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
from engine_fixtures import open_small

from backbench.engine.config import EngineConfig
from backbench.errors import EngineError


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
