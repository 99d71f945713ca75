"""`bench env`: this machine and its software, as a record would hold them."""

from __future__ import annotations

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the record's system and software sections.")
def env(as_json: bool) -> None:
    """Describe this machine and the software on it, without names that identify anyone."""
    from backbench.backends.interface.device import detect
    from backbench.harness import provenance
    from backbench.harness.commands.output import print_json, print_table
    from backbench.harness.sensors.present import describe_accelerator
    from backbench.reports.compare import flatten, show

    device = detect()
    found = {
        "system": provenance.system(device, describe_accelerator(device)),
        "software": provenance.software(),
    }
    if as_json:
        print_json(found)
        return
    for title, section in found.items():
        rows = [(name.partition(".")[2], show(value)) for name, value in flatten(section, title)]
        print_table(title.capitalize(), ("Field", "Value"), rows)
