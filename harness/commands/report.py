"""`bench report`: one HTML file of one or more runs."""

from __future__ import annotations

from pathlib import Path

import click

from backbench.errors import ReportError
from backbench.harness.commands.stored import RUN


@click.command()
@click.argument("runs", nargs=-1, required=True, type=RUN)
@click.option(
    "--out",
    "-o",
    required=True,
    type=click.Path(path_type=Path),
    callback=lambda context, parameter, out: require_page(out),
    metavar="FILE",
    help="The HTML file: a new one, or a report to replace.",
)
@click.option("--json", "as_json", is_flag=True, help="Print {report, bytes} as JSON.")
def report(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Write one self-contained HTML report of RUNS, run and experiment directories; it needs no network."""
    from backbench.harness.commands.output import print_json
    from backbench.harness.commands.stored import read, reading
    from backbench.reports.arms import open_arms
    from backbench.reports.page.html import write_report

    with reading(*runs):
        open_arms(runs, read)  # says what was edited
        write_report(runs, out)
    if as_json:
        print_json({"report": str(out), "bytes": out.stat().st_size})
    else:
        click.echo(f"Report: {out}")


def require_page(out: Path) -> Path:
    """`out`; ReportError unless it is new, empty or a page: a report replaces a report, and nothing else."""
    try:
        if not out.exists() and not out.is_symlink():
            return out
        if not out.is_file():
            raise ReportError(f"{out} is not a regular file; choose a new name such as report.html.")
        with out.open("rb") as file:
            begins = file.read(1024).lstrip().lower()
    except OSError as error:
        raise ReportError(f"Cannot read {out} before it is replaced: {error.strerror}.") from None
    if begins and not begins.startswith(b"<!doctype html"):
        raise ReportError(f"{out} holds something else than a report; choose a new name or remove it.")
    return out
