"""Every kernel compiled for every GPU without one: what it takes there, and whether that got worse.

A backend's `KernelCase`s are launches as it would start them. `compile_all` compiles them in processes of
their own, and `regressions` holds the rows against the best seen so far.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backbench.backends import registry
from backbench.backends.aot.compile import SHARED_LIMIT_BYTES, TARGETS, compile_launch
from backbench.backends.interface import KernelCase, Kernels
from backbench.errors import BackendError

ARITHMETIC = (
    ("16-bit", re.compile(r"kind::f16")),  # Blackwell's instruction takes fp16 and bf16 alike
    ("fp8", re.compile(r"kind::f8f6f4")),
    ("fp8", re.compile(r"e4m3|e5m2|fp8|bf8")),
    ("bf16", re.compile(r"bf16")),
    ("tf32", re.compile(r"tf32|xf32")),
    ("int8", re.compile(r"[su]8|i8|iu8")),
    ("fp16", re.compile(r"f16")),
    ("fp32", re.compile(r"f32")),
)
"""What a matrix instruction's name says about its inputs, the first match counts."""


@dataclass(frozen=True)
class PortabilityRow:
    """One kernel on one target."""

    kernel: str
    variant: str
    target: str
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    matrix_instructions: int | None = None
    arithmetic: str = ""
    """What the matrix instructions multiply: "bf16", "fp8", ...; "" without any."""
    refused: str = ""
    """Why the backend does not launch it there; it was not compiled."""
    problem: str = ""
    """Why it cannot run there as it is: does not compile, does not fit, falls to plain multiply-adds."""

    @property
    def key(self) -> str:
        """Names the row in the baseline file."""
        return f"{self.kernel} {self.variant} {self.target}"


def kernels_of(backends: Sequence[str] = ()) -> dict[str, Kernels]:
    """Name -> kernels of the backends named, or of all that launch some; each set once.

    Raises:
        BackendError: a backend cannot be imported, or one named launches no kernels.
    """
    found: dict[str, Kernels] = {}
    for name in backends or registry.names():
        kernels = registry.load(name).kernels
        if kernels is None and backends:
            raise BackendError(f"Backend {name!r} launches no Triton kernels; leave it out.")
        if kernels is not None and kernels not in found.values():  # rocm launches triton's
            found[name] = kernels
    return found


def all_cases(backend: str) -> list[KernelCase]:
    """Every case of the backend; its kernels are imported, so not under Triton's interpreter.

    Raises:
        BackendError: the backend launches no Triton kernels, or two cases for one target share a name.
    """
    found = kernels_of([backend])[backend].cases()
    names = Counter(
        f"{case.kernel} {case.variant} {target}" for case in found for target in case.targets or TARGETS
    )
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise BackendError(f"Two kernel cases are named {', '.join(twice)}; rename one.")
    return found


def compile_row(case: KernelCase, target: str) -> PortabilityRow:
    """Compile one case; a failure becomes the row's problem."""
    row = PortabilityRow(case.kernel, case.variant, target)
    if reasons := case.refuses(target):
        return replace(row, refused="; ".join(reasons))
    try:
        found = compile_launch(case.launch(target), target)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return replace(row, problem=f"does not compile: {type(error).__name__}: {first[:160]}")
    row = replace(
        row,
        registers=found.registers,
        spill_bytes=found.spill_bytes,
        shared_bytes=found.shared_bytes,
        matrix_instructions=found.matrix_instructions,
        arithmetic="+".join(dict.fromkeys(arithmetic(kind) for kind in found.kinds)),
    )
    if not found.fits:
        limit = SHARED_LIMIT_BYTES[target]
        return replace(
            row, problem=f"takes {found.shared_bytes} bytes of shared memory, {target} has {limit}"
        )
    if found.overwritten:
        count = len(found.overwritten)
        return replace(row, problem=f"{found.overwritten[0]} of a product in flight ({count} such)")
    if case.matrix and not found.matrix_instructions:
        return replace(row, problem="uses no matrix instruction: falls to plain multiply-adds")
    return row


def arithmetic(instruction: str) -> str:
    """What a matrix instruction multiplies, from its name."""
    # The accumulator comes first in AMD's names (v_mfma_f32_...) and in NVIDIA's types (...f32.bf16.bf16).
    inputs = re.sub(r"^v_\w*?mfma_f32|^v_wmma_f32|f32(?=\.)", "", instruction, count=1)
    return next((name for name, pattern in ARITHMETIC if pattern.search(inputs)), "other")


