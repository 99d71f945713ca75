"""`bench export`: runs in a format that other tools read."""

from __future__ import annotations

from pathlib import Path

import click

from backbench.harness.commands.stored import RUN


class ExportCommand(click.Command):
    """Its help lists the formats, which are found when it is asked for."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from backbench.reports.export.format import exports

        with formatter.section("Formats"):
            formatter.write_dl([(each.name, each.description) for each in exports()])


@click.command(cls=ExportCommand)
@click.argument("runs", nargs=-1, required=True, type=RUN)
@click.option("--format", "-f", "name", required=True, metavar="FORMAT", help="One of those below.")
@click.option(
    "--out", "-o", required=True, type=click.Path(path_type=Path), metavar="FILE", help="A new file."
)
def export(runs: tuple[Path, ...], name: str, out: Path) -> None:
    """Write RUNS, run and experiment directories and bundles, as JSON for another tool."""
    from backbench.harness.commands.stored import read, reading, say
    from backbench.reports.arms import open_arms
    from backbench.reports.export.format import export_named, write_export

    wanted = export_named(name)
    with reading(*runs):
        for path in write_export(wanted, open_arms(runs, read), out):
            say(f"Written: {path}", err=False)
