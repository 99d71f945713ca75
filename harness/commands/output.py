"""What several commands print: tables for people, JSON for programs."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from backbench.errors import printable

if TYPE_CHECKING:
    from backbench.reports.record import RunRecord
    from backbench.reports.tables import Cell, Table


LONGEST_LINE = 290
"""Characters of an error line, "error: " included."""
PLAIN = {"–": "-", "—": "-", "×": "x", "µ": "u", "±": "+-", "Δ": "d", "≤": "<=", "≥": ">=", "…": "..."}
PLAIN |= dict(zip("▁▂▃▄▅▆▇█", "_.-=+*%#", strict=True))
"""How a stream that does not know these writes them."""


def error_line(text: str) -> str:
    """One line of at most LONGEST_LINE characters; a longer one loses its middle."""
    line = f"error: {printable(' '.join(text.split()))}"
    if len(line) <= LONGEST_LINE:
        return line
    end = LONGEST_LINE // 2 - 10  # what to do stands at the end
    return f"{line[: LONGEST_LINE - end - 5]} ... {line[-end:]}"


def echo(text: str, err: bool = False) -> None:
    """A line for people."""
    click.echo(printable(text), err=err)


@contextlib.contextmanager
def printing(otherwise: str) -> Iterator[None]:
    """Print what a finished work says; where stdout takes none, a line on stderr says `otherwise`."""
    try:
        yield
        flush()
    except OSError as error:
        silence(1)
        with contextlib.suppress(OSError):
            echo(f"cannot print: {error.strerror}; {otherwise}", err=True)


def flush() -> None:
    """Hand stdout's text over; OSError where nobody takes it."""
    if sys.stdout is not None:
        sys.stdout.flush()


def silence(descriptor: int) -> None:
    """Send what is still written to stdout (1) or stderr (2) nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def open_streams() -> None:
    """Let stdout and stderr take every text, and let closed ones be there.

    A closed stream's number would be given to the next file that is opened. Characters that a stream's
    encoding lacks are written plainly.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            setattr(sys, name, os.fdopen(descriptor, mode))
        elif hasattr(stream, "reconfigure") and mode == "w":
            stream.reconfigure(errors="backbench.plain")


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    spelled = "".join(
        PLAIN.get(each) or each.encode("ascii", "backslashreplace").decode() for each in characters
    )
    return spelled, error.end


codecs.register_error("backbench.plain", _plainly)


def print_json(value: Any) -> None:
    """One indented JSON document on stdout, in ASCII; infinities and NaN become null."""
    from backbench.reports.record import finite

    click.echo(json.dumps(finite(value), indent=2))


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()
) -> None:
    """A rich table; `right` are the indices of right-aligned columns."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(
        title=escape(printable(title)) if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for index, name in enumerate(columns):
        table.add_column(
            Text(printable(name)), justify="right" if index in right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console()
    # Piped output has no width of its own: folding lines there would only break it.
    Console(width=None if console.is_terminal else 160).print(table)


def print_report_table(table: Table) -> None:
    """A table of `reports.tables`; every column but the first is right-aligned."""
    from backbench.reports.quantities import DASH

    def text(cell: Cell) -> str:
        full = cell.note if cell.note and cell.value == DASH else str(cell)
        return full.removeprefix("not supported at this sample size: ")

    rows = [[text(cell) for cell in row] for row in table.rows]
    print_table(table.title, table.columns, rows, right=range(1, len(table.columns)))


def print_validity(record: RunRecord) -> None:
    """The reasons not to believe a run, on stderr, or nothing."""
    for reason in record.validity:
        click.echo(printable(f"not valid: {reason}"), err=True)


def used_text(record: RunRecord) -> str:
    """Like "triton", or "attention triton, linear torch, ..." where operations differ."""
    used: dict[str, str] = record.backend.get("used") or {}
    if not used:
        return str(record.backend.get("server_title") or record.backend.get("asked") or "?")
    if len(set(used.values())) == 1:
        return next(iter(used.values()))
    each = ", ".join(f"{operation} {name}" for operation, name in used.items())
    return each or str(record.backend.get("asked") or "?")


def print_tuning(record: RunRecord) -> None:
    """Which operations ran on launches tuned for this device and which did not, where any could be."""
    tuned: dict[str, str | None] = record.backend.get("tuned") or {}
    known = [f"{operation} {state}" for operation, state in tuned.items() if state is not None]
    if known:
        click.echo(printable(f"Launches: {'; '.join(known)}"))


def print_clipping(record: RunRecord, head: str = "Clipped") -> None:
    """What the requests lost to the model's context, where anything."""
    from backbench.reports.tables import clipping

    if text := clipping(record):
        click.echo(printable(f"{head}: {text}"))


def own_names(record: RunRecord) -> str:
    """The label and tags that its user gave a run: "night card=left"; empty where none."""
    tags = (f"{key}={value}" for key, value in sorted((record.run.get("tags") or {}).items()))
    return " ".join(filter(None, (record.run.get("label"), *tags)))


def headline(record: RunRecord) -> str:
    """One line: what ran on what."""
    names = own_names(record)
    device = (record.system.get("device") or {}).get("name", "?")
    counts = record.metrics.get("counts") or {}
    dtype = record.model.get("dtype") or "?"
    return printable(
        (f"{names}: " if names else "")
        + f"{record.workload.get('name')} on {record.model.get('name')} ({dtype}), "
        f"{used_text(record)}, {device}: {counts.get('completed')} of {counts.get('intended')} requests, "
        f"{record.run['status']}"
    )