def compile_all(
    backend: str,
    targets: Sequence[str] = TARGETS,
    *,
    matching: str = "",
    processes: int = 2,
    progress: Callable[[PortabilityRow], None] = lambda row: None,
) -> list[PortabilityRow]:
    """Every case of `backend` whose "KERNEL VARIANT" contains `matching`, on each of its targets.

    Args:
        processes: compilers at a time.

    Raises:
        BackendError: an unknown backend or target, or no such case.
    """
    for target in targets:
        if target not in TARGETS:
            raise BackendError(f"Unknown compile target {target!r}; use some of {', '.join(TARGETS)}.")
    rows = []
    before = os.environ.get("TRITON_INTERPRET")
    # Kernels decorated for the interpreter cannot be compiled; the workers inherit this.
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        context = multiprocessing.get_context("spawn")
        with context.Pool(processes) as pool:
            jobs = [
                (backend, target, part, processes, matching)
                for target in targets
                for part in range(processes)
            ]
            for found in pool.imap(_compile_part, jobs):
                for row in found:
                    progress(row)
                    rows.append(row)
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    if not rows:
        raise BackendError(f"No kernel of {backend} is named like {matching!r} on {', '.join(targets)}.")
    return sorted(rows, key=lambda row: (row.kernel, row.variant, TARGETS.index(row.target)))


def _compile_part(job: tuple[str, str, int, int, str]) -> list[PortabilityRow]:
    """Every n-th case for one target: dealt out so that the slow kernels are spread."""
    backend, target, part, parts, matching = job
    chosen = [
        case
        for case in all_cases(backend)
        if target in (case.targets or TARGETS) and matching in f"{case.kernel} {case.variant}"
    ]
    return [compile_row(case, target) for case in chosen[part::parts]]


def regressions(rows: Iterable[PortabilityRow], best: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One line for each row that cannot run, spills more, or takes more shared memory than the best seen.

    `best` is empty where nothing is known for this compiler; then only what cannot run is named.
    """
    for row in rows:
        seen = best.get(row.key, {})
        if row.problem and row.problem != seen.get("problem"):
            yield f"{row.key}: {row.problem}"
        for name, what in (("spill_bytes", "spills"), ("shared_bytes", "takes shared memory of")):
            now, then = getattr(row, name), seen.get(name)
            if now is not None and then is not None and now > then:
                yield f"{row.key}: {what} {now} bytes, {then} before"
        if seen.get("matrix_instructions") and row.matrix_instructions == 0:
            yield f"{row.key}: no matrix instruction, {seen['matrix_instructions']} before"


def read_baseline(file: Path) -> dict[str, Any]:
    """{"triton": version, "rows": {key: facts}}; empty where there is no file yet.

    Raises:
        BackendError: the file is not one that `bench portability` wrote.
    """
    if not file.exists():
        return {"triton": "none", "rows": {}}
    try:
        stored = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise BackendError(f"{file} is not JSON ({error}); restore it or run with --update.") from error
    if not isinstance(stored, dict) or not {"triton", "rows"} <= set(stored):
        raise BackendError(f"{file} is no baseline file; restore it or run with --update.")
    return stored


def summary(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Target -> counts over the rows of a baseline file, for a reader who wants one line a target.

    "kernels" were compiled, "refused" are not launched there, "problems" cannot run, "spilling" use slow
    memory for registers, by at most "most_spill_bytes" a thread.
    """
    found: dict[str, dict[str, int]] = {}
    for target in TARGETS:
        rows = [row for key, row in stored.items() if key.rpartition(" ")[2] == target]
        spills = [row["spill_bytes"] or 0 for row in rows]
        found[target] = {
            "kernels": sum(not row["refused"] and not row["problem"] for row in rows),
            "refused": sum(bool(row["refused"]) for row in rows),
            "problems": sum(bool(row["problem"]) for row in rows),
            "spilling": sum(size > 0 for size in spills),
            "most_spill_bytes": max(spills, default=0),
        }
    return found


def better(
    rows: Iterable[PortabilityRow], best: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """`best` with every row that can run and is new, or takes no more than it did."""
    kept = {key: dict(value) for key, value in best.items()}
    for row in rows:
        if not list(regressions([row], best)):
            facts = asdict(row)
            kept[row.key] = {
                name: facts[name] for name in facts if name not in ("kernel", "variant", "target")
            }
    return dict(sorted(kept.items()))
