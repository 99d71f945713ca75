"""Is the answer right: teacher-forced log-probabilities against the torch backend on the same weights.

A fast wrong answer is worth nothing, so every run ends with this check.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from backbench.errors import HarnessError

if TYPE_CHECKING:
    import torch

    from backbench.engine.engine import Engine
    from backbench.engine.models.checkpoint import ModelSource
    from backbench.engine.request import Completion

LENGTHS = (1, 3, 16, 17, 63, 130, 257, 600)
"""Prompt lengths: one token, both sides of a block's edge, several blocks."""
OUTPUTS = 24
SEED = 20_240_229


@dataclass(frozen=True)
class Tolerance:
    """How far apart two right answers may be."""

    mean: float
    """Of the absolute log-probability differences, over all positions."""
    sequence_mean: float
    """The same over each sequence alone, so that one wrong sequence cannot hide among right ones."""
    maximum: float


def tolerance(dtype: torch.dtype, layers: int, reference: np.ndarray) -> Tolerance:
    """Bounds from the dtype's rounding, the depth, and the size of the reference's log-probabilities.

    Two right kernels round differently. Each rounds the residual stream twice a layer, the final norm's
    output and the logits; independent roundings, each uniform and so 1 / sqrt(3) of its bound in the root
    mean square, add like a random walk, and so do the two kernels' errors:
    rounding * sqrt(2 * (2 * layers + 2) / 3), relative to the logits, whose scale the log-probabilities
    show. A sequence may deviate twice as much as the mean, one position four times as much as that bound
    at the largest log-probability seen. Wrong kernels are off by whole nats.
    """
    from backbench.backends.conformance.tolerance import rounding

    relative = rounding(dtype) * math.sqrt(2 * (2 * layers + 2) / 3)
    mean = relative * max(1.0, float(np.abs(reference).mean()))
    return Tolerance(mean, 2 * mean, 4 * relative * max(1.0, float(np.abs(reference).max())))


def prompts(vocab_size: int, max_len: int) -> list[list[int]]:
    """The fixed sample: seeded random token ids at `LENGTHS`, as far as the context allows."""
    rng = np.random.default_rng(SEED)
    lengths = [length for length in LENGTHS if length + OUTPUTS <= max_len] or [1]
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def check(engine: Engine, source: ModelSource) -> dict[str, Any]:
    """The record's `correctness` section.

    The torch backend continues each prompt by sampling at temperature 1, which gives text the model finds
    plausible; the engine under test is then forced through the same tokens. The engine must be idle.
    """
    from backbench.engine.engine import Engine as ReferenceEngine
    from backbench.engine.request import SamplingParams

    config = engine.config
    assert config.max_len is not None
    sample = prompts(engine.model_config.vocab_size, config.max_len)
    outputs = min(OUTPUTS, config.max_len - 1)
    blocks = sum(-(-(len(prompt) + outputs) // engine.pool.block_size) + 1 for prompt in sample)
    if config.num_blocks is not None and config.num_blocks < max(
        -(-(len(prompt) + outputs) // engine.pool.block_size) for prompt in sample
    ):
        return {"passed": None, "reason": "the KV pool is too small for the sample"}
    reference = ReferenceEngine.open(
        source,
        backend="torch",
        device=engine.selection.device,
        dtype=engine.decoder.dtype,
        config=replace(
            config, num_blocks=blocks, max_seqs=len(sample), prefix_cache=False, graphs=False, overlap=False
        ),
        overrides={},
        weights=engine.weights,
    )
    free = SamplingParams(max_tokens=outputs, temperature=1.0, seed=SEED, ignore_eos=True, logprobs=True)
    expected = reference.generate(sample, free)
    engine.reset_prefix_cache()
    actual = _forced(engine, sample, expected, free)
    used = engine.selection.used
    same = all(name == "torch" for name in used.values())
    return _compare(expected, actual, engine.decoder.dtype, engine.model_config.num_layers) | {
        "reference": "torch",
        "against_itself": same,
        "sequences": len(sample),
    }


def _forced(
    engine: Engine, sample: list[list[int]], expected: list[Completion], free: Any
) -> list[Completion]:
    """The engine's log-probabilities of the expected tokens, all sequences in one running batch."""
    from backbench.engine.request import Completion

    found = {}
    for index, (prompt, completion) in enumerate(zip(sample, expected, strict=True)):
        name = f"correctness-{index}"
        found[name] = Completion(name, 0)
        engine.add_request(
            name, prompt, replace(free, temperature=0.0, forced_tokens=tuple(completion.token_ids))
        )
    while engine.has_work:
        for token in engine.step():
            if token.logprob is None or token.top_token is None:
                raise HarnessError(
                    "The engine returned no log-probability where one was asked for.", exit_code=5
                )
            done = found[token.request_id]
            done.token_ids.append(token.token_id)
            done.logprobs.append(token.logprob)
            done.top_tokens.append(token.top_token)
    engine.take_step_stats()
    return list(found.values())


def _compare(
    expected: list[Completion], actual: list[Completion], dtype: torch.dtype, layers: int
) -> dict[str, Any]:
    if any(a.token_ids != b.token_ids for a, b in zip(expected, actual, strict=True)):
        return {"passed": False, "reason": "the engine did not replay the forced tokens"}
    reference = np.concatenate([each.logprobs for each in expected])
    apart = [np.abs(np.subtract(a.logprobs, b.logprobs)) for a, b in zip(expected, actual, strict=True)]
    difference = np.concatenate(apart)
    agree = np.concatenate(
        [np.equal(a.top_tokens, b.top_tokens) for a, b in zip(expected, actual, strict=True)]
    )
    bound = tolerance(dtype, layers, reference)
    worst = max(float(each.mean()) for each in apart)
    largest = float(difference.max())
    mean = float(difference.mean())
    # Written so that NaN fails.
    passed = mean <= bound.mean and worst <= bound.sequence_mean and largest <= bound.maximum
    return {
        "passed": bool(passed),
        "max_abs_logprob_diff": largest,
        "mean_abs_logprob_diff": mean,
        "worst_sequence_mean_abs_logprob_diff": worst,
        "top1_agreement": float(agree.mean()),
        "tokens": len(difference),
        "tolerance": bound.maximum,
        "tolerance_mean": bound.mean,
        "tolerance_sequence_mean": bound.sequence_mean,
    }
