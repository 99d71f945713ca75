"""What the engine is asked for and what it answers: the types every caller of the engine sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from backbench.errors import EngineError

TokenIds: TypeAlias = Sequence[int]
"""Token ids in order: a prompt, say. The scheduler's `Sequence` is something else: one being generated."""


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen and when it stops."""

    max_tokens: int = 16
    temperature: float = 0.0
    """0 = greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 = all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches p."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one."""
    seed: int = 0
    """Fixes this request's draws, whatever else is in the batch."""
    n: int = 1
    """Sequences sampled from one prompt; they share its KV blocks. Sequence i draws with seed + i."""
    stop_token_ids: tuple[int, ...] = ()
    """Ends the sequence; the stop token is part of the output."""
    stop: tuple[str, ...] = ()
    """Strings that end the sequence once the decoded output contains one (needs a tokenizer)."""
    ignore_eos: bool = False
    logprobs: bool = False
    """Return each token's log-probability under the model (before temperature), and the top-1 token."""
    forced_tokens: tuple[int, ...] | None = None
    """Replay these output tokens instead of sampled ones: two backends then see identical batches."""

    @property
    def filters(self) -> bool:
        """True when some tokens may not be drawn: a filter needs its own kernels."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def __post_init__(self) -> None:
        checks = (
            (self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}."),
            (self.temperature >= 0, f"temperature must be 0 or more, not {self.temperature}."),
            (self.top_k >= 0, f"top_k must be 0 (off) or more, not {self.top_k}."),
            (0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}."),
            (0 <= self.min_p < 1, f"min_p must lie in [0, 1), not {self.min_p}."),
            (self.n >= 1, f"n must be at least 1, not {self.n}."),
            (
                self.forced_tokens is None or len(self.forced_tokens) >= self.max_tokens,
                f"forced_tokens must hold at least max_tokens ({self.max_tokens}) tokens.",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise EngineError(message)


class Token(NamedTuple):
    """One newly visible output token. A named tuple, as hundreds are made at every step."""

    request_id: str
    sequence: int
    """Which of the request's n sequences."""
    token_id: int
    logprob: float | None = None
    top_token: int | None = None
    """The most likely token at this position (with `logprobs`)."""
    finish_reason: str | None = None
    """On a sequence's last token: "length", "stop"."""


@dataclass
class Completion:
    """One finished sequence, as `Engine.generate` returns it."""

    request_id: str
    sequence: int
    """Which of the request's n sequences."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class StepStats:
    """One engine step, as `steps.parquet` keeps it. Times are `time.perf_counter_ns`."""

    step: int
    start_ns: int
    """When scheduling of this step began."""
    end_ns: int
    """When its tokens became visible to the host."""
    host_ns: int
    """Host time spent scheduling, preparing and launching it and handling its tokens; waits left out."""
    num_seqs: int
    num_tokens: int
    num_prefill_tokens: int
    num_decodes: int
    context_tokens: int
    """Sum over sequences of the keys attended to."""
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    prefix_hit_tokens: int
    preemptions: int
    graph: bool
    """True when the step replayed a captured graph."""
