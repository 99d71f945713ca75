"""What several commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from backbench.errors import printable

if TYPE_CHECKING:
    from backbench.reports.record import RunRecord
    from backbench.reports.tables import Cell, Table


def print_json(value: Any) -> None:
    """One indented JSON document on stdout; infinities and NaN become null."""
    from backbench.reports.record import finite

    click.echo(json.dumps(finite(value), indent=2, ensure_ascii=False))


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()
) -> None:
    """A rich table; `right` are the indices of right-aligned columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
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
    if len(set(used.values())) == 1:
        return next(iter(used.values()))
    return ", ".join(f"{operation} {name}" for operation, name in used.items())


def print_tuning(record: RunRecord) -> None:
    """Which operations ran on launches tuned for this device and which did not, where any could be."""
    tuned: dict[str, str | None] = record.backend.get("tuned") or {}
    known = [f"{operation} {state}" for operation, state in tuned.items() if state is not None]
    if known:
        click.echo(printable(f"Launches: {'; '.join(known)}"))


def headline(record: RunRecord) -> str:
    """One line: what ran on what."""
    device = (record.system.get("device") or {}).get("name", "?")
    counts = record.metrics.get("counts") or {}
    return printable(
        f"{record.workload.get('name')} on {record.model.get('name')} ({record.model.get('dtype')}), "
        f"{used_text(record)}, {device}: {counts.get('completed')} of {counts.get('intended')} requests, "
        f"{record.run['status']}"
    )
