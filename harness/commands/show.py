"""`bench show`: a run's summary."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the whole record as JSON.")
def show(run: Path, as_json: bool) -> None:
    """Print the summary of RUN, a run or experiment directory, and on stderr what was edited since."""
    from dataclasses import asdict

    from backbench.harness.commands.experiments import experiment_json, print_experiment
    from backbench.harness.commands.output import (
        headline,
        print_clipping,
        print_json,
        print_report_table,
        print_tuning,
        print_validity,
    )
    from backbench.harness.commands.stored import read, reading, say
    from backbench.harness.commands.sweeps import print_sweep, sweep_json
    from backbench.reports.record.experiment import is_experiment
    from backbench.reports.record.sweep import is_sweep
    from backbench.reports.tables import latency_table, summary_table

    with reading(run):
        if is_experiment(run):
            sweep = is_sweep(run)
            if as_json:
                print_json(sweep_json(run) if sweep else experiment_json(run))
            else:
                (print_sweep if sweep else print_experiment)(run)
            return
        _, record = read(run)
        if as_json:
            print_json(asdict(record))
            return
        say(headline(record), err=False)
        print_tuning(record)
        print_clipping(record)
        print_report_table(summary_table(record))
        print_report_table(latency_table([record]))
        print_validity(record)
