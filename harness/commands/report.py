"""`bench report`: one HTML file of one or more runs."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", "-o", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The HTML file."
)
@click.option("--json", "as_json", is_flag=True, help="Print {report, bytes} as JSON.")
def report(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Write one self-contained HTML report of RUNS; it needs no network."""
    from backbench.harness.commands.output import print_json
    from backbench.harness.commands.stored import read, reading
    from backbench.reports.page.html import write_report

    with reading(*runs):
        write_report([read(run)[0].path for run in runs], out)
    if as_json:
        print_json({"report": str(out), "bytes": out.stat().st_size})
    else:
        click.echo(f"Report: {out}")
