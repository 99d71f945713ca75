"""`bench show`: a run's summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from backbench.harness.commands.stored import RUN


@click.command()
@click.argument("run", type=RUN)
@click.option("--json", "as_json", is_flag=True, help="Print the whole record as JSON.")
def show(run: Path, as_json: bool) -> None:
    """Print the summary of RUN, a run or experiment directory or a bundle, and on stderr what was edited."""
    from backbench.harness.commands.output import print_json
    from backbench.harness.commands.stored import reading
    from backbench.reports.record.bundle import expand

    with reading(run):
        entries = expand(run)
        if as_json:
            found = [_as_json(entry) for entry in entries]
            print_json(found[0] if len(found) == 1 else found)
            return
        for entry in entries:
            _print(entry)


def _as_json(run: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from backbench.harness.commands.experiments import experiment_json
    from backbench.harness.commands.stored import read
    from backbench.reports.record.experiment import is_experiment

    return experiment_json(run) if is_experiment(run) else asdict(read(run)[1])


def _print(run: Path) -> None:
    from backbench.harness.commands.experiments import print_experiment
    from backbench.harness.commands.output import (
        headline,
        print_clipping,
        print_report_table,
        print_tuning,
        print_validity,
    )
    from backbench.harness.commands.stored import read, say
    from backbench.reports.record.experiment import is_experiment
    from backbench.reports.tables import latency_table, summary_table

    if is_experiment(run):
        print_experiment(run)
        return
    _, record = read(run)
    say(headline(record), err=False)
    print_tuning(record)
    print_clipping(record)
    print_report_table(summary_table(record))
    print_report_table(latency_table([record]))
    print_validity(record)
    if (hidden := record.run.get("redacted")) is not None:
        say(f"Redacted for sharing: {', '.join(hidden) or 'nothing had to be'}.", err=False)
