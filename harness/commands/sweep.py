"""`bench sweep`: a campaign of many runs, which survives everything and opens as one comparison."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backbench.errors import HarnessError
from backbench.harness.commands.report import report as report_command
from backbench.harness.commands.report import writable

if TYPE_CHECKING:
    from backbench.harness.options import RunOptions
    from backbench.harness.sweep.campaign import Campaign
    from backbench.harness.sweep.status import Status
    from backbench.reports.record.sweep import Cell, Sweep

START = "start"


class SweepGroup(click.Group):
    """`bench sweep FILE` is `bench sweep start FILE`; a file called like a command is given as ./plan."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = [START, *args]
        return super().parse_args(ctx, args)


FILE = click.argument("campaign_file", metavar="CAMPAIGN.toml", type=click.Path(path_type=Path))
DIRECTORY = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
QUIET = click.option("-q", "--quiet", is_flag=True, help="Say nothing of how far it is.")
RETRY = click.option("--retry-failed", is_flag=True, help="Try cells again that were given up.")
OUT = click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The sweep's directory; one that was stopped goes on in it. [runs/NAME]",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print how every cell stands as JSON.")


@click.group(
    cls=SweepGroup,
    no_args_is_help=True,
    options_metavar="",
    subcommand_metavar="CAMPAIGN.toml [OPTIONS] | COMMAND ...",
    epilog="Options of `bench sweep CAMPAIGN.toml` (--out, --workers, --dry-run, --on, --retry-failed, "
    "--json): see `bench sweep start --help`.",
)
def sweep() -> None:
    """Run a campaign: a matrix of `bench run`'s options, each point several times, into one directory.

    CAMPAIGN.toml has [base] options, a [matrix] of lists, [[exclude]], [[include]] and repeats = N. Stopped
    or killed, the same command goes on where it was. The directory opens with bench show, compare, report
    and verify. See docs/sweep.md.

    Exit codes: 0 every run is there, 2 usage or a worker was killed, 4 some cells failed (the others ran),
    5 wrong results, 130 interrupted.
    """


