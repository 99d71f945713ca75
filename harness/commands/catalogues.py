"""`bench workloads`, `bench models`, `bench backends`: what there is; and what one workload is like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backbench.harness.commands.flags import GroupedCommand, flag, subject_flag
from backbench.harness.options import GROUPS
from backbench.options import options_of
from backbench.workloads.options import WorkloadOptions

if TYPE_CHECKING:
    from backbench.workloads.request import Workload

DRAWN_REQUESTS = 1000
"""Of a workload that has as many as one asks for, where neither a number nor a model is given."""
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")


def _with_workload_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed([each for each in options_of(WorkloadOptions) if each.group]):
        function = flag(option, GROUPS[option.group])(function)
    return function


@click.command(cls=GroupedCommand)
@click.argument("name", required=False, metavar="[NAME|FILE]")
@subject_flag(
    "model",
    help="Its context, tokenizer and vocabulary hold, and as many requests as `bench run` would take here.",
    default=None,
    unset=f"no context; {DRAWN_REQUESTS} requests, or all of a file",
)
@_with_workload_options
@subject_flag("seed")
@click.option(
    "--block-size",
    type=click.IntRange(1, 65_536),
    default=16,
    metavar="N",
    help="Tokens a block of the prefix cache holds. [16]",
)
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a page, too."
)
@click.option("--json", "as_json", is_flag=True, help="Print the list, or the workload, as JSON.")
def workloads(
    name: str | None,
    model: str | None,
    seed: int,
    block_size: int,
    html: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """List the workloads; or draw one, or a data set's file, before anything is run.

    Lengths, arrivals over time and their bursts, ideal prefix hits, sessions, and what a model's context
    would cut off.
    """
    from backbench.errors import HarnessError

    load = {option.field: given[option.name] for option in options_of(WorkloadOptions) if option.group}
    load = {field: value for field, value in load.items() if value is not None}
    if name is None:
        if load or html or model:
            raise HarnessError("options draw a workload; name one, such as `bench workloads azure-conv`.")
        _list_workloads(as_json)
        return
    from backbench.harness.commands.output import echo, print_json
    from backbench.harness.commands.workload_view import print_profile
    from backbench.harness.workload_page import render_workload
    from backbench.harness.workload_profile import profile

    made = _make(name, model, seed, load)
    found = profile(made, block_size)
    if as_json:
        print_json(found)
    else:
        print_profile(found)
    if html is not None:
        html.write_text(render_workload(made, block_size), encoding="utf-8")
        echo(f"Page: {html}", err=as_json)


def _make(name: str, model: str | None, seed: int, load: dict[str, Any]) -> Workload:
    """As `bench run` would make it for the model; without one, as it was recorded."""
    if model is not None:
        from backbench.harness.experiment import make_workload
        from backbench.harness.options import RunOptions
        from backbench.harness.subjects.engine import EngineSubject

        asked = RunOptions(workload=name, backend="torch", model=model, seed=seed, load=load)
        return make_workload(asked, EngineSubject(asked).limits())
    from backbench.workloads.catalogue import entry_of, make

    entry = entry_of(name)
    if entry is not None and "num_requests" in entry.defaults and "dataset" not in load:
        load = {"num_requests": DRAWN_REQUESTS} | load
    return make(name, WorkloadOptions(seed=seed, **load))


def _list_workloads(as_json: bool) -> None:
    from backbench.harness.commands.output import print_json, print_table
    from backbench.workloads.catalogue import names

    flags = {option.field: option.flag for option in options_of(WorkloadOptions)}
    entries = names()
    if as_json:
        print_json(
            [
                {
                    "name": entry.name,
                    "summary": entry.summary,
                    "defaults": entry.defaults,
                    "options": sorted(flags[name] for name in entry.options),
                }
                for entry in entries
            ]
        )
        return
    print_table("Workloads", ("Name", "What it is"), [(entry.name, entry.summary) for entry in entries])


@click.command()
@_JSON
def models(as_json: bool) -> None:
    """List the models that need no path; a checkpoint directory or a hub id is one too."""
    from dataclasses import asdict

    from backbench.engine.models.listing import listed_models
    from backbench.harness.commands.output import print_json, print_table

    found = listed_models()
    if as_json:
        print_json([asdict(each) for each in found])
        return
    rows = [
        (each.name, each.architecture, f"{each.parameters / 1e6:,.1f} M", f"{each.context:,}", each.weights)
        for each in found
    ]
    print_table("Models", ("Name", "Architecture", "Parameters", "Context", "Weights"), rows, right=(2, 3))
    click.echo("Also: the directory of a checkpoint, or a Hugging Face id.")


@click.command()
@click.option("--interpret", is_flag=True, help="Judge with Triton's interpreter.")
@subject_flag("device", parameter="prefer")
@click.option("--check", metavar="NAME", help="Check one backend's results against the oracle; 5 = wrong.")
@click.option("--full", is_flag=True, help="With --check: every combination, not one of each.")
@_JSON
def backends(interpret: bool, prefer: str | None, check: str | None, full: bool, as_json: bool) -> None:
    """List the backends, and why one is unavailable here; or check one."""
    from backbench.errors import HarnessError

    if full and check is None:
        raise HarnessError("--full goes with --check NAME.")
    if check is not None:
        from backbench.harness.commands.conformance import check_backend

        check_backend(check, interpret, prefer, full, as_json)
        return
    from backbench.backends.interface.device import detect
    from backbench.backends.registry import availability, load
    from backbench.errors import BackendError
    from backbench.harness.commands.output import print_json, print_table

    device = detect(interpret=interpret, prefer=prefer)
    found: list[dict[str, Any]] = []
    for name, available, reasons in availability(device):
        try:
            summary = load(name).summary
        except BackendError:
            summary = ""
        found.append({"name": name, "available": available, "summary": summary, "reasons": reasons})
    if as_json:
        print_json({"device": device.name, "backends": found})
        return
    rows = [
        (
            str(each["name"]),
            "yes" if each["available"] else "no",
            "; ".join(each["reasons"]) or str(each["summary"]),
        )
        for each in found
    ]
    print_table(f"Backends on {device.name}", ("Name", "Here", "What it is, or why not"), rows)
