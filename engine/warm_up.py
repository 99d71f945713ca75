"""What an engine computes before it serves: nothing may compile or be captured while it does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from backbench.engine.execution.runner import device_seconds
from backbench.engine.request import SamplingParams

if TYPE_CHECKING:
    from backbench.engine.engine import Engine


def warm_up(engine: Engine, params: SamplingParams, candidates: int) -> float:
    """See `Engine.warm_up`. candidates: most likely tokens that a beam search asks for; 0 = there is none."""
    start = device_seconds()
    speculator, sampled = engine.speculator, params.temperature > 0
    filtered = sampled and params.filters
    engine.runner.capture(sampled=sampled, filtered=filtered, logprobs=params.logprobs, candidates=candidates)
    if speculator is not None:
        speculator.warm_up(sampled=sampled, filtered=filtered)
    capacity = min(engine.limits.max_len, engine.pool.num_blocks * engine.pool.block_size)
    outputs = min(4 + engine.limits.draft_tokens, capacity - 1)
    if outputs > 0:
        short = replace(
            params,
            max_tokens=outputs,
            min_tokens=0,
            n=1,
            beams=1,
            ignore_eos=True,
            forced_tokens=None,
            stop=(),
        )
        for batch in _batches(engine, capacity - outputs):
            engine.generate(batch, short)
    if speculator is not None:
        speculator.padding = False
    engine.reset_prefix_cache()
    engine.reset_counts()
    return device_seconds() - start


def _batches(engine: Engine, longest: int) -> list[list[list[int]]]:
    """Prompts whose steps are of every kind: few and many rows, decodes alone, prefills alone, both.

    None is longer than `longest` tokens. On a CPU nothing compiles, so a few tokens do.
    """
    vocab = engine.model_config.vocab_size

    def prompt(length: int, salt: int) -> list[int]:
        return [(7 * i + 31 * salt) % vocab for i in range(min(length, longest))]

    batches = [[prompt(1, 1), prompt(33, 2)]]
    if engine.selection.device.torch_device.type != "cpu":
        budget, seqs = engine.limits.max_step_tokens, engine.limits.max_seqs
        batches.append([prompt(budget, 3), prompt(budget, 4)])
        # One prompt fills a step; many more then join its decode, too many for one step.
        each = 2 * budget // seqs + 1
        batches.append([prompt(budget, 5), *(prompt(each, 6 + i) for i in range(seqs - 1))])
    return batches
