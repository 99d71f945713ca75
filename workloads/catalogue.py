"""The workloads there are, by name; a file's path is one too.

    make("sharegpt", WorkloadOptions(num_requests=64))
    make("batch:64x1024+129", WorkloadOptions(vocab_size=151_936))
    make("trace.jsonl.gz", WorkloadOptions(time_scale=0.5))
    make("mix:sharegpt=0.7,azure-code=0.3", WorkloadOptions(rate=4))

A rate replaces a trace's recorded times and keeps its requests in order. A file's format is told from its
content, plain or gzipped (workloads/readers/detect.py says how).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbench.errors import WorkloadError, shown
from backbench.workloads import mix, sources
from backbench.workloads.draft import OFFER_OPTIONS, SESSION_OPTIONS, TRACE_OPTIONS, Draft
from backbench.workloads.options import DEFAULT_CONCURRENCY, WorkloadOptions
from backbench.workloads.readers.detect import detect
from backbench.workloads.readers.format import Format
from backbench.workloads.realise import realise
from backbench.workloads.request import Workload


@dataclass(frozen=True)
class CatalogueEntry:
    """A workload's name, what it is in one line, its defaults, and the options it takes."""

    name: str
    summary: str
    defaults: dict[str, Any]
    options: frozenset[str]
    """Besides seed, vocab_size, max_len, tokenize, temperature and clip, which every workload takes."""
    make: Callable[[str, WorkloadOptions], Draft]


def names() -> list[CatalogueEntry]:
    """Every workload of the catalogue, in the order they are shown."""
    closed = {"num_requests": sources.DEFAULT_REQUESTS, "concurrency": DEFAULT_CONCURRENCY}
    timed = {"num_requests": sources.DEFAULT_REQUESTS, "time_scale": 1.0, "clip": True}
    lengths = {"input_lengths": sources.DEFAULT_INPUT, "output_lengths": sources.DEFAULT_OUTPUT}
    return [
        CatalogueEntry(
            "sharegpt",
            "ShareGPT chats: real lengths with synthetic tokens, or real text from --dataset FILE",
            closed,
            OFFER_OPTIONS | SESSION_OPTIONS | {"dataset", "bad_rows"},
            sources.sharegpt,
        ),
        CatalogueEntry(
            "azure-conv",
            "Azure LLM inference trace 2023, conversation: lengths and arrival times, 5.5 requests/s",
            timed,
            TRACE_OPTIONS,
            sources.packed_azure_trace,
        ),
        CatalogueEntry(
            "azure-code",
            "Azure LLM inference trace 2023, coding: long prompts, short answers, bursts and silences",
            timed,
            TRACE_OPTIONS,
            sources.packed_azure_trace,
        ),
        CatalogueEntry(
            "mooncake",
            "Mooncake conversation trace: 12k-token prompts that share prefixes, 3.4 requests/s",
            timed | {"tick": "spread"},
            TRACE_OPTIONS | {"tick"},
            sources.packed_mooncake_trace,
        ),
        CatalogueEntry(
            "synthetic",
            "drawn lengths, with optional shared prefixes and multi-turn sessions",
            closed | lengths,
            OFFER_OPTIONS | SESSION_OPTIONS | {"input_lengths", "output_lengths", "shared_prefix"},
            lambda _, options: sources.synthetic(options),
        ),
        CatalogueEntry(
            "nano256",
            "nano-vLLM's bench.py: 256 prompts of 100-1024 random tokens, all at once, temperature 0.6",
            {"all_at_once": True, "temperature": 0.6},
            frozenset({"num_requests", "all_at_once"}),
            lambda _, options: sources.nano256(options),
        ),
        CatalogueEntry(
            "batch:REQUESTSxINPUT+OUTPUT",
            "identical lengths, all at once: batch:64x1024+129",
            {"all_at_once": True},
            frozenset({"all_at_once"}),
            sources.batch,
        ),
        CatalogueEntry(
            mix.FORM,
            "several of these, or files, as one: each keeps its lengths, and all arrive by one process",
            closed,
            mix.OPTIONS,
            lambda name, options: mix.draft_mix(name, options, _accepted, _draft),
        ),
    ]


def make(name_or_file: str, options: WorkloadOptions | None = None) -> Workload:
    """The workload called so, or read from that file.

    A catalogue name wins over a file of that name. Raises WorkloadError (one line) for an unknown name,
    a missing or malformed file, options that conflict or do not apply, and requests that do not fit.
    """
    options = options or WorkloadOptions()
    return realise(_draft(name_or_file, options), options)


def _draft(name_or_file: str, options: WorkloadOptions) -> Draft:
    found = _found(name_or_file)
    options.require_accepted(
        Path(name_or_file).name if isinstance(found, Format) else name_or_file, found.options
    )
    if isinstance(found, Format):
        return found.draft(Path(name_or_file), options)
    return found.make(name_or_file, options)


def _accepted(name_or_file: str) -> frozenset[str]:
    return _found(name_or_file).options


def _found(name_or_file: str) -> CatalogueEntry | Format:
    """What the name or the file is; a catalogue name wins. WorkloadError where it is nothing."""
    found = entry_of(name_or_file) or detect(Path(name_or_file))
    if found is None:
        raise WorkloadError(_unknown(name_or_file))
    return found


def entry_of(name: str) -> CatalogueEntry | None:
    """The catalogue's entry of that name, or of that form (`batch:...`, `mix:...`)."""
    kind = name.partition(":")[0]
    for entry in names():
        if entry.name == name or (":" in entry.name and entry.name.partition(":")[0] == kind):
            return entry
    return None


def _unknown(name: str) -> str:
    known = [entry.name for entry in names()]
    if "/" in name or Path(name).suffix:
        return (
            f"no workload and no file {shown(name, 80)}; give one of {', '.join(known)}, or an existing file."
        )
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}, and files."
    return f"unknown workload {shown(name, 80)}; {hint}"
