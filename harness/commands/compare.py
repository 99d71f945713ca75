"""`bench compare`: runs and experiments side by side, and whether a difference is real."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from backbench.errors import INVALID, HarnessError, printable
from backbench.harness.commands.stored import RUN

if TYPE_CHECKING:
    from backbench.reports.arms import Arm
    from backbench.reports.compare import Difference

WIDEST = 5
"""Arms that stand side by side; more of them stand below each other, with the headline quantities."""


@click.command()
@click.argument("runs", nargs=-1, required=True, type=RUN)
@click.option("--baseline", metavar="LABEL", help="The arm that ratios are to [the first].")
@click.option(
    "--fail-if",
    "limits",
    multiple=True,
    metavar='"QUANTITY>RATIO"',
    help='Exit 1 where a ratio is so, such as "tpot_p50>1.05", beyond the spread between runs.',
)
@click.option(
    "--group-by",
    metavar="KEY",
    help="Pool the runs by backend, vendor, quantization, model or tag:KEY, an arm each.",
)
@click.option("--anyway", is_flag=True, help="Go on although the runs are not comparable.")
@click.option("--csv", "form", flag_value="csv", help="Print every run's quantities as CSV.")
@click.option("--markdown", "form", flag_value="markdown", help="Print the comparison as Markdown.")
@click.option("--json", "form", flag_value="json", help="Print the differences and the ratios as JSON.")
def compare(
    runs: tuple[Path, ...],
    baseline: str | None,
    limits: tuple[str, ...],
    group_by: str | None,
    anyway: bool,
    form: str | None,
) -> None:
    """Put RUNS side by side: run directories and experiment directories (of `bench run --repeat`).

    Better or worse is said only of ratios whose interval between runs leaves 1 out, all quantities judged
    together; runs that are not valid are left out of it. Runs of another workload, model or metric schema are
    refused (exit 4) with the differences named.
    """
    from backbench.harness.commands.stored import read, reading
    from backbench.harness.commands.sweeps import compare_sweep
    from backbench.reports.arms import open_arms
    from backbench.reports.grouping import grouped, incomparable_groups, require_key
    from backbench.reports.limits import broken, parse_limit
    from backbench.reports.record.sweep import is_sweep

    parsed = [parse_limit(limit) for limit in limits]
    key = None if group_by is None else require_key(group_by)
    with reading(*runs):
        arms = open_arms(runs, read)
        if len(runs) == 1 and is_sweep(runs[0]):
            if baseline or limits or key:
                raise HarnessError(
                    f"{runs[0]} is a sweep of several comparisons; it takes no --baseline, --fail-if or "
                    "--group-by."
                )
            compare_sweep(runs[0], arms, form)
            return
        arms = arms if key is None else grouped(arms, key)
        if len(arms) < 2:
            raise HarnessError(
                "A comparison needs at least two runs, or an experiment of two arms."
                if key is None
                else f"All runs are of one {key}: {arms[0].label}; there is nothing to compare."
            )
        arms = _with_baseline(arms, baseline)
        hard = incomparable_groups(arms, key)
        if hard and (parsed or not anyway):
            what = "; ".join(map(str, hard))
            what = what if len(what) <= 200 else what[:197] + "..."
            more = "--fail-if judges none such" if anyway else "--anyway goes on"
            raise HarnessError(f"These runs do not compare: {what} ({more}).", exit_code=INVALID)
        _print(arms, hard, form)
        lines = [line for limit in parsed for line in broken(arms, limit)]
    for line in lines:
        click.echo(f"failed: {line}", err=True)
    raise SystemExit(1 if lines else 0)


def _with_baseline(arms: list[Arm], label: str | None) -> list[Arm]:
    """The arms with the one of this label first."""
    if label is None:
        return arms
    chosen = [arm for arm in arms if arm.label == label]
    if not chosen:
        names = ", ".join(repr(arm.label) for arm in arms)
        raise HarnessError(f"--baseline {label!r} is none of the arms: {names[:160]}.")
    return chosen + [arm for arm in arms if arm.label != label]


def _print(arms: Sequence[Arm], hard: Sequence[Difference], form: str | None) -> None:
    from backbench.harness.commands.experiments import print_conclusion, say_left_out
    from backbench.harness.commands.output import print_report_table
    from backbench.harness.commands.stored import say
    from backbench.reports.arms import arm_differences
    from backbench.reports.conclusion import conclusion, left_out
    from backbench.reports.tables import (
        comparison_table,
        difference_table,
        full_table,
        markdown_text,
        scorecard_table,
        to_csv,
        to_markdown,
    )

    for each in hard:
        say(f"not comparable: {each}")
    say_left_out(arms)
    if form == "json":
        _print_json(arms, hard)
    elif form == "csv":
        click.echo(to_csv(full_table(arms)), nl=False)
    elif form == "markdown":
        said = [f"Not comparable: {each}." for each in hard] or [conclusion(arms), *left_out(arms)]
        table = to_markdown(comparison_table(arms, comparable=not hard))
        click.echo(printable("\n\n".join((*map(markdown_text, said), table))), nl=False)
    else:
        if not hard:
            print_conclusion(arms)
        found = arm_differences(arms)
        if len(arms) > WIDEST:
            print_report_table(scorecard_table(arms, with_ratios=not hard))
            say(f"What differs: {', '.join(each.field for each in found) or 'nothing'}.", err=False)
            return
        print_report_table(comparison_table(arms, comparable=not hard))
        print_report_table(difference_table(found, [arm.label for arm in arms]))


def _print_json(arms: Sequence[Arm], hard: Sequence[Difference]) -> None:
    import json

    from backbench.harness.commands.output import print_json
    from backbench.reports.arms import arm_differences
    from backbench.reports.conclusion import conclusion, how_to_tell, left_out
    from backbench.reports.ratios import ratio_table

    ratios = ratio_table(arms)
    for name in [name for name in ratios.columns if hard and name.endswith(" verdict")]:
        ratios[name] = ""
    print_json(
        {
            "runs": [arm.label for arm in arms],
            "n": {arm.label: len(arm.runs) for arm in arms},
            "comparable": not hard,
            "conclusion": None if hard else conclusion(arms),
            "for_a_verdict": None if hard else how_to_tell(arms),
            "incomparable": [str(each) for each in hard],
            "left_out": left_out(arms),
            "differences": {each.field: list(each.values) for each in arm_differences(arms)},
            "metrics": json.loads(ratios.to_json(orient="records")),
        }
    )
