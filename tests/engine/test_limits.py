"""Settings outside their range are refused in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_fixtures import open_small, small_config

from backbench.backends.interface.device import cpu
from backbench.engine.config import EngineConfig
from backbench.engine.limits import EngineLimits, realise_limits
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


def test_what_was_left_open_is_decided_once() -> None:
    engine = open_small(block_size=None, max_step_tokens=24, max_seqs=3)
    limits = engine.limits
    assert limits == EngineLimits(
        block_size=16, max_len=128, max_seqs=3, max_step_tokens=24, prefill_chunk=24, num_blocks=3 * 8
    )
    assert (limits.max_batch_tokens, limits.blocks_per_seq, limits.num_rows) == (27, 8, 6)
    assert engine.scheduler.limits is engine.runner.limits is limits
    for name in ("block_size", "num_blocks", "max_len"):
        assert getattr(engine.config, name) == getattr(limits, name) == engine.describe()[name]
    assert engine.describe()["prefill_chunk"] is None, "the record says what was asked for"


def test_what_was_set_is_kept() -> None:
    limits = open_small(block_size=8, num_blocks=17, max_len=50, prefill_chunk=5).limits
    assert (limits.block_size, limits.num_blocks, limits.max_len, limits.prefill_chunk) == (8, 17, 50, 5)
    assert limits.blocks_per_seq == 7


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_default_block_size_depends_on_the_device_alone(kind: str) -> None:
    device = replace(cpu(), torch_device=torch.device(kind))
    assert realise_limits(EngineConfig(), small_config(), device).block_size == {"cpu": 16, "cuda": 64}[kind]


def test_a_context_longer_than_the_models_is_refused() -> None:
    with pytest.raises(EngineError, match="exceeds the model's context of 128"):
        open_small(max_len=4096)
