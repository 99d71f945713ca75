"""`bench report`: one file of one or more runs: a page, Markdown or CSV."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from backbench.harness.commands.stored import RUN

if TYPE_CHECKING:
    from backbench.harness.gate.trend import Row


@click.command()
@click.argument("runs", nargs=-1, required=True, type=RUN)
@click.option(
    "--out",
    "-o",
    required=True,
    type=click.Path(path_type=Path),
    callback=lambda context, parameter, out: _checked(out),
    metavar="FILE",
    help="FILE.html, FILE.md or FILE.csv: a new one, or a report to replace.",
)
@click.option(
    "--figures",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Also write every figure to DIR as an SVG file.",
)
@click.option(
    "--gates",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Add the history of the gates under DIR, as `bench trend` reads it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print {report, bytes} as JSON.")
def report(
    runs: tuple[Path, ...], out: Path, figures: Path | None, gates: Path | None, as_json: bool
) -> None:
    """Write one report of RUNS, run and experiment directories: a page that needs no network (.html), the
    tables as Markdown (.md), or every quantity of every run (.csv)."""
    from backbench.harness.commands.output import print_json
    from backbench.harness.commands.stored import read, reading, say
    from backbench.reports.arms import open_arms
    from backbench.reports.page.export import write_report

    rows: list[Row] = []
    if gates is not None:
        from backbench.harness.gate.trend import history

        rows, odd = history(gates)
        for each in odd:
            say(f"not a gate: {each}")
    with reading(*runs):
        open_arms(runs, read)  # says what was edited
        write_report(runs, out, rows, figures)
    if as_json:
        print_json({"report": str(out), "bytes": out.stat().st_size})
    else:
        click.echo(f"Report: {out}")
        if figures is not None:
            click.echo(f"Figures: {figures}")


def _checked(out: Path) -> Path:
    """`out`; ReportError, before anything is read, unless a report may be written there."""
    from backbench.reports.page.export import require_writable

    require_writable(out)
    return out
