"""What quantization costs in answers: a model beside the same one unquantized, forced through one text.

The record keeps sums of each sequence (`SUMS`); every number here follows from them. Intervals are between
sequences: tokens of one sequence share a context and move together, so whole sequences are drawn again, with
replacement, and an interval spans the middle 95 % of what such draws give (the cluster bootstrap's
percentile interval: Davison & Hinkley, Bootstrap Methods, 1997, section 3.8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from backbench.reports.metrics.metric import Metric, Missing, Part
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.statistics import CONFIDENCE, SEED, Floats, quantile

SUMS = ("tokens", "nll", "nll_unquantized", "kl_divergence", "top1_agreements")
"""What is kept of each sequence: the tokens it predicts, and sums over them: both models' negative
log-likelihoods, KL(unquantized || quantized), each in nats, and how often both have the same top token."""
DRAWS = 1000

Totals = Mapping[str, Any]
"""Name of `SUMS` -> its sum over sequences, or sums f64[draws] over draws of them."""


def _perplexity(total: Totals) -> Any:
    return _exp(total["nll"] / total["tokens"])


def _perplexity_unquantized(total: Totals) -> Any:
    return _exp(total["nll_unquantized"] / total["tokens"])


def _perplexity_change(total: Totals) -> Any:
    return _exp((total["nll"] - total["nll_unquantized"]) / total["tokens"]) - 1


def _kl_divergence(total: Totals) -> Any:
    return total["kl_divergence"] / total["tokens"]


def _top1_unchanged(total: Totals) -> Any:
    return total["top1_agreements"] / total["tokens"]


def _exp(value: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.exp(value)


def estimated(sequences: Mapping[str, Any], statistic: Callable[[Totals], Any]) -> dict[str, Any]:
    """{value, low, high} of a statistic of `SUMS`, each a list over sequences."""
    kept = {name: np.array(sequences[name], dtype=np.float64) for name in SUMS}
    value = float(statistic({name: each.sum() for name, each in kept.items()}))
    count = len(kept["tokens"])
    if count < 2:
        return {"value": value, "low": None, "high": None, "reason": "one sequence has no interval"}
    times = _times_drawn(count)
    drawn: Floats = np.sort(statistic({name: times @ each for name, each in kept.items()}))
    tail = (1 - CONFIDENCE) / 2
    return {"value": value, "low": quantile(drawn, tail), "high": quantile(drawn, 1 - tail)}


def _times_drawn(count: int) -> Floats:
    """f64[DRAWS, count]: how often each sequence is in each draw of `count` of them."""
    # RandomState's stream never changes between versions of numpy: a record must verify anywhere.
    random = np.random.RandomState(SEED)
    drawn = [np.bincount(random.randint(0, count, count), minlength=count) for _ in range(DRAWS)]
    return np.array(drawn, dtype=np.float64)


def kept(run: RunTables) -> Mapping[str, Any] | Missing:
    """The sums of each sequence; Missing with the section's reason where there are none."""
    section = run.given.get("accuracy") or {}
    found = section.get("sequences")
    return found if isinstance(found, dict) else Missing(section.get("reason") or "not measured")


def summarised(sequences: Mapping[str, Any]) -> dict[str, Any]:
    """Every metric of this family, by its key in the section, from the sums of each sequence."""
    return {name: estimated(sequences, each) for name, each in _STATISTICS.items()} | {
        "tokens": sum(sequences["tokens"])
    }


def _from_kept(compute: Callable[[Mapping[str, Any]], Any]) -> Callable[[RunTables], Any]:
    def value(run: RunTables) -> Any:
        found = kept(run)
        return found if isinstance(found, Missing) else compute(found)

    return value


_STATISTICS: dict[str, Callable[[Totals], Any]] = {
    "perplexity": _perplexity,
    "perplexity_unquantized": _perplexity_unquantized,
    "perplexity_change": _perplexity_change,
    "kl_divergence": _kl_divergence,
    "top1_unchanged": _top1_unchanged,
}


def _accuracy(key: str, label: str, unit: str, better: bool | None, definition: str) -> Metric:
    return Metric(
        ("accuracy", key),
        label,
        unit,
        better,
        definition,
        _from_kept(lambda sequences: estimated(sequences, _STATISTICS[key])),
        "Accuracy",
        parts=(Part(summary=True),),
    )


METRICS: tuple[Metric, ...] = (
    _accuracy(
        "perplexity",
        "Perplexity",
        "",
        False,
        "exp of the mean negative log-likelihood a token of the text that accuracy is judged on.",
    ),
    _accuracy(
        "perplexity_unquantized",
        "Perplexity, unquantized",
        "",
        None,
        "The same of the unquantized model on the same tokens.",
    ),
    _accuracy(
        "perplexity_change",
        "Perplexity change",
        "ratio",
        False,
        "Perplexity over the unquantized model's on the same tokens, less 1.",
    ),
    _accuracy(
        "kl_divergence",
        "KL divergence",
        "nat",
        False,
        "Mean over tokens of KL(unquantized || quantized), over the whole vocabulary.",
    ),
    _accuracy(
        "top1_unchanged",
        "Top-1 unchanged",
        "ratio",
        True,
        "Share of tokens whose most probable prediction is the unquantized model's.",
    ),
    Metric(
        ("accuracy", "tokens"),
        "Tokens predicted",
        "tokens",
        None,
        "Tokens of that text that both models predicted.",
        _from_kept(lambda sequences: sum(sequences["tokens"])),
        "Accuracy",
        parts=(),
    ),
)
