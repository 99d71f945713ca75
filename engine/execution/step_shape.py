"""The shape of a step, and the shapes that captured graphs are made for.

A graph replays fixed sizes, so a step is laid out for the smallest captured shape that holds it and padded.
Beside decodes alone, steps with a few prompt tokens are captured: launching their kernels one by one takes
the host longer than the device needs to run them.
"""

from __future__ import annotations

from typing import NamedTuple

GRAPH_PROMPTS = 16
"""Prompts that a captured step with prompts holds at most."""
GRAPH_PROMPT_TOKENS = range(64, 513, 64)
"""Prompt tokens of captured steps; with more, computing takes longer than launching one by one."""
FEW_DRAFTED = 32
"""Tokens of a captured step with drafts up to which each is a decode of its own where attention does not
compute a sequence's few tokens like one (`AttentionRunner.few_queries`): kernels for decodes divide a
sequence among many units of the device, and few tokens leave them idle otherwise."""


class StepShape(NamedTuple):
    """What a step is laid out for: decodes first, then prompts; what is not live in either is padding.

    A named tuple, as some are made at every step.
    """

    decodes: int
    prompts: int = 0
    prompt_tokens: int = 0
    query: int = 0
    """Above 0, the prompts are sequences with drafted tokens: at most so many tokens each, and all are drawn
    from."""

    def holds(self, live: StepShape) -> bool:
        """True where a step of the `live` shape can be laid out as this one, of the same kind."""
        return (
            live.decodes <= self.decodes
            and live.prompts <= self.prompts
            and live.prompt_tokens <= self.prompt_tokens
            and (live.prompts > 0) == (self.prompts > 0)
            and live.query <= self.query
            and (live.query > 0) == (self.query > 0)
        )

    @property
    def num_seqs(self) -> int:
        """Rows."""
        return self.decodes + self.prompts

    @property
    def num_tokens(self) -> int:
        """Tokens; a decode has one."""
        return self.decodes + self.prompt_tokens

    @property
    def num_samples(self) -> int:
        """Tokens whose logits are drawn from when it is captured."""
        return self.decodes + (self.prompt_tokens if self.query else self.prompts)


def graph_shapes(max_seqs: int, max_step_tokens: int, mixed: bool, draft_tokens: int = 0) -> list[StepShape]:
    """The shapes worth a graph, fewest tokens first: decodes alone and, if `mixed`, beside a few prompts.

    Where `draft_tokens` are drafted for a sequence, `mixed` ones that verify them, too.

    Decodes and prompts together are at most max_seqs, prompt tokens at most max_step_tokens. A full engine
    admits one prompt as one sequence ends: the largest shapes leave room for few.
    """
    shapes = [StepShape(size) for size in graph_sizes(max_seqs)]
    if mixed:
        ladder = (0, 16, 32, 64, 96, 128, 192, 256, 384, 512, *(max_seqs - left for left in (16, 4, 1)))
        shapes += [
            StepShape(decodes, min(GRAPH_PROMPTS, max_seqs - decodes), tokens)
            for decodes in sorted({size for size in ladder if 0 <= size < max_seqs})
            for tokens in GRAPH_PROMPT_TOKENS
            if tokens <= max_step_tokens
        ]
        query = draft_tokens + 1
        shapes += [
            StepShape(0, size, size * query, query)
            for size in graph_sizes(max_seqs)
            if draft_tokens and size * query < GRAPH_PROMPT_TOKENS.stop
        ]
    return sorted(shapes, key=lambda shape: shape.num_tokens)


def graph_sizes(max_seqs: int) -> list[int]:
    """Batch sizes worth a graph, up to `max_seqs` or 1024: dense where padding would cost most."""
    largest = min(max_seqs, 1024)
    ladder = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1024, 64)]
    return [*(size for size in ladder if size < largest), largest]


def max_len_ladder(max_len: int) -> list[int]:
    """Upper bounds of sequence length to capture for, longest first; equal launch keys are captured once."""
    ladder = [max_len]
    while ladder[-1] > 128:
        ladder.append(1 << ((ladder[-1] - 1).bit_length() - 1))
    return ladder
