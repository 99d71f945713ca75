"""One sequence being generated: its tokens, its KV blocks and how far both have come."""

from __future__ import annotations

from typing import Any

from backbench.engine.request import SamplingParams, TokenIds


class Sequence:
    """Mutable state of one sequence; owned by the scheduler.

    Counts never wait for the device: `num_computed` and `num_tokens` run ahead to what the steps in flight
    will have done, while `num_landed` and `token_ids` hold what the host has seen.
    """

    __slots__ = (
        "blocks",
        "digests",
        "end_len",
        "finish_reason",
        "forked",
        "in_flight",
        "index",
        "num_candidates",
        "num_computed",
        "num_landed",
        "num_published",
        "num_tokens",
        "order",
        "params",
        "preempted",
        "prompt_len",
        "proposer_state",
        "request_id",
        "row",
        "running",
        "seed",
        "token_ids",
    )

    def __init__(
        self, request_id: str, index: int, prompt: TokenIds, params: SamplingParams, order: int
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.params = params
        self.order = order
        """First come, first served: lower goes first."""
        self.seed = params.seed + index
        self.token_ids = list(prompt)
        """Prompt and output tokens whose values the host knows."""
        self.prompt_len = len(self.token_ids)
        self.end_len = self.prompt_len + params.max_tokens
        self.num_tokens = self.prompt_len
        """Prompt and output tokens, those being sampled by steps in flight included."""
        self.num_computed = 0
        """Tokens whose K and V are in the cache once the steps in flight are done."""
        self.num_landed = 0
        """Tokens whose K and V are in the cache now."""
        self.num_candidates = 0
        """How many of the most likely next tokens a beam search asks for."""
        self.in_flight = 0
        """Steps in flight that include this sequence."""
        self.blocks: list[int] = []
        self.forked = False
        """True when a block it may write can have other readers."""
        self.digests: list[bytes] = []
        """Chained hashes of the leading full blocks, as far as they were needed."""
        self.num_published = 0
        self.preempted = False
        """It ran before, and computes again what it lost."""
        self.running = False
        self.row = -1
        """Row of the device's request tables; kept until the steps in flight have landed."""
        self.finish_reason: str | None = None
        self.proposer_state: Any = None
        """What the proposer of drafts keeps of it."""
