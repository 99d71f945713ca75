"""What an engine computes before it serves: nothing may compile or be captured while it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from backbench.engine.execution.runner import Runner
from backbench.engine.request import SamplingParams
from backbench.engine.speculation.speculator import Speculator

Prompts = list[list[int]]


def warm_up(
    runner: Runner,
    speculator: Speculator | None,
    params: SamplingParams,
    candidates: int,
    generate: Callable[[Prompts, SamplingParams], object],
) -> None:
    """Compile and capture every launch that requests like `params` can need, and serve a few with `generate`.

    candidates: most likely tokens that a beam search asks for; 0 = there is none.
    """
    limits, sampled = runner.limits, params.temperature > 0
    filtered = sampled and params.filters
    runner.capture(sampled=sampled, filtered=filtered, logprobs=params.logprobs, candidates=candidates)
    if speculator is not None:
        speculator.warm_up(sampled=sampled, filtered=filtered)
    capacity = min(limits.max_len, limits.num_blocks * limits.block_size)
    outputs = min(4 + limits.draft_tokens, capacity - 1)
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
        for batch in _batches(runner, capacity - outputs):
            generate(batch, short)
    if speculator is not None:
        speculator.padding = False


def _batches(runner: Runner, longest: int) -> list[Prompts]:
    """Prompts whose steps are of every kind: few and many rows, decodes alone, prefills alone, both.

    None is longer than `longest` tokens. On a CPU nothing compiles, so a few tokens do.
    """
    vocab, limits = runner.decoder.config.vocab_size, runner.limits

    def prompt(length: int, salt: int) -> list[int]:
        return [(7 * i + 31 * salt) % vocab for i in range(min(length, longest))]

    batches = [[prompt(1, 1), prompt(33, 2)]]
    if runner.decoder.device.torch_device.type != "cpu":
        budget, seqs = limits.max_step_tokens, limits.max_seqs
        batches.append([prompt(budget, 3), prompt(budget, 4)])
        # One prompt fills a step; many more then join its decode, too many for one step.
        each = 2 * budget // seqs + 1
        batches.append([prompt(budget, 5), *(prompt(each, 6 + i) for i in range(seqs - 1))])
    return batches
