"""Sections of the run record that say what was asked for and what served it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from backbench.harness import provenance
from backbench.harness.faults import explained
from backbench.harness.options import RunOptions
from backbench.harness.replay import Replay

if TYPE_CHECKING:
    from backbench.backends.interface import Selection
    from backbench.engine.engine import Engine
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
    """Role -> its scheme, what serves it, and over all layers the bytes held and read a step.

    A dense head that is the embedding's own tensor counts as held here.
    """
    from backbench.backends.quantization import name_of

    selection, products = engine.selection, {each.role: each for each in engine.decoder.spec.products}
    found: dict[str, dict[str, Any]] = {}
    for role, held in engine.weights.products():
        spec = products[role].weight_spec(engine.decoder.dtype, held.scheme)
        row = found.setdefault(role, {"scheme": [], "served_by": [], "held_bytes": 0, "read_bytes": 0})
        said = name_of(held.scheme), selection.linear.served_by(spec, selection.device)
        for key, text in zip(("scheme", "served_by"), said, strict=True):
            row[key] += [] if text in row[key] else [text]
        row["held_bytes"] += sum(each.nbytes for each in held.tensors())
        row["read_bytes"] += sum(each.nbytes for each in held.tensors(read=True))
    return {
        role: row | {key: "; ".join(row[key]) for key in ("scheme", "served_by")}
        for role, row in found.items()
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
