"""What a comparison says in words: who is fastest, or that nobody can tell, and what would tell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from backbench.options import flag
from backbench.reports.arms import Arm, against, is_paired
from backbench.reports.compare import Ratio, backend_name
from backbench.reports.metrics.metric import Quantity
from backbench.reports.quantities import quantity
from backbench.reports.record.sweep import is_sweep

ENOUGH = 8
"""Runs of each arm that the command to get a verdict asks for."""
MOST_NAMED = 6
"""Ratios in the sentence."""
NOT_REPEATED = ("backend", "repeat", "out", "seed", "check")


def judged_quantity(arms: Sequence[Arm]) -> Quantity:
    """What decides who is fastest: one quantity, chosen before any value is seen.

    An open loop is offered a rate and serves it until it cannot, so there it is the time of a token; else
    output throughput, in steady state where every run has one.
    """
    records = [record for arm in arms for record in arm.records]
    if any((record.metrics.get("context") or {}).get("mode") == "open" for record in records):
        return quantity("metrics", "tpot_s", "p50")
    steady = quantity("metrics", "output_tokens_per_s", "steady_state")
    if all(len(arm.values(steady)) == len(arm.shown) for arm in arms):
        return steady
    return quantity("metrics", "output_tokens_per_s", "whole_run")


def conclusion(arms: Sequence[Arm]) -> str:
    """The fastest arm with its ratio, or that the runs do not tell; and how many runs are not valid."""
    runs = [run for arm in arms for run in arm.runs]
    doubtful = sum(run.left_out is not None for run in runs)
    what = "Not valid" if len(runs) == len(arms) else "Left out as not valid"
    return _verdict(arms) + (f" {what}: {doubtful} of {len(runs)} runs." if doubtful else "")


def left_out(arms: Sequence[Arm]) -> list[str]:
    """A line for every run that no verdict rests on, and why: "pair 3 left out: torch: disturbed: ..."."""
    in_turns = len(arms) > 1 and all(is_paired(arms[0], arm) for arm in arms[1:])
    found: list[tuple[tuple[str, int], str]] = []
    for arm in arms:
        for number, ((experiment, block), run) in enumerate(arm.turns().items(), 1):
            if run.left_out is None:
                continue
            if in_turns:
                where = f" of {experiment}" if run.experiment else ""
                line = f"pair {block + 1}{where} left out: {arm.label}: {run.left_out}"
                found.append(((where, block), line))
            elif len(arm.runs) > 1:
                found.append((("", 0), f"run {number} of {arm.label} left out: {run.left_out}"))
            else:
                found += [(("", 0), f"{arm.label} is not valid: {reason}") for reason in run.record.validity]
    return [line for _, line in sorted(found, key=itemgetter(0))]


def _verdict(arms: Sequence[Arm]) -> str:
    wanted = judged_quantity(arms)
    best, against_others = _best(arms, wanted)
    if against_others and all(ratio.verdict == "better" for _, ratio in against_others):
        parts = _some([f"{ratio.text} ({ratio.interval}) {other.label}" for other, ratio in against_others])
        n = min(ratio.n for _, ratio in against_others)
        kind = "pairs" if all(is_paired(other, best) for other, _ in against_others) else "runs"
        of = f" by {wanted.label}"
        return f"{best.label} is fastest{of}: {', '.join(parts)}, n = {n} {kind}."
    if all(len(arm.runs) == 1 for arm in arms):
        return "One run each: no verdict."
    ratios = [against(arms[0], arm, wanted) for arm in arms[1:]]
    if any(ratio.verdict == "unclear" for ratio in ratios):
        return "No verdict: " + why_unclear(arms)
    shown = ", ".join(
        _some(
            [
                f"{arm.label} {ratio.text} ({ratio.interval}) {arms[0].label}"
                for arm, ratio in zip(arms[1:], ratios, strict=True)
                if ratio.value is not None
            ]
        )
    )
    n = min((ratio.n for ratio in ratios), default=0)
    return f"No winner by {wanted.label}: {shown}, n = {n}." if shown else "Nothing to compare."


def _some(parts: list[str]) -> list[str]:
    """As many as a sentence takes."""
    return parts if len(parts) <= MOST_NAMED else [*parts[:MOST_NAMED], f"and {len(parts) - MOST_NAMED} more"]


def _best(arms: Sequence[Arm], wanted: Quantity) -> tuple[Arm, list[tuple[Arm, Ratio]]]:
    """The arm with the best median ratio to the first, and its ratios to all others."""

    def merit(arm: Arm) -> float:
        value = against(arms[0], arm, wanted).value or 0.0
        return value if wanted.higher_is_better else -value

    best = max((arm for arm in arms if arm.values(wanted)), key=merit, default=arms[0])
    return best, [(arm, against(arm, best, wanted)) for arm in arms if arm is not best]


def why_unclear(arms: Sequence[Arm]) -> str:
    """Why ratios of these arms get no verdict, as a sentence."""
    if any(arm.experiment is not None and is_sweep(arm.experiment) for arm in arms):
        return "these arms ran under several conditions; `bench compare` of the sweep compares under each."
    for arm in arms:
        if len(arm.counted) < 2 <= len(arm.runs):
            return f"of the {len(arm.runs)} runs of {arm.label}, {len(arm.counted)} are valid."
    if any(len(arm.runs) == 1 for arm in arms):
        return "an arm of one run has no spread between runs."
    if any(is_paired(arms[0], arm) for arm in arms[1:]):
        return "fewer than two pairs of valid runs are left."
    return "these runs did not take turns, so the drift between their sessions is in every ratio."


def how_to_tell(arms: Sequence[Arm]) -> str | None:
    """The command that would give a verdict on these arms; None where there is one, or none can."""
    wanted = judged_quantity(arms)
    if all(against(arms[0], arm, wanted).verdict != "unclear" for arm in arms[1:]):
        return None
    records = [arm.runs[0].record for arm in arms]
    if any(record.run.get("imported") for record in records):  # another tool has to run them
        return None
    asked: list[dict[str, Any]] = [record.run.get("asked") or {} for record in records]
    names = dict.fromkeys(name for each in asked for name in each if name not in NOT_REPEATED)
    differing = [name for name in names if any(each.get(name) != asked[0].get(name) for each in asked)]
    alike = {name: asked[0][name] for name in names if name not in differing}
    backends = [
        str(each.get("backend") or backend_name(record)) for each, record in zip(asked, records, strict=True)
    ]
    if not alike.get("workload"):
        alike = {"workload": records[0].workload.get("name"), "model": records[0].model.get("name")} | alike
    if not differing:
        which = backends if len(set(backends)) > 1 else backends[:1]
        typed = _typed(alike | {"backend": ",".join(dict.fromkeys(which)), "repeat": ENOUGH})
        devices = [record.system.get("device") for record in records]
        apart = any(device != devices[0] for device in devices)
        return f"bench run {typed}" + (" (on each machine)" if apart else "")
    if len(arms) != 2 or any(name in ("workload", "model") for name in differing):
        return None
    sides = [
        shlex.quote(
            _typed(alike | {"backend": backend} | {name: each[name] for name in differing if name in each})
        )
        for backend, each in zip(backends, asked, strict=True)
    ]
    return f"bench gate --baseline {sides[0]} --candidate {sides[1]}"


def _typed(options: dict[str, Any]) -> str:
    """Options as they are typed."""
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        elif isinstance(value, dict):
            words += [flag(name), ",".join(f"{key}={each}" for key, each in value.items())]
        elif isinstance(value, list | tuple):
            words += [flag(name), *map(str, value)]
        else:
            words += [flag(name), str(value)]
    return shlex.join(words)
