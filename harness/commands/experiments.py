"""What is printed of an experiment: its arms as one thing, and who is fastest first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backbench.reports.arms import Arm
    from backbench.reports.record.search import Search

MOST_LINES = 20
"""Runs that are named as not valid; of more, how many."""


def print_experiment(path: Path) -> None:
    """The conclusion, every arm's medians with their intervals between runs, and what is not valid."""
    from backbench.harness.commands.output import headline, print_clipping, print_report_table
    from backbench.harness.commands.stored import read, say
    from backbench.reports.arms import open_arms
    from backbench.reports.record.search import is_search, read_search
    from backbench.reports.tables import quantization_table, repeats_table

    if is_search(path):
        print_search(read_search(path))
        return
    arms = open_arms([path], read)
    first = arms[0].runs[0].record
    say(headline(first), err=False)
    print_clipping(first, "Clipped, of the first run")
    if len(arms) > 1:
        print_conclusion(arms)
    if (quantized := quantization_table(arms)) is not None:
        print_report_table(quantized)
    print_report_table(repeats_table(arms))
    say_left_out(arms)


def print_search(search: Search) -> None:
    """The answer, and every probe from the lowest load to the highest."""
    from backbench.harness.commands.output import headline, print_table
    from backbench.harness.commands.stored import read, say
    from backbench.reports.arms import open_arms
    from backbench.reports.quantities import format_value, quantity
    from backbench.reports.quantities import read as value

    shown = [
        quantity("metrics", *path)
        for path in (("ttft_s", "p50"), ("tpot_s", "p50"), ("output_tokens_per_s", "whole_run"))
    ]
    probes = sorted(search.probes, key=lambda each: each.load)
    records = {each.run: read(search.path / each.run)[1] for each in probes}
    say(headline(records[probes[0].run]).rpartition(":")[0], err=False)
    columns = ("Load", *(f"{each.name} {each.limit_s:g} s" for each in search.limits), "Verdict")
    rows = [
        (
            search.words(each.load),
            *(search.share(each, limit) for limit in search.limits),
            each.verdict,
            *(format_value(value(records[each.run], wanted).value, wanted.unit) for wanted in shown),
        )
        for each in probes
    ]
    columns = (*columns, *(wanted.label for wanted in shown))
    print_table("Requests within the limit, with 95 % intervals", columns, rows, right=range(1, len(columns)))
    say(search.conclusion(), err=False)
    say_left_out(open_arms([search.path], read))


def print_conclusion(arms: Sequence[Arm]) -> None:
    """Who is fastest; else why nobody can tell, and the command that would."""
    from backbench.harness.commands.stored import say
    from backbench.reports.conclusion import conclusion, how_to_tell, left_out

    say(conclusion(arms), err=False)
    if (command := how_to_tell(arms)) is not None:
        valid = "valid " if left_out(arms) else ""
        say(f"A verdict takes {valid}repeats: {command}", err=False)


def say_left_out(arms: Sequence[Arm]) -> None:
    """The runs that no verdict rests on and why, on stderr."""
    from backbench.harness.commands.stored import say
    from backbench.reports.conclusion import left_out

    lines = left_out(arms)
    for line in lines[:MOST_LINES]:
        say(line)
    if len(lines) > MOST_LINES:
        say(f"and {len(lines) - MOST_LINES} more that are not valid")


def experiment_json(path: Path) -> dict[str, Any]:
    """The experiment as JSON takes it: its list of runs, and every arm's quantities."""
    from dataclasses import asdict

    from backbench.harness.commands.stored import read
    from backbench.reports.arms import compared_in, measured, open_arms
    from backbench.reports.conclusion import conclusion, left_out
    from backbench.reports.record.experiment import read_experiment
    from backbench.reports.record.search import is_search, read_search

    if is_search(path):
        return read_search(path).as_json() | {"path": str(path)}
    arms = open_arms([path], read)
    quantities = {
        ".".join(each.path): {
            arm.label: asdict(measured(arm, each)) | {"values": list(arm.values(each).values())}
            for arm in arms
        }
        for each in compared_in(arms)
    }
    listed = asdict(read_experiment(path)) | {"path": str(path)}
    found = {"experiment": listed, "quantities": quantities, "left_out": left_out(arms)}
    return found | ({"conclusion": conclusion(arms)} if len(arms) > 1 else {})
