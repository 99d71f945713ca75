"""What `--speculate` asks for, read without torch: a proposer, and how many tokens it may draft."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from backbench.errors import EngineError

MOST_TOKENS = 15
"""Tokens drafted at once, at most: a verified sequence then fills a tile of 16 rows."""
FORMS = "ngram:K, draft:MODEL:K, eagle3:HEAD:K, synthetic:LENGTH:K or synthetic:RATE/RATE/..."


@dataclass(frozen=True)
class Speculation:
    """A proposer and its limits."""

    proposer: str
    """ "ngram", "draft", "eagle3" or "synthetic"."""
    tokens: int
    """Drafted for one sequence in one step, at most."""
    model: str | None = None
    """Of `draft` and `eagle3`."""
    rates: tuple[float, ...] = ()
    """Of `synthetic`: the chance of each drafted token to be accepted where those before it were."""

    @property
    def accurate(self) -> bool:
        """False where acceptance is drawn and tells nothing about a model."""
        return self.proposer != "synthetic"


def parse_speculation(given: object) -> Speculation:
    """Read `ngram:4`, `draft:tiny-draft:2`, `eagle3:HEAD:3`, `synthetic:2.5:4` or `synthetic:0.8/0.5/0.2`.

    Raises EngineError, one line, where it is none of them.
    """
    text = str(given)
    proposer, _, rest = text.partition(":")
    if proposer == "ngram":
        return Speculation(proposer, _tokens(rest, text))
    if proposer in ("draft", "eagle3"):
        model, _, tokens = rest.rpartition(":")
        if model:
            return Speculation(proposer, _tokens(tokens, text), model=model)
    if proposer == "synthetic":
        length, _, tokens = rest.partition(":")
        if tokens:
            return _of_length(length, _tokens(tokens, text), text)
        if rest:
            return _of_rates(rest, text)
    raise EngineError(f"--speculate takes {FORMS}; not {text[:60]!r}.")


def conditional_rate(length: float, tokens: int) -> float:
    """The p with 1 + p + p^2 + ... + p^tokens = length: every drafted token is accepted with chance p.

    Found by halving: the sum grows with p, from 1 at 0 to tokens + 1 at 1.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_length((middle,) * tokens) < length else (low, middle)
    return high


def mean_length(rates: tuple[float, ...]) -> float:
    """Tokens a verified sequence gains a step on average, its own (the bonus) included, from conditional
    rates: 1 + r1 + r1 r2 + ... (Leviathan et al. 2023, equation 1, for equal rates)."""
    total = reached = 1.0
    for rate in rates:
        reached *= rate
        total += reached
    return total


def _of_length(length: str, tokens: int, text: str) -> Speculation:
    mean = _number(length, text)
    if not 1 <= mean <= tokens + 1:
        raise EngineError(
            f"--speculate {text[:60]}: {tokens} drafted tokens give 1 to {tokens + 1} tokens a step, the "
            f"target's own included; not {length[:20]}."
        )
    return Speculation("synthetic", tokens, rates=(conditional_rate(mean, tokens),) * tokens)


def _of_rates(rates: str, text: str) -> Speculation:
    """Unconditional rates: the share of drafts of which so many tokens and more are accepted."""
    shares = [1.0, *(_number(rate, text) for rate in rates.split("/"))]
    tokens = _tokens(str(len(shares) - 1), text)
    if not all(0 <= after <= before for before, after in pairwise(shares)):
        raise EngineError(
            f"--speculate {text[:60]}: rates are shares of all drafts, 0 to 1, none above the one before."
        )
    found = tuple(after / before if before else 0.0 for before, after in pairwise(shares))
    return Speculation("synthetic", tokens, rates=found)


def _tokens(digits: str, text: str) -> int:
    if not digits.isascii() or not digits.isdigit() or not 1 <= int(digits[:8]) <= MOST_TOKENS or digits[8:]:
        raise EngineError(
            f"--speculate {text[:60]}: the number of drafted tokens must lie in 1 to {MOST_TOKENS}."
        )
    return int(digits)


def _number(digits: str, text: str) -> float:
    try:
        return float(digits)
    except ValueError:
        raise EngineError(
            f"--speculate takes {FORMS}; {digits[:20]!r} in {text[:60]!r} is no number."
        ) from None
