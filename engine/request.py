"""What the engine is asked for and what it answers: the types every caller of the engine sees."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias

from backbench.errors import EngineError

TokenIds: TypeAlias = Sequence[int]
"""Token ids in order: a prompt, say. The scheduler's `Sequence` is something else: one being generated."""


MOST_SEQUENCES = 16384
"""Sequences of one request: each is an object of the host's."""
WHOLE_NUMBERS = (
    ("max_tokens", 1, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("top_k", 0, 2**31 - 1),
    ("n", 1, MOST_SEQUENCES),
    ("beams", 1, MOST_SEQUENCES),
    ("seed", -(2**63), 2**64 - 1),
)
"""Fields of `SamplingParams` with the least and the greatest value that devices and hosts count with."""
TEMPERATURES = (1e-30, 1e30)
"""Logits are divided by these in fp32: beyond them, all become infinite or zero and the order is lost."""


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen and when it stops."""

    max_tokens: int = 16
    temperature: float = 0.0
    """0 = greedy; otherwise 1e-30 to 1e30."""
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
    beams: int = 1
    """Width of a beam search, which follows the most likely tokens; 1 = none. Its n best sequences are
    returned, best first and all at once, each token with its log-probability."""
    length_penalty: float = 1.0
    """Beam search ranks finished sequences by their log-probability / tokens ** length_penalty."""
    stop_token_ids: tuple[int, ...] = ()
    """Ends the sequence; the stop token is part of the output."""
    stop: tuple[str, ...] = ()
    """Strings that end the sequence once the decoded output contains one (needs a tokenizer)."""
    ignore_eos: bool = False
    min_tokens: int = 0
    """After so many tokens a sequence may end before max_tokens. What would have ended it earlier stays in
    the output; stop strings are looked for in what follows."""
    logprobs: bool = False
    """Return each token's log-probability under the model (before temperature), and the top-1 token."""
    forced_tokens: tuple[int, ...] | None = None
    """Replay these output tokens instead of sampled ones: two backends then see identical batches."""

    @property
    def filters(self) -> bool:
        """True when some tokens may not be drawn: a filter needs its own kernels."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def __post_init__(self) -> None:
        for name, low, high in WHOLE_NUMBERS:
            value = getattr(self, name)
            if not is_number(value, Integral):
                raise EngineError(f"{name} must be a whole number, not {shown(value)}.")
            if not low <= value <= high:
                raise EngineError(f"{name} must lie in {low} to {high}, not {shown(value)}.")
        for name in ("temperature", "top_p", "min_p", "length_penalty"):
            value = getattr(self, name)
            if not is_number(value, Real):
                raise EngineError(f"{name} must be a number, not {shown(value)}.")
        coldest, hottest = TEMPERATURES
        checks = (
            (
                self.temperature == 0 or coldest <= self.temperature <= hottest,
                f"temperature must be 0 (greedy) or lie in {coldest} to {hottest}, not {self.temperature}.",
            ),
            (0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}."),
            (0 <= self.min_p < 1, f"min_p must lie in [0, 1), not {self.min_p}."),
            (
                isinstance(self.stop, (tuple, list)) and all(s and isinstance(s, str) for s in self.stop),
                f"stop must be a tuple of strings that are not empty, not {shown(self.stop)}.",
            ),
            (
                abs(self.length_penalty) <= 100,
                f"length_penalty must lie in -100 to 100, not {self.length_penalty}.",
            ),
            (
                self.beams == 1
                or not (self.temperature or self.stop or self.min_tokens or self.forced_tokens is not None),
                "Beam search takes no temperature, stop, min_tokens or forced_tokens: the likeliest win.",
            ),
            (
                self.beams == 1 or self.n <= self.beams,
                f"n ({self.n}) must not exceed beams ({self.beams}): a search ends with so many sequences.",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise EngineError(message)
        if self.min_tokens > self.max_tokens:
            raise EngineError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})."
            )
        as_token_ids(self.stop_token_ids, "stop_token_ids")
        if self.forced_tokens is not None:
            known = len(as_token_ids(self.forced_tokens, "forced_tokens"))
            if known < self.max_tokens:
                raise EngineError(
                    f"forced_tokens must hold at least max_tokens ({self.max_tokens}) tokens, not {known}."
                )


def as_token_ids(values: Any, what: str, vocab_size: int | None = None) -> list[int]:
    """`values` as plain integers, in the vocabulary if one is given; EngineError says `what` they are."""
    try:
        ids = array("q", list(values)).tolist()
    except (TypeError, OverflowError):
        raise EngineError(f"{what} must be token ids, whole numbers, not {shown(values)}.") from None
    if ids and vocab_size is not None and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise EngineError(f"{what}: token id {wrong} is outside the vocabulary of {vocab_size}.")
    return ids


def is_number(value: Any, kind: type) -> bool:
    """True for a number of this kind, `numbers.Real` say, of any library; truth values are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value as a message shows it: however long it is, a line holds it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
    draft: tuple[int, int] | None = None
    """On the first token of a step that verified a draft: (tokens drafted, accepted)."""


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

    def append(self, token: Token) -> None:
        """Add its next token."""
        self.token_ids.append(token.token_id)
        if token.logprob is not None:
            self.logprobs.append(token.logprob)
        if token.top_token is not None:
            self.top_tokens.append(token.top_token)
        self.finish_reason = token.finish_reason


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
    device_ns: int | None = None
    """From its first kernel to its last result on the device, by the device's own events; None on a CPU."""
    draft_ns: int = 0
    """Of the host's time, that of drafting; with a model that drafts, its device's time, too."""
    draft_lengths: tuple[int, ...] = ()
    """Tokens drafted, of each sequence that had a draft."""
    accepted_lengths: tuple[int, ...] = ()
    """Of those, how many were accepted; the target's own token, the bonus, is none of them."""
