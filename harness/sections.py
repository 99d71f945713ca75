"""Sections of the run record that say what was asked for and what served it."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from backbench.harness import provenance
from backbench.harness.faults import explained
from backbench.harness.options import RunOptions
from backbench.harness.replay import Replay
from backbench.reports.metrics.speculation import OUTCOMES

if TYPE_CHECKING:
    from backbench.backends.interface import Crossover, Selection
    from backbench.engine.engine import Engine
    from backbench.engine.request import StepStats
    from backbench.workloads.request import Workload

Tuning = Mapping[str, str | None]
"""Shape -> why it runs on a written default; None = on a measured launch."""


def run_section(options: RunOptions) -> dict[str, Any]:
    """Who the run is, before it is replayed. Its label and tags are names, and nothing that was asked."""
    asked = {name: value for name, value in options.asked().items() if name not in ("label", "tag")}
    return {
        "uuid": str(uuid.uuid4()),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": options.command,
        "asked": {
            name: provenance.redact(value) if isinstance(value, str) else value
            for name, value in asked.items()
        },
        "label": provenance.redacted(options.label),
        "tags": provenance.redacted(options.tags),
        "seed": options.seed,
    }


def ending(done: Replay) -> dict[str, Any]:
    """How the replay ended: `status`, and the redacted `error` of a failed one."""
    section = {
        "start_unix_ns": done.start_unix_ns,
        "status": "interrupted" if done.interrupted else "complete",
    }
    if done.failure is not None:
        error = explained(done.failure)
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        section |= {"status": "failed", "error": provenance.redact(text)}
    return section


def speculation_section(
    engine: Mapping[str, Any], steps: Sequence[StepStats], start_ns: int, failure: str | None = None
) -> dict[str, Any]:
    """What was drafted and accepted after the run's start, and the time it took; empty where none was asked.

    engine: its settings. Times are those of steps without prompt tokens, each from the later of its start and
    its predecessor's end, as `reports.metrics.steps` has them.
    """
    if not engine.get("speculate"):
        return {}
    asked = str(engine["speculate"])
    section: dict[str, Any] = {"asked": asked, "sampling": engine.get("speculation_sampling")}
    if asked.startswith("synthetic:"):
        section["synthetic"] = asked
    if failure is not None:
        return section | {"reason": failure}
    outcomes: Counter[tuple[int, int]] = Counter()
    sums = {
        "draft_s": 0.0,
        "drafted_steps": 0,
        "drafted_steps_s": 0.0,
        "plain_steps": 0,
        "plain_steps_s": 0.0,
    }
    before_ns = start_ns
    for step in steps:
        began_ns, before_ns = max(step.start_ns, before_ns), max(step.end_ns, before_ns)
        if step.end_ns <= start_ns:
            continue
        outcomes.update(zip(step.draft_lengths, step.accepted_lengths, strict=True))
        if step.num_prefill_tokens or not step.num_decodes:
            continue
        kind = "drafted" if step.draft_lengths else "plain"
        sums[f"{kind}_steps"] += 1
        sums[f"{kind}_steps_s"] += (step.end_ns - began_ns) / 1e9
        if step.draft_lengths:
            sums["draft_s"] += step.draft_ns / 1e9
    rows = [(drafted, accepted, count) for (drafted, accepted), count in sorted(outcomes.items())]
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    lists = {name: list(column) for name, column in zip(OUTCOMES, columns, strict=True)}
    return section | {"outcomes": lists} | sums


def workload_section(workload: Workload, ideal_prefix_hit_ratio: float | None) -> dict[str, Any]:
    """What was offered."""
    return {
        "name": workload.name,
        "parameters": workload.parameters,
        "content_hash": workload.content_hash,
        "notes": list(workload.notes),
        "ideal_prefix_hit_ratio": ideal_prefix_hit_ratio,
    }


def backend_section(options: RunOptions, engine: Engine) -> dict[str, Any]:
    """What was asked for and what served each operation, with which sources and on which launches."""
    selection = engine.selection
    return {
        "asked": options.backend,
        "overrides": dict(options.overrides),
        "used": selection.used,
        "tuned": tuned(engine),
        "kernel_source_hash": {
            operation: provenance.source_hash(getattr(selection, operation)) for operation in selection.used
        },
        "linears": linears(engine),
        "passed_over": {name: list(reasons) for name, reasons in selection.passed_over.items()},
        "portability": portability(selection),
    }


def linears(engine: Engine) -> dict[str, dict[str, Any]]:
    """Role -> its scheme, what serves it, up to how many rows that is faster than the dense weight, and over
    all layers the bytes held and read a step.

    A dense head that is the embedding's own tensor counts as held here.
    """
    from backbench.backends.quantization import name_of

    selection, products = engine.selection, {each.role: each for each in engine.decoder.spec.products}
    found: dict[str, dict[str, Any]] = {}
    crossovers: dict[str, list[Crossover | None]] = {}
    for role, held in engine.weights.products():
        spec = products[role].weight_spec(engine.decoder.dtype, held.scheme)
        row = found.setdefault(role, {"scheme": [], "served_by": [], "held_bytes": 0, "read_bytes": 0})
        said = name_of(held.scheme), selection.linear.served_by(spec, selection.device)
        for key, text in zip(("scheme", "served_by"), said, strict=True):
            row[key] += [] if text in row[key] else [text]
        if not held.scheme.dense:
            crossovers.setdefault(role, []).append(selection.linear.crossover(spec, selection.device))
        row["held_bytes"] += sum(each.nbytes for each in held.tensors())
        row["read_bytes"] += sum(each.nbytes for each in held.tensors(read=True))
    return {
        role: row
        | {key: "; ".join(row[key]) for key in ("scheme", "served_by")}
        | beside_dense(crossovers.get(role, ()))
        for role, row in found.items()
    }


def beside_dense(layers: Sequence[Crossover | None]) -> dict[str, Any]:
    """The lowest of a role's crossovers in the record's fields; nulls where one of them was not measured."""
    known = [each for each in layers if each is not None]
    whole = known and len(known) == len(layers)
    worst = min(known, key=lambda each: each.faster_up_to) if whole else None
    return {
        "faster_than_dense_up_to_rows": None if worst is None else worst.faster_up_to,
        "slower_than_dense_from_rows": None if worst is None else worst.slower_from,
        "served_beyond": None if worst is None else worst.beyond,
    }


def portability(selection: Selection) -> dict[str, Any] | None:
    """Where the kernels that ran would also compile; None where none of them is ours to compile."""
    from backbench.backends.aot.baseline import read_baseline, summary

    stored = [read_baseline(kernels.baseline) for kernels in selection.kernels]
    if not stored:
        return None
    rows = {key: row for each in stored for key, row in each["rows"].items()}
    return {"triton": stored[0]["triton"], "ran_on": selection.device.arch, "targets": summary(rows)}


def tuned(engine: Engine) -> dict[str, str | None]:
    """Operation -> "tuned", "untuned: ..." or None where the backend has nothing to tune."""
    selection, dtype, device = engine.selection, engine.decoder.dtype, engine.selection.device
    return {
        "attention": tuning_text(selection.attention.tuning(spec, device) for spec in engine.decoder.runners),
        "linear": tuning_text(selection.linear.tuning(spec, device) for spec in selection.weights),
        "operations": tuning_text([selection.operations.tuning(dtype, device)]),
    }


def tuning_text(parts: Iterable[Tuning | None]) -> str | None:
    """One operation's state over all of the model's shapes, in a few words."""
    shapes = {shape: why for part in parts if part is not None for shape, why in part.items()}
    missing = [why for why in shapes.values() if why is not None]
    if not missing:
        return "tuned" if shapes else None
    return f"untuned: {len(missing)} of {len(shapes)} shapes, {', '.join(dict.fromkeys(missing))}"
