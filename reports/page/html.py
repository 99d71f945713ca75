"""The report: one self-contained HTML file for one run or several, the same bytes for the same records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbench.errors import ReportError
from backbench.reports import tables
from backbench.reports.compare import differences, incomparable, labels
from backbench.reports.metrics import latency
from backbench.reports.metrics.requests import Context
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.series import panels
from backbench.reports.page import answer, figures, sections
from backbench.reports.page.figures import Figure
from backbench.reports.page.run_data import Page, RunData
from backbench.reports.page.style import run_styles
from backbench.reports.record import RunDirectory, RunRecord, digest_problems, finite

MAX_BYTES = 6_000_000
"""A report stays small enough to mail and to attach."""

PAGE_START = b"<!doctype html>"
TEMPLATES = Path(__file__).parent / "templates"


def write_report(run_dirs: Sequence[Path | str], out: Path | str) -> None:
    """Write the report of one or more run directories to `out`.

    The first run is the one that ratios refer to. Runs that do not compare get a banner that names the
    differences, and no ratios.

    Raises:
        ReportError: a run cannot be read, `out` cannot be written, or the page would be over 6 MB.
    """
    if not run_dirs:
        raise ReportError("A report needs at least one run directory.")
    text = render_report([RunDirectory.open(path) for path in run_dirs])
    content = text.encode("utf-8")
    if len(content) > MAX_BYTES:
        raise ReportError(
            f"The report would have {len(content):,} bytes, more than {MAX_BYTES:,}; give it fewer runs."
        )
    out = Path(out)
    _require_replaceable(out)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ReportError(f"Cannot write {out}: {error.strerror}; choose another file.") from None


def _require_replaceable(out: Path) -> None:
    """Only a new or empty file, or an earlier page: never a device, a pipe or somebody's data."""
    try:
        if not out.exists() and not out.is_symlink():
            return
        start = b"-"
        if out.is_file():
            with out.open("rb") as file:
                start = file.read(256).lstrip().lower()
    except OSError as error:
        raise ReportError(f"Cannot write {out}: {error.strerror}; choose another file.") from None
    if start and not start.startswith(PAGE_START):
        raise ReportError(f"Cannot write {out}: it exists and is no HTML page; choose another file.")


def render_report(directories: Sequence[RunDirectory]) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    runs = load_runs(directories)
    drawn = draw(runs)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    payload = script_json(embedded_data(runs, drawn))
    return environment.get_template("report.html").render(
        **page(runs, drawn),
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        js=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        payload=Markup(payload),
    )


def load_runs(directories: Sequence[RunDirectory]) -> list[RunData]:
    """Records and tables."""
    records = [directory.read_record() for directory in directories]
    styles = run_styles(records, labels(records))
    runs = []
    for directory, record, style in zip(directories, records, styles, strict=True):
        context = Context.from_dict(record.metrics.get("context") or {})
        tables = RunTables.read(
            directory.read_requests(), directory.read_steps(), context, directory.read_telemetry()
        )
        runs.append(RunData(record, style, tables, tuple(digest_problems(directory, record))))
    return runs


def draw(runs: Sequence[RunData]) -> dict[str, Figure]:
    """Every figure that the runs have data for, by its id."""
    tables = [run.tables for run in runs]
    ttft, itl = [latency.ttft(each) for each in tables], [latency.itl(each) for each in tables]
    found = (
        figures.ecdf_figure("ttft", "Time to first token", "TTFT", "requests", runs, ttft),
        figures.ecdf_figure("itl", "Inter-token latency", "ITL", "tokens", runs, itl),
        figures.over_time_figure(runs, panels(tables)),
        figures.decode_figure(runs),
    )
    return {each.id: each for each in found if each is not None}


def page(runs: Sequence[RunData], drawn: dict[str, Figure]) -> dict[str, Any]:
    """What the template shows."""
    records = [run.record for run in runs]
    names = [run.style.label for run in runs]
    hard = incomparable(records)
    several = len(runs) > 1
    return {
        "runs": runs,
        "several": several,
        "title": title(records),
        "subtitle": subtitle(records, names),
        "sentences": answer.sentences(records, names),
        "tiles": [] if several else answer.tiles(records[0]),
        "chips": [answer.chips(run.record, run.problems) for run in runs],
        "incomparable": hard,
        "differences": tables.difference_table(differences(records), names) if several else None,
        "scorecard": tables.scorecard_table(records, not hard) if several else None,
        "comparison": tables.comparison_table(records, with_ratios=not hard) if several else None,
        "quantities": [] if several else tables.quantity_tables(records[0]),
        "latency": tables.latency_table(records),
        "figures": drawn,
        **{name: make(Page(tuple(runs))) for name, make in sections.SECTIONS.items()},
    }


def title(records: Sequence[RunRecord]) -> str:
    """The workload and model, where the runs have them in common."""
    first = records[0]
    if len(records) > 1 and incomparable(records):
        return "Side by side"
    return f"{first.workload.get('name', 'a workload')} on {first.model.get('name', 'a model')}"


def subtitle(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    """What ran where, in one line."""
    dtypes = ", ".join(dict.fromkeys(str(record.model.get("dtype", "")) for record in records))
    if len(records) > 1:
        parts = [f"{len(records)} runs", f"reference: {names[0]}", dtypes]
    else:
        parts = [names[0], _device(records[0]), dtypes]
    return " · ".join(part for part in parts if part)


def _device(record: RunRecord) -> str:
    device = record.system.get("device")
    return str(device.get("name") or "") if isinstance(device, dict) else ""


def embedded_data(runs: Sequence[RunData], drawn: dict[str, Figure]) -> dict[str, Any]:
    """What the page draws from and what its download button saves."""
    records = [run.record for run in runs]
    return {
        "records": [json.loads(record.to_json()) for record in records],
        "labels": [run.style.label for run in runs],
        "figures": {each.id: {"data": each.data, "layout": each.layout} for each in drawn.values()},
        "csv": tables.to_csv(tables.full_table(records)),
    }


def script_json(data: Any) -> str:
    """JSON that may stand inside a <script> element: nothing in it can end the element or open a comment."""
    text = json.dumps(finite(data), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
