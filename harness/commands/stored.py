"""What the commands that read stored runs share: one line where a record is none, and who edited it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from backbench.errors import INVALID, BackbenchError, ReportError, printable

if TYPE_CHECKING:
    from backbench.reports.record import RunDirectory, RunRecord

RUNS = Path("runs")
"""Where `bench run` puts runs, and `latest` looks for them."""
LONGEST = 280
"""Characters of a line on stderr; values of a foreign record may be of any length."""


def say(text: str, err: bool = True) -> None:
    """One printable line."""
    line = printable(" ".join(text.split()))
    click.echo(line[: LONGEST - 3] + "..." if err and len(line) > LONGEST else line, err=err)


class RunType(click.ParamType):
    """A run or experiment directory; `latest` is the newest finished one below runs/, `latest:LABEL` the
    newest with that label. A folder of that name wins. What was taken is said on stderr."""

    name = "run"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The directory."""
        from backbench.reports.listing import LATEST, latest

        path = Path(str(value))
        word, _, label = str(value).partition(":")
        if word != LATEST or path.exists():
            return path
        taken = latest(RUNS, label or None)
        say(f"{value}: {taken}")
        return taken

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Files and directories: a bundle is a file."""
        return [CompletionItem(incomplete, type="file")]


RUN = RunType()
"""The type of every argument that is a stored run."""


@contextmanager
def reading(*runs: Path) -> Iterator[None]:
    """Turns what a foreign or malformed record trips into one line that names the runs."""
    try:
        yield
    except BackbenchError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        names = ", ".join(map(str, runs))
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:120]
        raise ReportError(
            f"{names[:120]}: not readable as run records ({why}); were they written by Backbench?",
            exit_code=INVALID,
        ) from error


def read(run: Path) -> tuple[RunDirectory, RunRecord]:
    """The directory and its record; says on stderr what is not as it was written."""
    from backbench.reports.record import RunDirectory, digest_problems

    directory = RunDirectory.open(run)
    record = directory.read_record()
    if problems := "; ".join(digest_problems(directory, record)):
        say(f"tampered: {run}: {problems}")
    return directory, record
