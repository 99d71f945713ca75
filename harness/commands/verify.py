"""`bench verify`: is a stored run what it says."""

from __future__ import annotations

from pathlib import Path

import click

from backbench.errors import INVALID
from backbench.harness.commands.stored import RUN


@click.command()
@click.argument("run", type=RUN)
@click.option("--json", "as_json", is_flag=True, help="Print {run, verified, problems, unchecked} as JSON.")
def verify(run: Path, as_json: bool) -> None:
    """Recompute every number of RUN, a run or experiment directory or a bundle, that its tables give;
    exit 4 names what does not hold.

    What cannot be recomputed (it was measured beside the tables, or follows an older definition) is named.
    """
    from backbench.harness.commands.output import print_json
    from backbench.harness.commands.stored import reading, say
    from backbench.reports.verify import examine_stored

    with reading(run):
        found = examine_stored(run)
    if as_json:
        print_json(
            {
                "run": str(run),
                "verified": not found.problems,
                "problems": list(found.problems),
                "unchecked": list(found.unchecked),
            }
        )
    else:
        for problem in found.problems:
            say(f"mismatch: {problem}")
        for line in found.unchecked:
            say(f"not recomputed, {line}", err=False)
        if found.problems:
            say(f"{run} is not what its tables say: {len(found.problems)} mismatches.")
        else:
            say(f"{run}: every number that its tables give follows from them.", err=False)
    raise SystemExit(INVALID if found.problems else 0)
