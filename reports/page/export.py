"""The report on disk: a page, Markdown or CSV by the file's suffix, and its figures as SVG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from backbench.errors import ReportError
from backbench.reports import tables
from backbench.reports.arms import arm_differences, arms_incomparable
from backbench.reports.page import answer, html, sections
from backbench.reports.page.figure import standalone
from backbench.reports.page.html import GateRows
from backbench.reports.page.run_data import Page
from backbench.reports.record import RunDirectory
from backbench.reports.record.bundle import expand
from backbench.reports.record.experiment import is_experiment, read_experiment

MAX_BYTES = 15_000_000
"""A report stays small enough to send and to open; one run has a fraction of a megabyte."""
MARKDOWN_START = "<!-- a Backbench report -->"


def write_report(
    run_dirs: Sequence[Path | str], out: Path | str, gates: GateRows = (), figures: Path | None = None
) -> None:
    """Write the report of run and experiment directories to `out`: a page (.html), .md or .csv.

    The first run is the one that ratios refer to. Runs that do not compare get a banner that names the
    differences, and no ratios. `figures` is a folder that gets every figure as an SVG file.

    Raises:
        ReportError: a run cannot be read, `out` cannot be written, or the page would be over 15 MB.
    """
    if not run_dirs:
        raise ReportError("A report needs at least one run directory.")
    out = Path(out)
    kind = require_writable(out)
    paths = [_openable(each) for path in run_dirs for each in expand(Path(path))]
    page = html.load_page(paths)
    content = kind.text(page, gates).encode("utf-8")
    if len(content) > MAX_BYTES:
        raise ReportError(
            f"The report would have {len(content):,} bytes, more than {MAX_BYTES:,}; give it fewer runs."
        )
    _write(out, content)
    if figures is not None:
        write_figures(page, figures, gates)


def write_figures(page: Page, folder: Path, gates: GateRows = ()) -> list[Path]:
    """Every figure as FOLDER/<its name>.svg."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"Cannot make the folder {folder}: {error.strerror}; choose another.") from None
    for figure in html.draw(page, gates):
        file = folder / f"{figure.id}.svg"
        _write(file, standalone(figure, [run.style for run in page.runs]).encode("utf-8"))
        written.append(file)
    return written


def _openable(path: Path) -> Path:
    return read_experiment(path).path if is_experiment(path) else RunDirectory.open(path).path


@dataclass(frozen=True)
class Kind:
    """What a report can be written as."""

    starts: str
    """What such a file begins with: a report replaces a report, and nothing else."""
    text: Callable[[Page, GateRows], str]


def to_markdown(page: Page, gates: GateRows = ()) -> str:
    """The answer, what differs, the numbers and what speaks against them."""
    arms = page.arms
    hard = arms_incomparable(arms)
    parts = [MARKDOWN_START, f"# {html.title(page.records)}", html.subtitle(arms)]
    synthetic = [run.style.label for run in page.runs if run.record.run.get("synthetic")]
    parts += [f"**Synthetic, not measured:** {', '.join(synthetic)}"] if synthetic else []
    for sentence in answer.sentences(arms, html.SIDE_BY_SIDE):
        parts.append("".join(f"**{each.text}**" if each.strong else each.text for each in sentence))
    apart = hard and answer.search_of(arms) is None
    parts += ["These runs do not compare:\n\n" + "\n".join(f"- {each}" for each in hard)] if apart else []
    found = []
    if len(arms) > 1:
        found.append(tables.difference_table(sections.telling(arm_differences(arms))[0], page.names))
        found += [tables.scorecard_table(arms, not hard), tables.comparison_table(arms, with_ratios=not hard)]
    else:
        found += [tables.summary_table(page.records[0])]
    found += [tables.latency_table(page.records, page.names), sections.gate_table(gates)]
    parts += [tables.to_markdown(table) for table in found if table.rows]
    doubts = [f"- {run.style.label}: {reason}" for run in page.runs for reason in run.record.validity]
    parts.append("### Validity\n\n" + ("\n".join(doubts) or "Nothing speaks against these runs."))
    return "\n\n".join(part.rstrip() for part in (*parts, answer.fine_print(arms))) + "\n"


def to_csv(page: Page, gates: GateRows = ()) -> str:
    """Every quantity of every run, unscaled."""
    return tables.to_csv(tables.full_table(page.arms))


KINDS: dict[str, Kind] = {
    ".html": Kind("<!doctype html", html.render),
    ".md": Kind(MARKDOWN_START, to_markdown),
    ".csv": Kind("run,quantity,unit,", to_csv),
}
"""By the suffix of the file."""


def require_writable(out: Path) -> Kind:
    """What `out` is to hold; ReportError unless it is new, empty, or an earlier report of its kind."""
    kind = KINDS.get({".htm": ".html"}.get(out.suffix.lower(), out.suffix.lower()))
    if kind is None:
        raise ReportError(
            f"A report is written as {', '.join(KINDS)}, not {out.name[:60]!r}; choose a suffix."
        )
    try:
        if not out.exists() and not out.is_symlink():
            return kind
        if not out.is_file():
            raise ReportError(f"{out} is not a regular file; choose a new name such as report.html.")
        with out.open("rb") as file:
            begins = file.read(1024).lstrip().lower()
    except OSError as error:
        raise ReportError(f"Cannot read {out} before it is replaced: {error.strerror}.") from None
    if begins and not begins.startswith(kind.starts.lower().encode()):
        raise ReportError(f"{out} holds something else than a report; choose a new name or remove it.")
    return kind


def _write(out: Path, content: bytes) -> None:
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ReportError(f"Cannot write {out}: {error.strerror}; choose another file.") from None
