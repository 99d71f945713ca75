"""`bench recover`: the record of a run that was killed, from its log of finished requests."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of a line.")
def recover(run: Path, as_json: bool) -> None:
    """Make the record of RUN, a run directory whose run was killed.

    It holds the requests that had finished up to half a second before; steps, telemetry and the check of
    results are lost, and the record's status is "interrupted".
    """
    from dataclasses import asdict

    from backbench.harness.commands.output import headline, print_json, print_validity
    from backbench.harness.recording import recover as recover_run

    record = recover_run(run)
    if as_json:
        print_json(asdict(record) | {"directory": str(run)})
        return
    click.echo(headline(record))
    print_validity(record)
    click.echo(f"Run directory: {run}")
