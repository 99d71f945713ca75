"""`bench schema`: what a run's record holds, for programs of others."""

from __future__ import annotations

import click


@click.command()
def schema() -> None:
    """Print the JSON Schema (draft 2020-12) of run.json and of the rows of its tables.

    docs/run.schema.json is what this prints.
    """
    from backbench.harness.commands.output import print_json
    from backbench.reports.json_schema import json_schema

    print_json(json_schema())
