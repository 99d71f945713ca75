"""Whether parsed JSON has the shape of a run record, so that nothing that reads one trips over it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from backbench.errors import printable

DEEPEST = 32
"""Levels of objects and lists; a record has about ten."""

NUMBER_NAME = re.compile(r"_(s|ns|bytes|w|j|per_s|tokens|token|ratio|percent)$")
"""The end of a name that says its unit: such a field is a number, an object of them, or null."""

TEXT, OBJECT, NUMBER = (str, type(None)), (dict, type(None)), (int, float, type(None))
TEXTS = "a list of texts"

KINDS: dict[str, tuple[type, ...] | str] = {
    "run.status": (str,),
    "run.utc": TEXT,
    "run.uuid": TEXT,
    "run.command": TEXT,
    "run.error": TEXT,
    "run.digests": OBJECT,
    "run.digests.*": (str,),
    "workload.name": TEXT,
    "workload.content_hash": TEXT,
    "workload.notes": TEXTS,
    "workload.parameters": OBJECT,
    "model.name": TEXT,
    "model.dtype": TEXT,
    "model.quantization": TEXT,
    "model.config_hash": TEXT,
    "backend.asked": TEXT,
    "backend.overrides": OBJECT,
    "backend.used": OBJECT,
    "backend.used.*": TEXT,
    "backend.tuned": OBJECT,
    "backend.tuned.*": TEXT,
    "backend.linears": OBJECT,
    "backend.linears.*": (dict,),
    "backend.linears.*.*": (str, int),
    "backend.passed_over": OBJECT,
    "backend.passed_over.*": TEXTS,
    "backend.portability": OBJECT,
    "backend.portability.targets": OBJECT,
    "backend.portability.targets.*": (dict,),
    "backend.portability.targets.*.*": NUMBER,
    "system.device": OBJECT,
    "system.device.name": TEXT,
    "system.device.arch": TEXT,
    "system.device.vendor": TEXT,
    "metrics.schema": (int,),
    "metrics.context": OBJECT,
    "metrics.context.peaks": (dict,),
    "metrics.context.slo_s": (dict,),
    "metrics.context.slo_s.*": (int, float),
    "metrics.context.shape": OBJECT,
    "metrics.context.mode": (str,),
    "metrics.context.end_ns": (int,),
    "metrics.context.interrupted": (bool,),
    "metrics.counts": OBJECT,
    "metrics.counts.*": NUMBER,
    "metrics.absent": OBJECT,
    "memory.absent": OBJECT,
    "schedule.absent": OBJECT,
    "roofline.absent": OBJECT,
    "energy.absent": OBJECT,
    "metrics.absent.*": TEXT,
    "memory.absent.*": TEXT,
    "schedule.absent.*": TEXT,
    "roofline.absent.*": TEXT,
    "energy.absent.*": TEXT,
    "energy.reasons": TEXTS,
    "energy.sensor_reasons": TEXTS,
    "roofline.decode_fit": OBJECT,
    "schedule.lag_s": OBJECT,
    "correctness.passed": (bool, type(None)),
    "correctness.reason": TEXT,
    "correctness.reference": TEXT,
    "correctness.tokens": NUMBER,
    "correctness.tolerance": NUMBER,
    "correctness.tolerance_mean": NUMBER,
    "correctness.tolerance_sequence_mean": NUMBER,
    "correctness.worst_sequence_mean_abs_logprob_diff": NUMBER,
    "correctness.attention": OBJECT,
    "correctness.products": OBJECT,
    "correctness.top1_agreement": NUMBER,
    "correctness.max_abs_logprob_diff": NUMBER,
    "correctness.mean_abs_logprob_diff": NUMBER,
    "accuracy.corpus": TEXT,
    "accuracy.corpus_sha256": TEXT,
    "accuracy.against": TEXT,
    "accuracy.tokens": NUMBER,
    "accuracy.sequences": OBJECT,
    "accuracy.sequences.*": (list,),
    "accuracy.sequences.*.[]": NUMBER,
    "accuracy.perplexity": OBJECT,
    "accuracy.perplexity_unquantized": OBJECT,
    "accuracy.perplexity_change": OBJECT,
    "accuracy.kl_divergence": OBJECT,
    "accuracy.top1_agreement": OBJECT,
    "validity": TEXTS,
}
"""Dotted path -> the types it may have where it is present; * stands for any key."""

_PATTERNS = [(tuple(path.split(".")), kind) for path, kind in KINDS.items() if "*" in path]

WORDS: dict[type, str] = {
    str: "a text",
    dict: "an object",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
    list: "a list",
}
NUMERIC = ("metrics", "memory", "energy", "schedule", "roofline", "accuracy", "warmup")
"""Sections whose names say their units."""
LARGEST = 1e300
EXPLANATIONS = ("reason", "unsupported")
ESTIMATES = ("value", "low", "high", "mean", "sd", "min", "max", "count", "datasheet")


def misshapen(data: dict[str, Any]) -> str | None:
    """The first thing that no run record has, in a few words; None = it may be read."""
    return next(_odd(data, ()), None)


def _odd(value: Any, path: tuple[str, ...]) -> Iterator[str]:
    where = ".".join(path)
    where = where if len(where) <= 80 else where[:77] + "..."
    if len(path) > DEEPEST:
        yield "it is nested too deeply"
        return
    kind = _kind(path)
    if kind is not None and not _is(value, kind):
        yield f"{where} must be {_words(kind)}"
    if path and path[0] in NUMERIC and (wanted := _wanted(value, path)) is not None:
        yield f"{where} must be {wanted}"
    if isinstance(value, str) and printable(value) != value:
        yield f"{where} holds characters that are no text"
    if isinstance(value, list):
        for each in value:
            yield from _odd(each, (*path, "[]"))
    if isinstance(value, dict):
        for key, each in value.items():
            if printable(key) != key:
                yield f"{where or 'it'} has a name with characters that are no text"
            else:
                yield from _odd(each, (*path, key))


def _kind(path: tuple[str, ...]) -> tuple[type, ...] | str | None:
    """What `KINDS` says of this place."""
    exact = KINDS.get(".".join(path))
    if exact is not None:
        return exact
    for pattern, kind in _PATTERNS:
        if len(pattern) == len(path) and all(a in ("*", b) for a, b in zip(pattern, path, strict=True)):
            return kind
    return None


def _wanted(value: Any, path: tuple[str, ...]) -> str | None:
    """What must stand here instead, going by the name; None = `value` may."""
    if path[-1] in EXPLANATIONS and not isinstance(value, str | None):
        return "a text"
    if isinstance(value, int | float) and abs(value) > LARGEST:
        return "a number in range"
    if "absent" in path or not (path[-1] in ESTIMATES or NUMBER_NAME.search(path[-1])):
        return None
    compound = isinstance(value, dict) and path[-1] in ESTIMATES
    return "a number" if compound or isinstance(value, str | bool | list) else None


def _is(value: Any, kind: tuple[type, ...] | str) -> bool:
    if isinstance(kind, str):
        return value is None or (isinstance(value, list) and all(isinstance(each, str) for each in value))
    if isinstance(value, bool):
        return bool in kind
    return isinstance(value, kind)


def _words(kind: tuple[type, ...] | str) -> str:
    return kind if isinstance(kind, str) else " or ".join(dict.fromkeys(WORDS[each] for each in kind))
