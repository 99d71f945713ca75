"""What is printed of an experiment: its arms as one thing, and who is fastest first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backbench.reports.arms import Arm


def print_experiment(path: Path) -> None:
    """The conclusion, every arm's medians with their intervals between runs, and what is not valid."""
    from backbench.harness.commands.output import headline, print_report_table
    from backbench.harness.commands.stored import read, say
    from backbench.reports.arms import open_arms
    from backbench.reports.tables import quantization_table, repeats_table

    arms = open_arms([path], read)
    say(headline(arms[0].runs[0].record), err=False)
    if len(arms) > 1:
        print_conclusion(arms)
    if (quantized := quantization_table(arms)) is not None:
        print_report_table(quantized)
    print_report_table(repeats_table(arms))
    say_invalid(arms)


def print_conclusion(arms: Sequence[Arm]) -> None:
    """Who is fastest; else why nobody can tell, and the command that would."""
    from backbench.harness.commands.stored import say
    from backbench.reports.conclusion import conclusion, how_to_tell

    say(conclusion(arms), err=False)
    if (command := how_to_tell(arms)) is not None:
        say(f"A verdict takes repeats: {command}", err=False)


def say_invalid(arms: Sequence[Arm]) -> None:
    """The reasons not to believe runs, on stderr."""
    from backbench.harness.commands.stored import say

    for arm in arms:
        reasons: dict[str, int] = {}
        for record in arm.records:
            for reason in record.validity:
                reasons[reason] = reasons.get(reason, 0) + 1
        for reason, count in reasons.items():
            of = f" ({count} of {len(arm.runs)} runs)" if len(arm.runs) > 1 else ""
            say(f"{arm.label} is not valid{of}: {reason}")


def experiment_json(path: Path) -> dict[str, Any]:
    """The experiment as JSON takes it: its list of runs, and every arm's quantities."""
    from dataclasses import asdict

    from backbench.harness.commands.stored import read
    from backbench.reports.arms import compared_in, measured, open_arms
    from backbench.reports.conclusion import conclusion
    from backbench.reports.record.experiment import read_experiment

    arms = open_arms([path], read)
    quantities = {
        ".".join(each.path): {
            arm.label: asdict(measured(arm, each)) | {"values": list(arm.values(each).values())}
            for arm in arms
        }
        for each in compared_in(arms)
    }
    listed = asdict(read_experiment(path)) | {"path": str(path)}
    found = {"experiment": listed, "quantities": quantities}
    return found | ({"conclusion": conclusion(arms)} if len(arms) > 1 else {})
