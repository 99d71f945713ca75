"""The report's first lines: one sentence that answers, a few numbers, and chips that say what to trust."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backbench.reports.arms import Arm, arms_incomparable, measured
from backbench.reports.compare import Ratio
from backbench.reports.conclusion import conclusion, how_to_tell
from backbench.reports.metrics.metric import Quantity
from backbench.reports.metrics.validity import disturbed
from backbench.reports.page.run_data import RunData
from backbench.reports.quantities import (
    Reading,
    digits,
    format_interval,
    format_value,
    quantity,
    read,
)
from backbench.reports.ratios import ratios
from backbench.reports.record import RunRecord
from backbench.reports.record.search import Search, is_search, read_search
from backbench.reports.tables import stretch

TTFT = quantity("metrics", "ttft_s", "p50")
TPOT = quantity("metrics", "tpot_s", "p50")
JOULES = quantity("energy", "joules_per_output_token")
LONGEST_ANSWER = 400
"""Characters; of many arms the ranking says the rest."""


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


def one_arm_sentence(arm: Arm) -> list[Words]:
    """ "torch serves 352 output tok/s in steady state. ..." with the median latencies and intervals."""
    wanted, window = output_throughput(arm.records)
    name, rate = arm.label, measured(arm, wanted)
    ttft, tpot = measured(arm, TTFT), measured(arm, TPOT)
    bounds = stretch(arm.representative.record, wanted.path[-1]) if len(arm.runs) == 1 else ""
    if rate.value is None:
        words = [Words(name, strong=True), Words(" finished without a measured output rate.")]
    else:
        words = [
            Words(name, strong=True),
            Words(" serves "),
            Words(f"{digits(rate.value)} output tok/s", strong=True),
            Words(f" {window}"),
            *([Words(f" ({bounds})", quiet=True)] if bounds else []),
            Words("."),
        ]
    if ttft.value is not None:
        words += [Words(" The first token comes after "), *_measured(ttft, TTFT), Words(" at the median")]
        words += (
            [Words(", each further one after "), *_measured(tpot, TPOT)] if tpot.value is not None else []
        )
        words.append(Words("."))
    return words


def pair_sentence(reference: Arm, candidate: Arm) -> list[Words]:
    """ "triton serves 1.12× (1.08–1.16) the output tok/s of torch in steady state; ..." """
    names = (reference.label, candidate.label)
    wanted, window = output_throughput([*reference.records, *candidate.records])
    judged = ratios(reference, candidate, [wanted, TTFT, TPOT, JOULES])
    rate = judged[wanted]
    if rate.value is None:
        return [Words(f"{names[1]} and {names[0]} have no output rate to compare.")]
    words = [
        Words(names[1], strong=True),
        Words(" serves "),
        *_ratio(rate),
        Words(f" the output tok/s of {names[0]} {window}"),
    ]
    for joint, what in (
        ("; its median TTFT is ", TTFT),
        (", its median TPOT ", TPOT),
        (", its energy per output token ", JOULES),
    ):
        found = judged[what]
        if found.value is not None:
            words += [Words(joint), *_ratio(found)]
    return [*words, Words(".")]


def _ratio(found: Ratio) -> list[Words]:
    """A ratio with its interval; it is emphasised only where it is more than the spread between runs."""
    words = [Words(found.text, strong=found.verdict in ("better", "worse"))]
    return [*words, Words(f" ({found.interval})", quiet=True)] if found.interval else words


def search_of(arms: Sequence[Arm]) -> Search | None:
    """The search for the highest load that all these arms are the probes of; None where they are no such."""
    paths = {arm.experiment for arm in arms}
    path = paths.pop() if len(paths) == 1 else None
    return read_search(path) if path is not None and is_search(path) else None


def sentences(arms: Sequence[Arm], most: int = 6) -> list[list[Words]]:
    """What a search found; one sentence for one arm; else who is fastest, and one for every arm after the
    first, if they compare at all and are at most `most`."""
    if (search := search_of(arms)) is not None:
        return [[Words(search.conclusion())]]
    if len(arms) == 1:
        return [one_arm_sentence(arms[0])]
    if arms_incomparable(arms):
        return [[Words(f"These {len(arms)} runs do not compare", strong=True), Words("; no ratio is shown.")]]
    said = conclusion(arms)
    first = [Words(said if len(said) <= LONGEST_ANSWER else f"{said[:LONGEST_ANSWER]}…")]
    pairs = [pair_sentence(arms[0], arm) for arm in arms[1:]] if len(arms) <= most else []
    return [first, *pairs]


def advice(arms: Sequence[Arm]) -> str | None:
    """The command that would tell, where these runs do not, and one is short enough to be typed."""
    command = None if len(arms) == 1 or arms_incomparable(arms) else how_to_tell(arms)
    return command if command is not None and len(command) <= LONGEST_ANSWER else None


def fine_print(arms: Sequence[Arm]) -> str:
    """What the intervals on the page are."""
    if all(len(arm.runs) == 1 for arm in arms):
        if len(arms) == 1:
            return (
                "In brackets: 95 % intervals over the requests within this run; another run may lie outside."
            )
        return "Intervals are within one run each. Ratios of single runs have none, and no verdict."
    return (
        "In brackets: 95 % intervals between runs, in which the sample is the run. Better and worse are said "
        "only where equal arms would differ so much once in a hundred times. Figures draw each arm's run of "
        "median output tok/s."
    )


def tiles(arm: Arm) -> list[Tile]:
    """The numbers under one arm's sentence; those without a value are left out."""
    rate, window = output_throughput(arm.records)
    wanted = (
        (rate, "Output throughput", stretch(arm.representative.record, rate.path[-1]) or window),
        (TTFT, "TTFT, median", "from the intended time"),
        (TPOT, "TPOT, median", "per output token"),
        (quantity("metrics", "interactivity_tokens_per_s", "p50"), "Speed a user sees", "median"),
        (quantity("memory", "total_bytes"), "Memory", "total"),
        (JOULES, "Energy", "per output token"),
    )
    found = []
    for what, label, detail in wanted:
        reading = measured(arm, what)
        if reading.value is not None:
            interval = format_interval(reading, what.unit)
            found.append(Tile(label, format_value(reading.value, what.unit), interval or detail))
    return found


