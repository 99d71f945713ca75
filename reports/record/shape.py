"""Whether parsed JSON has the shape of a run record, so that nothing that reads one trips over it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from backbench.errors import printable

DEEPEST = 32
"""Levels of objects and lists; a record has about ten."""

NUMBER_NAME = re.compile(r"_(s|ns|bytes|w|j|per_s|tokens|token|ratio|percent)$")
"""The end of a name that says its unit: such a field is a number, an object of them, or null."""

TEXT, OBJECT, NUMBER = (str, type(None)), (dict, type(None)), (int, float, type(None))
TEXTS = "a list of texts"

Kind = tuple[type, ...] | str
KINDS: dict[str, Kind] = {
    "run.status": (str,),
    "run.utc": TEXT,
    "run.uuid": TEXT,
    "run.command": TEXT,
    "run.error": TEXT,
    "run.label": TEXT,
    "run.tags": OBJECT,
    "run.tags.*": (str,),
    "run.digests": OBJECT,
    "run.imported": OBJECT,
    "run.imported.tool": TEXT,
    "run.imported.notes": TEXTS,
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
    "backend.linears.*.*": (str, int, type(None)),
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
    "roofline.decode_fit.timed_by": TEXT,
    "energy.scope": TEXT,
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
    "target.client": OBJECT,
    "target.client.beyond_limit": TEXTS,
    "target.client.calibration_before": OBJECT,
    "target.client.calibration_after": OBJECT,
    "target.usage": OBJECT,
    "target.usage.*": NUMBER,
    "target.errors": OBJECT,
    "target.errors.*": NUMBER,
    "target.server_metrics": OBJECT,
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
    "accuracy.top1_unchanged": OBJECT,
    "speculation.asked": TEXT,
    "speculation.sampling": TEXT,
    "speculation.synthetic": TEXT,
    "speculation.reason": TEXT,
    "speculation.outcomes": OBJECT,
    "speculation.outcomes.*": (list,),
    "speculation.outcomes.*.[]": NUMBER,
    "speculation.unconditional_rates": OBJECT,
    "speculation.unconditional_rates.*": NUMBER,
    "speculation.conditional_rates": OBJECT,
    "speculation.conditional_rates.*": NUMBER,
    "speculation.histogram": OBJECT,
    "speculation.histogram.*": NUMBER,
    "speculation.absent": OBJECT,
    "speculation.absent.*": TEXT,
    "validity": TEXTS,
}
"""Dotted path -> the types it may have where it is present; * stands for any key."""


class Place:
    """A place in a record: what `KINDS` says of it and of the places inside it."""

    def __init__(self) -> None:
        self.kind: Kind | None = None
        self.inside: dict[str, Place] = {}

    def within(self, key: str) -> Place | None:
        """The place of this key; None where nothing is said of it or of anything inside it."""
        return self.inside.get(key) or self.inside.get("*")


def _tree() -> Place:
    root = Place()
    for path, kind in KINDS.items():
        place = root
        for key in path.split("."):
            place = place.inside.setdefault(key, Place())
        place.kind = kind
    return root


ROOT = _tree()

WORDS: dict[type, str] = {
    str: "a text",
    dict: "an object",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
    list: "a list",
}
NUMERIC = ("metrics", "memory", "energy", "schedule", "roofline", "accuracy", "speculation", "warmup")
"""Sections whose names say their units."""
LARGEST = 1e300
EXPLANATIONS = ("reason", "unsupported")
ESTIMATES = ("value", "low", "high", "mean", "sd", "min", "max", "count", "datasheet")


def misshapen(data: dict[str, Any]) -> str | None:
    """The first thing that no run record has, in a few words; None = it may be read."""
    return _odd(data, ROOT, ())


def _odd(value: Any, place: Place | None, path: tuple[str, ...]) -> str | None:
    if len(path) > DEEPEST:
        return "it is nested too deeply"
    if place is not None and place.kind is not None and not _is(value, place.kind):
        return f"{_where(path)} must be {_words(place.kind)}"
    if path and path[0] in NUMERIC and (wanted := _wanted(value, path)) is not None:
        return f"{_where(path)} must be {wanted}"
    if isinstance(value, str) and printable(value) != value:
        return f"{_where(path)} holds characters that are no text"
    if isinstance(value, list):
        inside = None if place is None else place.within("[]")
        for each in value:
            if (odd := _odd(each, inside, (*path, "[]"))) is not None:
                return odd
    if isinstance(value, dict):
        for key, each in value.items():
            if printable(key) != key:
                return f"{_where(path) or 'it'} has a name with characters that are no text"
            inside = None if place is None else place.within(key)
            if (odd := _odd(each, inside, (*path, key))) is not None:
                return odd
    return None


def _where(path: tuple[str, ...]) -> str:
    where = ".".join(path)
    return where if len(where) <= 80 else where[:77] + "..."


def _wanted(value: Any, path: tuple[str, ...]) -> str | None:
    """What must stand here instead, going by the name; None = `value` may."""
    if path[-1] in EXPLANATIONS and not isinstance(value, str | None):
        return "a text"
    if isinstance(value, int | float):
        if abs(value) > LARGEST:
            return "a number in range"
        if not isinstance(value, bool):
            return None
    if not _is_number(path[-1]) or "absent" in path:
        return None
    compound = isinstance(value, dict) and path[-1] in ESTIMATES
    return "a number" if compound or isinstance(value, str | bool | list) else None


@lru_cache(maxsize=4096)
def _is_number(name: str) -> bool:
    """Whether a field of this name is a number, an object of them, or null."""
    return name in ESTIMATES or NUMBER_NAME.search(name) is not None


def _is(value: Any, kind: Kind) -> bool:
    if isinstance(kind, str):
        return value is None or (isinstance(value, list) and all(isinstance(each, str) for each in value))
    if isinstance(value, bool):
        return bool in kind
    return isinstance(value, kind)


def _words(kind: Kind) -> str:
    return kind if isinstance(kind, str) else " or ".join(dict.fromkeys(WORDS[each] for each in kind))
