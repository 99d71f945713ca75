"""`bench verify`: is a stored run what it says."""

from __future__ import annotations

from pathlib import Path

import click

from backbench.errors import INVALID


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print {run, verified, problems} as JSON.")
def verify(run: Path, as_json: bool) -> None:
    """Recompute every summary number of RUN from its tables; exit 4 names what does not hold."""
    from backbench.harness.commands.output import print_json
    from backbench.reports.record import RunDirectory
    from backbench.reports.verify import verify as verify_run

    problems = verify_run(RunDirectory.open(run))
    if as_json:
        print_json({"run": str(run), "verified": not problems, "problems": problems})
    elif problems:
        for problem in problems:
            click.echo(f"mismatch: {problem}", err=True)
        click.echo(f"{run} is not what its tables say: {len(problems)} mismatches.", err=True)
    else:
        click.echo(f"{run}: every number follows from its tables.")
    raise SystemExit(INVALID if problems else 0)
