"""One sequence being generated: its tokens, its KV blocks and how far both have come."""

from __future__ import annotations

from collections.abc import Sequence as TokenSequence

from engine.request import SamplingParams


class Sequence:
    """Mutable state of one sequence; owned by the scheduler.

    Counts never wait for the device: `num_computed` and `pending` run ahead to what the steps in flight
    will have done, while `num_landed` and `token_ids` hold what the host has seen.
    """

    __slots__ = (
        "blocks",
        "digests",
        "finish_reason",
        "in_flight",
        "index",
        "num_computed",
        "num_landed",
        "num_published",
        "order",
        "params",
        "pending",
        "prompt_len",
        "request_id",
        "row",
        "running",
        "seed",
        "token_ids",
    )

    def __init__(
        self, request_id: str, index: int, prompt: TokenSequence[int], params: SamplingParams, order: int
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.params = params
        self.order = order
        """First come, first served: lower goes first."""
        self.seed = params.seed + index
        self.token_ids = list(prompt)
        self.prompt_len = len(self.token_ids)
        self.pending = 0
        """Tokens sampled by steps in flight, whose values the host does not know yet."""
        self.in_flight = 0
        """Steps in flight that include this sequence."""
        self.num_computed = 0
        """Tokens whose K and V are in the cache once the steps in flight are done."""
        self.num_landed = 0
        """Tokens whose K and V are in the cache now."""
        self.blocks: list[int] = []
        self.digests: list[bytes] = []
        """Chained hashes of the leading full blocks, as far as they were needed."""
        self.num_published = 0
        self.running = False
        self.row = -1
        """Row of the device's request tables; kept until the steps in flight have landed."""
        self.finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, those in flight included."""
        return len(self.token_ids) + self.pending

    @property
    def num_output(self) -> int:
        """Output tokens, those in flight included."""
        return len(self.token_ids) + self.pending - self.prompt_len

    @property
    def wants_step(self) -> bool:
        """True while there is a token to compute that can still lead to another output token."""
        return self.finish_reason is None and self.num_output < self.params.max_tokens
