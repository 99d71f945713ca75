"""`bench portability`: every Triton kernel compiled for every GPU, without one, against the best seen.

Also `python -m backbench.harness.commands.portability`, for CI.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backbench.backends.aot.baseline import PortabilityRow

REGRESSED = 1
"""Exit code when a row cannot run, spills more or takes more shared memory than before."""


@click.command()
@click.option("--backend", "-b", "backends", multiple=True, metavar="NAME", help="Default: all with kernels.")
@click.option("--targets", help="Like sm90,gfx942; default: all.")
@click.option("--only", default="", help="Kernels whose name and variant contain this text.")
@click.option("--processes", default=2, type=click.IntRange(1, 64), help="Compilers at a time.")
@click.option("--update", is_flag=True, help="Write what is new or better to the baseline file.")
@click.option("--accept", is_flag=True, help="With --update: what is worse (but runs) becomes the best seen.")
@click.option(
    "--baseline",
    "--ratchet",
    "baseline_file",
    default=None,
    type=click.Path(path_type=Path),
    help="Compare with this file instead of the backend's own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write the matrix.")
def portability(
    backends: tuple[str, ...],
    targets: str | None,
    only: str,
    processes: int,
    update: bool,
    accept: bool,
    baseline_file: Path | None,
    as_json: bool,
    markdown: Path | None,
) -> None:
    """Compile every kernel for every target: does it build, fit, spill, use its matrix units?

    Exit code 1 names each row that cannot run, or that spills more or takes more shared memory than the
    best seen with this compiler.
    """
    import triton

    from backbench.backends.aot.baseline import compile_all, kernels_of
    from backbench.backends.aot.compile import TARGETS
    from backbench.errors import HarnessError
    from backbench.harness.commands.output import print_json

    chosen = [name.strip() for name in targets.split(",")] if targets is not None else list(TARGETS)
    rows: list[PortabilityRow] = []
    worse: list[str] = []
    for name, kernels in kernels_of(backends).items():
        found = compile_all(name, chosen, matching=only, processes=processes)
        if not found:
            raise HarnessError(
                f"No kernel's name and dtype contain {only!r}; leave out --only to see them all."
            )
        best = baseline_file or kernels.baseline
        worse += compared(found, best, update=update, accept=accept, whole=not (targets or only))
        rows += found
    if markdown is not None:
        markdown.write_text(to_markdown(rows, triton.__version__))
    if as_json:
        print_json({"triton": triton.__version__, "rows": [vars(row) for row in rows], "worse": worse})
    else:
        print_matrix(rows)
    for line in worse:
        click.echo(f"worse: {line}", err=True)
    if worse and not accept:
        click.get_current_context().exit(REGRESSED)


def compared(
    rows: Sequence[PortabilityRow], file: Path, *, update: bool, accept: bool, whole: bool
) -> list[str]:
    """What is worse than the baseline in `file`, which is written where asked for.

    whole: `rows` are all there are, so that an update drops those of kernels that are gone.
    """
    import triton

    from backbench.backends.aot.baseline import better, read_baseline, regressions

    stored = read_baseline(file)
    same = stored["triton"] == triton.__version__
    best = stored["rows"] if same else {}
    if not same:
        click.echo(f"The best seen is of Triton {stored['triton']}, this is {triton.__version__}.", err=True)
    if update:
        worse = {row.key for row in rows if list(regressions([row], best))} if accept else set()
        gone = set(best) - {row.key for row in rows} if whole else set()
        kept = better(rows, {key: facts for key, facts in best.items() if key not in worse | gone})
        text = json.dumps({"triton": triton.__version__, "rows": dict(sorted(kept.items()))}, indent=1)
        file.write_text(text + "\n")
    return list(regressions(rows, best))


def cell(row: PortabilityRow) -> str:
    """One row in a few characters: registers, spills, shared memory, arithmetic."""
    if row.problem or row.refused:
        return row.problem or "refused"
    parts = [f"{row.registers}r"] if row.registers is not None else []
    parts += [f"{row.spill_bytes}B spilled"] if row.spill_bytes else []
    parts += [f"{row.shared_bytes / 1024:.3g}K"] if row.shared_bytes else []
    parts += [row.arithmetic] if row.arithmetic else []
    return " ".join(parts)


def _grid(rows: Sequence[PortabilityRow]) -> tuple[list[str], list[list[str]]]:
    """Column names and lines: one line a kernel and variant, one column a target."""
    targets = list(dict.fromkeys(row.target for row in rows))
    cells = {(row.kernel, row.variant, row.target): cell(row) for row in rows}
    kernels = list(dict.fromkeys((row.kernel, row.variant) for row in rows))
    lines = [
        [f"{kernel} ({variant})", *(cells.get((kernel, variant, target), "") for target in targets)]
        for kernel, variant in kernels
    ]
    return ["Kernel", *targets], lines


def _apart(rows: Sequence[PortabilityRow]) -> tuple[list[PortabilityRow], list[PortabilityRow]]:
    """(rows of what is compiled for several targets, of what is for one alone)."""
    held = Counter((row.kernel, row.variant) for row in rows)
    several = [row for row in rows if held[row.kernel, row.variant] > 1]
    return several, [row for row in rows if held[row.kernel, row.variant] == 1]


LEGEND = "r: registers, K: KiB of shared memory, last: what the matrix units multiply"


def print_matrix(rows: Sequence[PortabilityRow]) -> None:
    """The matrix as tables of five targets, narrow enough to read; then what is compiled for one target."""
    from backbench.harness.commands.output import print_table

    several, alone = _apart(rows)
    columns, lines = _grid(several)
    for first in range(1, len(columns), 5):
        chosen = [0, *range(first, min(first + 5, len(columns)))]
        print_table(LEGEND, [columns[i] for i in chosen], [[line[i] for i in chosen] for line in lines])
    if alone:
        print_table(LEGEND, ["Kernel", "Target", "Takes"], _list(alone))


def _list(rows: Sequence[PortabilityRow]) -> list[list[str]]:
    return [[f"{row.kernel} ({row.variant})", row.target, cell(row)] for row in rows]


def _markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    return head + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_markdown(rows: Sequence[PortabilityRow], version: str) -> str:
    """The matrix as a page. Nothing in it was run: a compiler's word only."""
    several, alone = _apart(rows)
    text = (
        f"# Kernels compiled for every target\n\nTriton {version}; compiled, not run. Each cell: registers "
        "(r), bytes spilled a thread, KiB of shared memory (K), and what the matrix units multiply (nothing: "
        "plain arithmetic). `bench portability --markdown FILE` writes this page.\n"
    )
    if several:
        text += "\n" + _markdown_table(*_grid(several))
    if alone:
        text += (
            "\nCompiled for one target each: other layers, dealt out over the targets, and what a whole run "
            "launches.\n\n" + _markdown_table(["Kernel", "Target", "Takes"], _list(alone))
        )
    return text


if __name__ == "__main__":
    from backbench.harness.cli import run_command

    sys.exit(run_command(["portability", *sys.argv[1:]]))
