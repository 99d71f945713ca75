"""`bench run`: one experiment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from backbench.errors import INCONCLUSIVE, INTERRUPTED, INVALID, WRONG
from backbench.harness.commands.experiments import experiment_json, print_experiment, print_search
from backbench.harness.commands.flags import GroupedCommand, flag
from backbench.harness.commands.output import echo, print_json, printing
from backbench.harness.options import GROUPS, Talk, option_names
from backbench.options import options_of

if TYPE_CHECKING:
    from backbench.harness.experiment import Outcome
    from backbench.harness.options import RunOptions


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    declared = [option for _, option in option_names().values()] + [*options_of(Talk)]
    for option in reversed(declared):
        function = flag(option, GROUPS[option.group])(function)
    return function


@click.command(cls=GroupedCommand)
@_with_options
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Options by name, in tables or flat; what is typed here wins. See docs/command-line.md.",
)
@click.option("--no-report", is_flag=True, help="Write no page; `bench report` makes one of the record.")
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of a table.")
def run(
    as_json: bool,
    no_report: bool,
    config: Path | None,
    quiet: bool | None,
    verbose: bool | None,
    **given: Any,
) -> None:
    """Replay a workload on the engine with one backend or against a server, and write a run directory.

    With --find-load the highest load at which --slo holds is searched, a run a probe, the model loaded once.
    With --repeat N or several backends (-b torch,sdpa) every run is a process of its own, the backends take
    turns, and an experiment directory holds them all; docs/comparing.md has the journey.

    Exit codes: 0 ok, 2 usage or a fault, 3 no load holds, 4 not valid, 5 wrong results, 130 interrupted.
    """
    # Threads that wait spin for some microseconds, then sleep. Without a spin, waking them doubled a run's
    # time on two idle cores; with GNU's default spin, a machine that anything else ran on was ten times
    # slower. OpenMP reads this when torch is imported; the record keeps it.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from backbench.harness.experiment import run as run_experiment
    from backbench.harness.progress import open_observer
    from backbench.harness.repeats import is_series

    talk = Talk(quiet=bool(quiet), verbose=bool(verbose))
    options = _options(given, config)
    if options.find_load:
        _find_load(options, as_json, no_report, talk)
    if is_series(options):
        _run_series(options, as_json, no_report, talk)
    with open_observer(talk) as observer:
        outcome = run_experiment(options, observer)
        report = None if no_report else _report(outcome, observer.stage)
    with printing(f"the record is in {outcome.directory.path}"):
        if as_json:
            print_json(asdict(outcome.record) | {"directory": str(outcome.directory.path)})
        else:
            _print(outcome, report)
    if outcome.failure is not None:
        raise outcome.failure
    raise SystemExit(exit_code(outcome))


def _run_series(options: RunOptions, as_json: bool, no_report: bool, talk: Talk) -> NoReturn:
    """Run every backend as often as asked, and end with the worst code of the runs."""
    from backbench.harness.progress import line_every_s, open_observer
    from backbench.harness.repeats import run_repeats
    from backbench.reports.page.export import write_report

    with open_observer(talk, series=True) as observer:
        done = run_repeats(options, observer.stage, every_s=line_every_s(talk))
    path = done.experiment.path
    if not done.experiment.runs:
        raise KeyboardInterrupt
    if done.code == INTERRUPTED:
        echo(f"interrupted; {len(done.experiment.runs)} finished runs are kept", err=True)
    report = None if no_report else path / "report.html"
    if report is not None:
        write_report([path], report)
    with printing(f"the runs are in {path}"):
        if as_json:
            print_json(experiment_json(path))
        else:
            print_experiment(path)
            echo(f"Experiment directory: {path}")
            if report is not None:
                echo(f"Report:               {report}")
    raise SystemExit(done.code)


def _find_load(options: RunOptions, as_json: bool, no_report: bool, talk: Talk) -> NoReturn:
    """Search the highest load, and end with 0 where one holds."""
    from backbench.harness.load_search import find_load
    from backbench.harness.progress import open_observer
    from backbench.harness.subjects.choice import subject_class
    from backbench.reports.page.export import write_report

    with open_observer(talk) as observer:
        done = find_load(options, observer, subject_class(options))
    path = done.search.path
    if not done.search.probes:
        raise KeyboardInterrupt
    report = None if no_report else path / "report.html"
    if report is not None:
        write_report([path], report)
    with printing(f"the runs are in {path}"):
        if as_json:
            print_json(done.search.as_json() | {"directory": str(path)})
        else:
            print_search(done.search)
            echo(f"Experiment directory: {path}")
            if report is not None:
                echo(f"Report:               {report}")
    raise SystemExit(done.code or (0 if done.search.held else INCONCLUSIVE))


def _options(given: dict[str, Any], config: Path | None) -> RunOptions:
    from backbench.harness.options import over_file, read_file, run_options
    from backbench.harness.provenance import command_line

    asked = given if config is None else over_file(read_file(config), given)
    return run_options(asked, command=command_line(sys.argv[1:]))


def _report(outcome: Outcome, stage: Callable[[str], None]) -> Path:
    from backbench.reports.page.export import write_report

    stage("Writing the report")
    path = outcome.directory.report_path
    write_report([outcome.directory.path], path)
    return path


def exit_code(outcome: Outcome) -> int:
    """What one run makes the command end with."""
    from backbench.reports.metrics.validity import fails

    record = outcome.record
    if record.run["status"] == "interrupted":
        return INTERRUPTED
    if record.correctness.get("passed") is False:
        return WRONG
    return INVALID if fails(record) else 0


def _print(outcome: Outcome, report: Path | None) -> None:
    from backbench.harness.commands.output import (
        headline,
        print_clipping,
        print_report_table,
        print_tuning,
        print_validity,
    )
    from backbench.reports.tables import summary_table

    click.echo(headline(outcome.record))
    print_tuning(outcome.record)
    print_clipping(outcome.record)
    print_report_table(summary_table(outcome.record))
    print_validity(outcome.record)
    echo(f"Run directory: {outcome.directory.path}")
    if report is not None:
        echo(f"Report:        {report}")