def arm_chips(arm: Arm, problems: Sequence[str] = ()) -> list[Chip]:
    """Those of the run that stands for the arm, and how many runs there are and are not valid."""
    shown = arm.representative.record
    found = chips(shown, problems)
    if len(arm.runs) == 1:
        return found
    at = len(problems)  # the chip of one run's validity
    if doubtful := sum(bool(record.validity) for record in arm.records):
        found[at] = Chip("bad", f"Doubtful: {doubtful} of {len(arm.runs)} runs")
    else:
        found[at] = Chip("good", "All runs valid")
    failed = next((each for each in arm.records if each.correctness.get("passed") is False), None)
    if failed is not None:
        found[found.index(correctness_chip(shown))] = correctness_chip(failed)
    return [*found, Chip("plain", f"n = {len(arm.runs)} runs")]


def chips(record: RunRecord, problems: Sequence[str] = ()) -> list[Chip]:
    """Validity, correctness, status and sample size of one run; `problems` are of its files."""
    found = [Chip("bad", f"Not as it was written: {each}") for each in problems]
    if reasons := len(record.validity):
        found.append(Chip("bad", f"Doubtful: {reasons} reason{'s' if reasons > 1 else ''}"))
    else:
        found.append(Chip("good", "Valid"))
    if why := disturbed(record):
        found.append(Chip("bad", f"Disturbed: {why[0]}"))
    found.append(correctness_chip(record))
    if record.run["status"] != "complete":
        found.append(Chip("warn", record.run["status"].capitalize()))
    counts = record.metrics.get("counts") or {}
    if counts.get("intended") is not None:
        found.append(Chip("plain", f"n = {counts['intended']:,} requests"))
    if counts.get("failed"):
        found.append(Chip("bad", f"{counts['failed']:,} failed"))
    return found


def all_chips(runs: Sequence[RunData]) -> list[Chip]:
    """What to trust of many arms, counted."""
    records = [record for run in runs for record in run.sample.records]
    counts = (
        ("bad", "not as they were written", sum(bool(run.problems) for run in runs)),
        ("bad", "doubtful", sum(bool(record.validity) for record in records)),
        ("bad", "with wrong results", sum(record.correctness.get("passed") is False for record in records)),
        ("warn", "not checked", sum(record.correctness.get("passed") is None for record in records)),
        ("warn", "not complete", sum(record.run["status"] != "complete" for record in records)),
    )
    found = [
        Chip(kind, f"{count:,} of {len(records):,} runs {words}") for kind, words, count in counts if count
    ]
    return found or [Chip("good", f"All {len(records):,} runs valid and correct")]


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