@sweep.command(START)
@FILE
@OUT
@click.option(
    "--workers",
    type=click.IntRange(min=1, max=256),
    default=1,
    show_default=True,
    metavar="N",
    help="Workers at once on this machine. They share it: more than one measures no speed.",
)
@click.option("--dry-run", is_flag=True, help="Print the cells and the time they may take; start nothing.")
@click.option(
    "--on", type=click.Choice(["local"]), default="local", show_default=True, help="Where workers start."
)
@RETRY
@QUIET
@JSON
def start(
    campaign_file: Path,
    out: Path | None,
    workers: int,
    dry_run: bool,
    on: str,
    retry_failed: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Plan CAMPAIGN.toml, work on it here until it is done, then print its table and write its report.

    This is what `bench sweep CAMPAIGN.toml` does.
    """
    from backbench.harness.commands.output import echo, printing
    from backbench.harness.commands.sweeps import print_sweep
    from backbench.harness.sweep.cells import retry
    from backbench.harness.sweep.local import work_here
    from backbench.harness.sweep.status import Status
    from backbench.reports.page.export import write_report

    if dry_run:
        _dry_run(_campaign(campaign_file), campaign_file, out, as_json)
        return
    planned = _plan(campaign_file, out)
    if retry_failed:
        retry(planned)
    ends = work_here(planned.path, workers, quiet)
    status = Status.of(planned)
    _say_failed(status)
    page = planned.path / "report.html"
    if status.done:
        write_report([planned.path], page)
    with printing(f"the results are in {planned.path}"):
        if as_json:
            _print_json(status)
        else:
            if status.done:
                print_sweep(planned.path)
            echo(status.line)
            echo(f"Sweep:  {planned.path}")
            if status.done:
                echo(f"Report: {page}")
    if status.unfinished:
        raise HarnessError(
            f"{status.unfinished} cells are left, since workers ended early (exit codes "
            f"{', '.join(map(str, ends))}); the same command goes on."
        )
    raise SystemExit(status.exit_code)


@sweep.command()
@FILE
@OUT
@JSON
def plan(campaign_file: Path, out: Path | None, as_json: bool) -> None:
    """Write the cells of CAMPAIGN.toml into DIR, and start nothing; finished cells stay."""
    _show(_plan(campaign_file, out), as_json)


@sweep.command()
@DIRECTORY
@click.option("--once", is_flag=True, help="Run at most one cell.")
@RETRY
@QUIET
def work(directory: Path, once: bool, retry_failed: bool, quiet: bool) -> None:
    """Run the cells of DIR that nobody else runs, until each is done or given up.

    Any number of workers may share a directory, on any number of machines.
    """
    from backbench.harness.commands.stored import say
    from backbench.harness.sweep.cells import retry
    from backbench.harness.sweep.worker import Worker
    from backbench.reports.record.sweep import read_sweep

    if retry_failed:
        retry(read_sweep(directory))
    tell: Callable[[str], None] = (lambda text: None) if quiet else say
    Worker(directory, tell).work(once)


@sweep.command()
@DIRECTORY
@JSON
def status(directory: Path, as_json: bool) -> None:
    """Say how the cells of DIR stand, and how long the rest may take.

    Exit codes: 4 some cells failed, 5 wrong results, else 0.
    """
    from backbench.reports.record.sweep import read_sweep

    found = _show(read_sweep(directory), as_json)
    raise SystemExit(found.exit_code)


@sweep.command()
@DIRECTORY
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    callback=lambda context, parameter, out: writable(out),
    metavar="FILE",
    help="The HTML file: a new one, or a report to replace.",
)
@click.option("--json", "as_json", is_flag=True, help="Print {report, bytes} as JSON.")
@click.pass_context
def report(context: click.Context, directory: Path, out: Path, as_json: bool) -> None:
    """Write one page of what DIR holds by now, as `bench report DIR` does."""
    context.invoke(report_command, runs=(directory,), out=out, as_json=as_json)


def _campaign(file: Path) -> Campaign:
    """The campaign, checked as far as that goes without a device."""
    from backbench.harness.sweep.campaign import read_campaign
    from backbench.harness.sweep.local import check

    campaign = read_campaign(file)
    check(campaign)
    return campaign


def _plan(file: Path, out: Path | None) -> Sweep:
    from backbench.harness.provenance import command_line
    from backbench.harness.sweep.cells import plan

    campaign = _campaign(file)
    return plan(campaign, out or Path("runs") / campaign.name, command_line(sys.argv[1:]))


def _dry_run(campaign: Campaign, file: Path, out: Path | None, as_json: bool) -> None:
    from backbench.harness.options import run_options
    from backbench.harness.sweep.cells import planned

    found, contents = planned(campaign, out or Path("runs") / campaign.name, "")
    _show(found, as_json, lambda cell: run_options(contents[cell]["options"]))


def _show(found: Sweep, as_json: bool, options_of: Callable[[Cell], RunOptions] | None = None) -> Status:
    """Print how every cell stands."""
    from backbench.harness.commands.output import echo, print_table
    from backbench.harness.sweep.status import Status

    state = Status.of(found)
    if as_json:
        _print_json(state, options_of)
        return state
    rows = []
    for cell, each in state.states.items():
        seconds = "" if each.seconds is None else f"{each.seconds:.0f} s"
        rows.append((cell.point, str(cell.block + 1), each.kind, seconds, each.note))
    print_table("", ("Point", "Run", "State", "Took", ""), rows, right=(1, 3))
    echo(state.line)
    if state.unfinished:
        echo(f"What is left may take {_estimate(state, options_of)}.")
    return state


def _print_json(state: Status, options_of: Callable[[Cell], RunOptions] | None = None) -> None:
    from backbench.harness.commands.output import print_json

    print_json(state.to_json(_estimate(state, options_of)))


def _estimate(state: Status, options_of: Callable[[Cell], RunOptions] | None) -> Any:
    from backbench.harness.sweep.cells import options_of as stored

    return state.estimate(options_of or (lambda cell: stored(state.sweep.directory(cell))))


def _say_failed(state: Status) -> None:
    from backbench.harness.commands.stored import say
    from backbench.harness.sweep.cells import GIVEN_UP

    for cell, each in state.states.items():
        if each.kind == GIVEN_UP:
            say(f"failed: {cell.point}, run {cell.block + 1}: {each.note}")
