"""What is printed of a sweep: under each condition who is fastest, and every point's headline quantities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from backbench.reports.arms import Arm


def print_sweep(path: Path) -> None:
    """The conclusion under each condition, every point's headline quantities, and what is not valid."""
    from backbench.harness.commands.experiments import say_left_out
    from backbench.harness.commands.output import headline, print_report_table
    from backbench.harness.commands.stored import read, say
    from backbench.reports.arms import open_arms
    from backbench.reports.conditions import arms_by_condition
    from backbench.reports.tables import scorecard_table

    arms = open_arms([path], read)
    say(headline(arms[0].runs[0].record), err=False)
    for condition, each in arms_by_condition(path, arms).items():
        say(_concluded(condition, each), err=False)
    print_report_table(replace(scorecard_table(arms, with_ratios=False), title="Every point"))
    say_left_out(arms)


def compare_sweep(path: Path, arms: Sequence[Arm], form: str | None) -> None:
    """The arms of each condition against its first; points under other conditions have no ratio."""
    from backbench.harness.commands.experiments import say_left_out
    from backbench.harness.commands.output import print_json, print_report_table
    from backbench.reports.arms import arms_incomparable
    from backbench.reports.conditions import arms_by_condition
    from backbench.reports.tables import full_table, scorecard_table, to_csv, to_markdown

    groups = arms_by_condition(path, arms)
    if form == "csv":
        click.echo(to_csv(full_table(arms)), nl=False)
    elif form == "json":
        print_json([_as_json(condition, each) for condition, each in groups.items()])
    else:
        for condition, each in groups.items():
            table = scorecard_table(each, with_ratios=not arms_incomparable(each))
            table = replace(table, title=_concluded(condition, each))
            if form == "markdown":
                click.echo(to_markdown(table))
            else:
                print_report_table(table)
        say_left_out(arms)


def sweep_json(path: Path) -> dict[str, Any]:
    """The sweep as JSON takes it: an experiment, and what each condition's arms say."""
    from backbench.harness.commands.experiments import experiment_json
    from backbench.harness.commands.stored import read
    from backbench.reports.arms import open_arms
    from backbench.reports.conditions import arms_by_condition

    found = experiment_json(path)
    found.pop("conclusion", None)  # there is one for each condition, and none across them
    groups = arms_by_condition(path, open_arms([path], read))
    return found | {"conditions": [_as_json(condition, each) for condition, each in groups.items()]}


def _concluded(condition: str, arms: Sequence[Arm]) -> str:
    """Who is fastest under this condition, or why that is not said."""
    from backbench.reports.arms import arms_incomparable
    from backbench.reports.conclusion import conclusion

    begin = f"{condition}: " if condition else ""
    if len(arms) == 1:
        return f"{begin}{arms[0].label}, nothing to compare."
    hard = arms_incomparable(arms)
    return begin + (f"not comparable: {'; '.join(map(str, hard))}" if hard else conclusion(arms))


def _as_json(condition: str, arms: Sequence[Arm]) -> dict[str, Any]:
    import json

    from backbench.reports.arms import arms_incomparable
    from backbench.reports.conclusion import conclusion
    from backbench.reports.ratios import ratio_table

    hard = arms_incomparable(arms)
    return {
        "condition": condition,
        "n": {arm.label: len(arm.runs) for arm in arms},
        "conclusion": None if hard or len(arms) < 2 else conclusion(arms),
        "incomparable": [str(each) for each in hard],
        "metrics": json.loads(ratio_table(arms).to_json(orient="records")),
    }
