"""A workload's profile (harness/workload_profile.py) drawn on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from backbench.harness.commands.output import echo, print_table
from backbench.reports.quantities import DASH, digits

BARS = " ▁▂▃▄▅▆▇█"
WIDEST = 36
"""Characters of the longest bar."""


def print_profile(found: dict[str, Any]) -> None:
    """Lengths, arrivals over time, bursts, prefix hits, sessions and what was cut off."""
    echo(f"{found['name']}: {found['requests']:,} requests, {_offered(found)}")
    print_table(
        "", ("Tokens", "Mean", "p50", "p90", "p99", "Most", "All"), _lengths(found), right=range(1, 7)
    )
    for name, title in (("prompt_tokens", "Prompt tokens"), ("output_tokens", "Output tokens")):
        print_table("", (title, "Requests", ""), histogram_rows(found[name]["histogram"]), right=(0, 1))
    _print_arrivals(found)
    prefix = found["prefix"]
    echo(
        f"Prefixes: an unlimited cache with blocks of {prefix['block_tokens']} tokens would hold "
        f"{prefix['ideal_hit_ratio']:.1%} of the prompt tokens."
    )
    if sessions := found["sessions"]:
        turns = sessions["turns"]
        echo(
            f"Sessions: {sessions['sessions']:,}, of {digits(turns['mean'])} turns on average, at most "
            f"{turns['maximum']:,}."
        )
    if clipped := found["clipped"]:
        echo(
            f"Clipped: {clipped['requests']:,} requests to the context of {clipped['max_len']:,} tokens; "
            f"{clipped['input_tokens']:,} prompt and {clipped['output_tokens']:,} output tokens were cut off."
        )
    for note in found["notes"]:
        echo(f"Note: {note}")


def histogram_rows(histogram: Sequence[tuple[int, int, int]]) -> list[tuple[str, str, str]]:
    """Range, count and bar of every bin."""
    most = max(count for _, _, count in histogram)
    return [
        (f"{low:,}" if low == high else f"{low:,}–{high:,}", f"{count:,}", "█" * -(-WIDEST * count // most))
        for low, high, count in histogram
    ]


def sparkline(counts: Sequence[int]) -> str:
    """A character a bin; the highest is full, and only an empty one is blank."""
    most = max(counts, default=0) or 1
    return "".join(BARS[-(-(len(BARS) - 1) * count // most)] for count in counts)


def _lengths(found: dict[str, Any]) -> list[tuple[str, ...]]:
    kinds = [("Prompts", found["prompt_tokens"]), ("Outputs", found["output_tokens"])]
    for part in found["parts"] or ():
        share = f"{part['name']} ({part['requests']:,})"
        kinds += [(f"{share} prompts", part["prompt_tokens"]), (f"{share} outputs", part["output_tokens"])]
    rows = []
    for name, summary in kinds:
        if summary is None:
            rows.append((name, *[DASH] * 6))
            continue
        numbers = (summary[key] for key in ("mean", "p50", "p90", "p99", "maximum"))
        total = f"{summary['total']:,}" if "total" in summary else DASH
        rows.append((name, *(f"{number:,.0f}" for number in numbers), total))
    return rows


def _offered(found: dict[str, Any]) -> str:
    offered = found["parameters"]["offered"]
    if offered["mode"] == "closed_loop":
        return f"a closed loop of {offered['concurrency']}"
    if offered["mode"] == "all_at_once":
        return "all at once"
    how = "at recorded times" if offered["mode"] == "trace" else f"by {offered['arrival']}"
    return f"{how}, the last due after {timedelta(seconds=round(found['schedule_s'] or 0))}"


def _print_arrivals(found: dict[str, Any]) -> None:
    arrivals = found["arrivals"]
    if arrivals is None:
        echo(f"Arrivals: {found['untimed']}.")
        return

    def number(name: str) -> str:
        return DASH if arrivals[name] is None else digits(arrivals[name])

    echo(
        f"Arrivals: {number('requests_per_s')} requests/s; the gaps' CV is {number('gap_cv')}, the index of "
        f"dispersion {number('index_of_dispersion')} (Poisson: 1 and 1); longest silence "
        f"{number('longest_gap_s')} s."
    )
    echo(f"|{sparkline(arrivals['counts'])}|")
    echo(f" each {digits(arrivals['bin_s'])} s; the fullest has {max(arrivals['counts']):,} arrivals")
