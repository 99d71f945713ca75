"""Several workloads as one: `mix:sharegpt=0.7,azure-code=0.3`.

Each part keeps its lengths, prompts and order; whose turn it is, is drawn by weight. All arrive by one
process, so recorded times play no part. `part_of` in the record says which part a request is of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from backbench.errors import WorkloadError, shown
from backbench.options import options_of
from backbench.workloads.draft import OFFER_OPTIONS, TIME_OPTIONS, Draft
from backbench.workloads.options import WorkloadOptions, choose_offer
from backbench.workloads.readers.sharegpt import DEFAULT_REQUESTS
from backbench.workloads.streams import stream
from backbench.workloads.trace import Follow, TraceRow

FORM = "mix:NAME=WEIGHT,..."
OPTIONS = frozenset(each.field for each in options_of(WorkloadOptions) if each.group) - TIME_OPTIONS
"""What a mix takes, where one of its parts takes it."""
EVERYWHERE = frozenset({"temperature", "clip", "yes"})
"""Options that every workload takes."""
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""In `part_of`, a character a request; so many parts there may be."""

Drafts = Callable[[str, WorkloadOptions], Draft]
Accepts = Callable[[str], frozenset[str]]


def parse_mix(name: str) -> dict[str, float]:
    """Part -> weight, weights summing to 1. Raises WorkloadError where the text is none of FORM."""
    weights: dict[str, float] = {}
    for text in name.partition(":")[2].split(","):
        part, _, number = text.strip().rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not part or not 0 < weight < math.inf:
            raise WorkloadError(f"{shown(text)} in a mix is no NAME=WEIGHT above 0; write {FORM}.")
        if part.partition(":")[0] == "mix":
            raise WorkloadError(f"a mix holds no mix; name the parts of {shown(part)} themselves.")
        if part in weights:
            raise WorkloadError(f"a mix names {shown(part)} twice; add up its weights.")
        weights[part] = weight
    if not 2 <= len(weights) <= len(DIGITS):
        raise WorkloadError(f"a mix has 2 to {len(DIGITS)} parts, not {len(weights)}; write {FORM}.")
    total = sum(weights.values())
    return {part: weight / total for part, weight in weights.items()}


def draft_mix(name: str, options: WorkloadOptions, accepts: Accepts, draft: Drafts) -> Draft:
    """The mix, of parts that `draft` makes. `accepts` names the options that a part takes."""
    weights = parse_mix(name)
    taken = {part: accepts(part) for part in weights}
    options.require_accepted(name, (OFFER_OPTIONS | frozenset[str]().union(*taken.values())) & OPTIONS)
    count = options.num_requests or DEFAULT_REQUESTS
    bounds = np.cumsum(list(weights.values()))[:-1]
    turns = np.searchsorted(bounds, stream(options.seed, "mix").random(count), side="right").tolist()
    drafts = [
        draft(part, _part_options(options, taken[part], turns.count(place))) if place in turns else None
        for place, part in enumerate(weights)
    ]
    for place, (part, made) in enumerate(zip(weights, drafts, strict=True)):
        if made is not None and len(made.rows) < turns.count(place):
            raise WorkloadError(
                f"{shown(part)} has {len(made.rows)} requests, and its share is {turns.count(place)}; lower "
                "--num-requests or its weight."
            )
    queues = [_rows(place, made) if made is not None else iter(()) for place, made in enumerate(drafts)]
    return Draft(
        name,
        [next(queues[place]) for place in turns],
        choose_offer(options, has_times=False),
        {
            "kind": "mix",
            "parts": [
                _part(part, weights[part], turns.count(place), made)
                for place, (part, made) in enumerate(zip(weights, drafts, strict=True))
            ],
            "part_of": "".join(DIGITS[place] for place in turns),
        },
        notes=tuple(
            f"{part}: {note}"
            for part, made in zip(weights, drafts, strict=True)
            if made
            for note in made.notes
        ),
        clip=any(made is not None and made.clip for made in drafts),
    )


def _part_options(options: WorkloadOptions, taken: frozenset[str], count: int) -> WorkloadOptions:
    """What holds for one part: of the options that only some parts take, those that it does."""
    dropped: dict[str, Any] = {
        each.field: each.default
        for each in options_of(WorkloadOptions)
        if each.group and (each.field in OFFER_OPTIONS or each.field not in taken | EVERYWHERE)
    }
    return replace(options, **dropped | {"num_requests": count if "num_requests" in taken else None})


def _rows(place: int, draft: Draft) -> Iterator[TraceRow]:
    """The part's rows: what they share within the part is shared with no other."""
    apart = place << 64  # ids of blocks and streams are below 2**64
    for row in draft.rows:
        yield replace(
            row,
            block_ids=tuple(each + apart for each in row.block_ids),
            segments=tuple(replace(each, index=each.index + apart) for each in row.segments),
            session=None if row.session is None else f"{place}/{row.session}",
            key=None if row.key is None else f"{place}/{row.key}",
            follow=None if row.follow is None else _renamed(row.follow, place),
            temperature=draft.temperature if row.temperature is None else row.temperature,
        )


def _renamed(follow: Follow, place: int) -> Follow:
    return replace(follow, row=f"{place}/{follow.row}", context=f"{place}/{follow.context}")


def _part(part: str, weight: float, requests: int, draft: Draft | None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": part, "weight": weight, "requests": requests}
    if draft is not None:
        found |= {"source": draft.source, "transformations": draft.transformations}
    return found
