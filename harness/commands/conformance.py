"""`bench backends --check NAME`: a backend's conformance matrix."""

from __future__ import annotations

import os

import click

WRONG = 5
"""Exit code of wrong results."""


def check_backend(name: str, interpret: bool, prefer: str | None, full: bool, as_json: bool) -> None:
    """Print the matrix; end with exit code 5 where any case is wrong."""
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated, before their import
    from backbench.backends.conformance import check
    from backbench.backends.interface.device import detect
    from backbench.harness.commands.output import print_json

    matrix = check(name, detect(interpret=interpret, prefer=prefer), level="full" if full else "quick")
    if as_json:
        print_json(matrix.to_json())
    else:
        for line in matrix.lines():
            click.echo(line)
    if not matrix.ok:
        click.get_current_context().exit(WRONG)
