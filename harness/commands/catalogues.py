"""`bench workloads`, `bench models`, `bench backends`: what there is."""

from __future__ import annotations

from typing import Any

import click

from backbench.harness.commands.flags import subject_flag

_JSON = click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")


@click.command()
@_JSON
def workloads(as_json: bool) -> None:
    """List the workloads; a data set's file is one too."""
    from backbench.harness.commands.output import print_json, print_table
    from backbench.options import options_of
    from backbench.workloads.catalogue import names
    from backbench.workloads.options import WorkloadOptions

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
