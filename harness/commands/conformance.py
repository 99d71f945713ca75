"""`bench backends --check NAME`: a backend's conformance matrix."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from backbench.errors import INTERRUPTED, WRONG

if TYPE_CHECKING:
    from backbench.backends.conformance import CheckRow

PLAIN_LINES = 10
"""Lines of progress over a whole check where there is no terminal."""


def check_backend(name: str, interpret: bool, prefer: str | None, full: bool, as_json: bool) -> None:
    """Print the matrix; end with exit code 5 where any case is wrong.

    Progress goes to stderr. Ctrl-C prints what was checked so far, and ends with exit code 130.
    """
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated, before their import
    from backbench.backends.conformance import ConformanceMatrix, check
    from backbench.backends.interface.device import detect
    from backbench.harness.commands.output import print_json

    device, level = detect(interpret=interpret, prefer=prefer), "full" if full else "quick"
    with watching() as watch:
        try:
            matrix = check(name, device, level=level, on_row=watch.row)
        except KeyboardInterrupt:
            matrix = ConformanceMatrix(name, device.name, device.arch, level, tuple(watch.rows))
            watch.interrupted = True
    if as_json:
        print_json(matrix.to_json() | {"interrupted": watch.interrupted, "cases": watch.total})
    else:
        for line in matrix.lines():
            click.echo(line)
    if watch.interrupted:
        click.echo(f"interrupted after {len(watch.rows)} of {watch.total or 'all'} cases", err=True)
        click.get_current_context().exit(INTERRUPTED)
    if not matrix.ok:
        click.get_current_context().exit(WRONG)


class Watch:
    """Keeps the rows of a check under way, and says how far it is: a bar, or a few plain lines."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.rows: list[CheckRow] = []
        self.total = 0
        self.interrupted = False
        self._wrong = 0
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        console = Console(stderr=True)
        self.bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = None if self.bar is None else self.bar.add_task("", total=None)

    def row(self, row: CheckRow, total: int) -> None:
        """One more case ended."""
        self.rows.append(row)
        self.total = total
        self._wrong += row.status == "wrong"
        done = len(self.rows)
        wrong = f"{self._wrong} wrong, " if self._wrong else ""
        latest = f"{wrong}{row.operation} {row.dtype} {row.case}"
        if self.bar is not None and self._task is not None:
            self.bar.update(self._task, completed=done, total=total, description=latest)
        elif done * PLAIN_LINES // total > (done - 1) * PLAIN_LINES // total:
            click.echo(f"{done} of {total} cases: {latest}", err=True)


@contextmanager
def watching() -> Iterator[Watch]:
    """A watch whose bar, if it has one, is gone afterwards."""
    watch = Watch()
    if watch.bar is None:
        yield watch
        return
    with watch.bar:
        yield watch
