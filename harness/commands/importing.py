"""`bench import`: results of other benchmarks as runs of ours."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import click


class ImportCommand(click.Command):
    """Its help lists the formats, which are found when it is asked for."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from backbench.reports.importing.format import imports

        with formatter.section("Formats, told apart by what is in the file"):
            formatter.write_dl([(each.name, each.description) for each in imports()])


@click.command(cls=ImportCommand)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A new or empty directory; of several files, a directory in it for each. [runs/imported-FILE]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the directories and what they hold as JSON.")
def import_runs(files: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Make a run directory of each FILE that another benchmark wrote, marked as foreign and unverified.

    Where the file has its requests' own rows, every number is computed anew by the definitions of
    docs/metrics.md; else its summary's numbers are taken as they are, as far as they mean the same.
    """
    from backbench.harness.commands.output import headline, print_json
    from backbench.harness.commands.stored import RUNS, say
    from backbench.reports.importing.format import import_file

    found = []
    for number, file in enumerate(files, 1):
        if out is None:
            place = _free(RUNS / f"imported-{file.stem}")
        else:
            place = out if len(files) == 1 else out / f"{number}-{file.stem}"
        for directory, record in import_file(file, place):
            imported = record.run["imported"]
            found.append(imported | {"directory": str(directory.path), "uuid": record.run["uuid"]})
            if as_json:
                continue
            say(headline(record), err=False)
            for note in imported["notes"]:
                say(f"note: {note}")
            what = "from its requests" if imported["rows"] else "its summary's numbers"
            say(f"Imported from {imported['tool']}, {what}; foreign, unverified.", err=False)
            say(f"Run directory: {directory.path}", err=False)
    if as_json:
        print_json(found)


def _free(base: Path) -> Path:
    """`base`, or the first of `base`-1, `base`-2, ... that is not there."""
    places = (base if number == 0 else base.with_name(f"{base.name}-{number}") for number in count())
    return next(place for place in places if not place.exists())
