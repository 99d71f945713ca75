"""The report's first lines: one sentence that answers, a few numbers, and chips that say what to trust."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backbench.reports.compare import incomparable, ratio
from backbench.reports.metrics.metric import Quantity
from backbench.reports.quantities import (
    Reading,
    digits,
    format_interval,
    format_value,
    quantity,
    read,
)
from backbench.reports.record import RunRecord

TTFT = quantity("metrics", "ttft_s", "p50")
TPOT = quantity("metrics", "tpot_s", "p50")
JOULES = quantity("energy", "joules_per_output_token")


@dataclass(frozen=True)
class Words:
    """A stretch of a sentence."""

    text: str
    strong: bool = False
    quiet: bool = False
    """An interval or a label: smaller and greyer."""


@dataclass(frozen=True)
class Tile:
    """One number that stands alone."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Chip:
    """A short verdict. `kind` is "good", "bad", "warn" or "plain"; its mark and words say so too."""

    kind: str
    text: str


def output_throughput(records: Sequence[RunRecord]) -> tuple[Quantity, str]:
    """Steady state where every record has it, else the whole run; and the words that say which."""
    steady = quantity("metrics", "output_tokens_per_s", "steady_state")
    if all(read(record, steady).value is not None for record in records):
        return steady, "in steady state"
    return quantity("metrics", "output_tokens_per_s", "whole_run"), "over the whole run"


def one_run_sentence(record: RunRecord, name: str) -> list[Words]:
    """ "torch serves 352 output tok/s in steady state. ..." with the median latencies and intervals."""
    wanted, window = output_throughput([record])
    rate = read(record, wanted)
    ttft, tpot = read(record, TTFT), read(record, TPOT)
    if rate.value is None:
        words = [Words(name, strong=True), Words(" finished without a measured output rate.")]
    else:
        words = [
            Words(name, strong=True),
            Words(" serves "),
            Words(f"{digits(rate.value)} output tok/s", strong=True),
            Words(f" {window}."),
        ]
    if ttft.value is not None:
        words += [Words(" The first token comes after "), *_measured(ttft, TTFT), Words(" at the median")]
        words += (
            [Words(", each further one after "), *_measured(tpot, TPOT)] if tpot.value is not None else []
        )
        words.append(Words("."))
    return words


def pair_sentence(reference: RunRecord, candidate: RunRecord, names: tuple[str, str]) -> list[Words]:
    """ "triton serves 1.12× the output tok/s of torch in steady state; ..." """
    wanted, window = output_throughput([reference, candidate])
    rate = ratio(read(reference, wanted), read(candidate, wanted), True)
    if rate.value is None:
        return [Words(f"{names[1]} and {names[0]} have no output rate to compare.")]
    words = [
        Words(names[1], strong=True),
        Words(" serves "),
        Words(rate.text, strong=True),
        Words(f" the output tok/s of {names[0]} {window}"),
    ]
    for joint, what in (
        ("; its median TTFT is ", TTFT),
        (", its median TPOT ", TPOT),
        (", its energy per output token ", JOULES),
    ):
        found = ratio(read(reference, what), read(candidate, what), False)
        if found.value is None:
            continue
        # An interval that holds 1 says nothing either way, so it is not emphasised.
        words += [Words(joint), Words(found.text, strong=found.verdict != "same")]
        if found.interval:
            words.append(Words(f" ({found.interval})", quiet=True))
    return [*words, Words(".")]


def sentences(records: Sequence[RunRecord], names: Sequence[str]) -> list[list[Words]]:
    """One sentence for one run; else one for every run after the first, if they compare at all."""
    if len(records) == 1:
        return [one_run_sentence(records[0], names[0])]
    if incomparable(records):
        return [
            [Words(f"These {len(records)} runs do not compare", strong=True), Words("; no ratio is shown.")]
        ]
    pairs = zip(records[1:], names[1:], strict=True)
    return [pair_sentence(records[0], record, (names[0], name)) for record, name in pairs]


def tiles(record: RunRecord) -> list[Tile]:
    """The numbers under one run's sentence; those without a value are left out."""
    rate, window = output_throughput([record])
    wanted = (
        (rate, "Output throughput", window),
        (TTFT, "TTFT, median", "from the intended time"),
        (TPOT, "TPOT, median", "per output token"),
        (quantity("metrics", "interactivity_tokens_per_s", "p50"), "Speed a user sees", "median"),
        (quantity("memory", "total_bytes"), "Memory", "total"),
        (JOULES, "Energy", "per output token"),
    )
    found = []
    for what, label, detail in wanted:
        reading = read(record, what)
        if reading.value is not None:
            interval = format_interval(reading, what.unit)
            found.append(Tile(label, format_value(reading.value, what.unit), interval or detail))
    return found


def chips(record: RunRecord, problems: Sequence[str] = ()) -> list[Chip]:
    """Validity, correctness, status and sample size of one run; `problems` are of its files."""
    found = [Chip("bad", f"Not as it was written: {each}") for each in problems]
    if reasons := len(record.validity):
        found.append(Chip("bad", f"Doubtful: {reasons} reason{'s' if reasons > 1 else ''}"))
    else:
        found.append(Chip("good", "Valid"))
    found.append(correctness_chip(record))
    if record.run["status"] != "complete":
        found.append(Chip("warn", record.run["status"].capitalize()))
    counts = record.metrics.get("counts") or {}
    if counts.get("intended") is not None:
        found.append(Chip("plain", f"n = {counts['intended']:,} requests"))
    if counts.get("failed"):
        found.append(Chip("bad", f"{counts['failed']:,} failed"))
    return found


def correctness_chip(record: RunRecord) -> Chip:
    passed = record.correctness.get("passed")
    reference = record.correctness.get("reference") or "the reference"
    if passed and record.correctness.get("against_itself"):
        return Chip("good", f"Ran on {reference}, the reference")
    if passed is None:
        return Chip("warn", "Correctness not checked")
    return Chip("good", f"Correct against {reference}") if passed else Chip("bad", "Wrong results")


def _measured(reading: Reading, what: Quantity) -> list[Words]:
    interval = format_interval(reading, what.unit)
    words = [Words(format_value(reading.value, what.unit), strong=True)]
    return [*words, Words(f" ({interval})", quiet=True)] if interval else words
