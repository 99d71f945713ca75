"""`bench list`: which runs and experiments there are."""

from __future__ import annotations

from pathlib import Path

import click

WIDEST = 60
"""Characters of a cell."""


@click.command("list")
@click.argument("directory", type=click.Path(path_type=Path), default="runs")
@click.option("--json", "as_json", is_flag=True, help="Print every entry as JSON, oldest first.")
def list_runs(directory: Path, as_json: bool) -> None:
    """List the runs and experiments below DIRECTORY [runs], the newest last, an arm a line.

    What cannot be read is listed with its reason. The newest finished one is called `latest` where a command
    takes a RUN, and `latest:NAME` is the newest with this --label.
    """
    from dataclasses import asdict

    from backbench.harness.commands.output import print_json, print_table
    from backbench.harness.commands.stored import reading, say
    from backbench.reports.listing import entries
    from backbench.reports.quantities import DASH, digits, format_value

    with reading(directory):
        found = entries(directory)
    if as_json:
        print_json([asdict(each) | {"tags": dict(each.tags)} for each in found])
        return
    readable = [each for each in found if each.problem is None]
    rows = [
        (
            each.utc.replace("T", " ")[:19],
            _cell(each.label, *(f"{key}={value}" for key, value in each.tags)),
            _cell(each.workload),
            _cell(each.backend),
            _cell(each.model, each.quantization),
            str(each.runs),
            each.validity,
            DASH if each.output_tokens_per_s is None else digits(each.output_tokens_per_s),
            format_value(each.tpot_p50_s, "s"),
            str(each.path),
        )
        for each in readable
    ]
    columns = ("When (UTC)", "Label", "Workload", "Backend", "Model", "Runs", "Validity", "Output tok/s")
    if rows:
        print_table("", (*columns, "TPOT p50", "Path"), rows, right=(5, 7, 8))
    elif not found:
        say(f"There are no runs below {directory}.")
    for each in found:
        if each.problem is not None:
            say(f"not readable: {each.path}: {each.problem}")


def _cell(*texts: str | None) -> str:
    """As much of the texts as a cell takes; a stranger's record may hold any."""
    from backbench.reports.quantities import DASH

    text = " ".join(filter(None, texts))
    return (text if len(text) <= WIDEST else text[: WIDEST - 3] + "...") or DASH
