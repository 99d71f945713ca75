"""The report: one self-contained HTML file for one run or several, the same bytes for the same records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbench.errors import ReportError
from backbench.reports import tables
from backbench.reports.arms import Arm, arm_differences, arms_incomparable, open_arms
from backbench.reports.metrics import latency
from backbench.reports.metrics.requests import Context
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.series import panels
from backbench.reports.page import answer, figures, sections
from backbench.reports.page.figures import Figure
from backbench.reports.page.run_data import Page, RunData
from backbench.reports.page.style import run_styles
from backbench.reports.record import RunDirectory, RunRecord, digest_problems, finite
from backbench.reports.record.experiment import is_experiment, read_experiment

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
    paths = [Path(path) for path in run_dirs]
    text = render_report(
        [
            RunDirectory(read_experiment(path).path) if is_experiment(path) else RunDirectory.open(path)
            for path in paths
        ]
    )
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
    """The page as text; a directory may be an experiment's."""
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
    """One entry an arm: the records and tables of the run that stands for it."""
    arms = open_arms([directory.path for directory in directories])
    shown = [arm.representative for arm in arms]
    styles = run_styles([run.record for run in shown], [arm.label for arm in arms])
    runs = []
    for arm, run, style in zip(arms, shown, styles, strict=True):
        directory, record = run.directory, run.record
        assert directory is not None
        context = Context.from_dict(record.metrics.get("context") or {})
        tables = RunTables.read(
            directory.read_requests(), directory.read_steps(), context, directory.read_telemetry()
        )
        problems = [
            problem if len(arm.runs) == 1 else f"{each.directory.path.name}: {problem}"
            for each in arm.runs
            if each.directory is not None
            for problem in digest_problems(each.directory, each.record)
        ]
        runs.append(RunData(record, style, tables, tuple(problems), arm))
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
    arms = [run.sample for run in runs]
    hard = arms_incomparable(arms)
    several = len(runs) > 1
    return {
        "runs": runs,
        "several": several,
        "title": title(records),
        "subtitle": subtitle(arms),
        "sentences": answer.sentences(arms),
        "tiles": [] if several else answer.tiles(arms[0]),
        "chips": [answer.arm_chips(run.sample, run.problems) for run in runs],
        "fine": answer.fine_print(arms),
        "repeated": any(len(arm.runs) > 1 for arm in arms),
        "repeats": tables.repeats_table(arms),
        "interval_note": tables.interval_note(arms),
        "incomparable": hard,
        "differences": tables.difference_table(arm_differences(arms), names) if several else None,
        "scorecard": tables.scorecard_table(arms, not hard) if several else None,
        "quantized": tables.quantization_table(arms),
        "comparison": tables.comparison_table(arms, with_ratios=not hard) if several else None,
        "quantities": [] if several else tables.quantity_tables(records[0]),
        "latency": tables.latency_table(records, names),
        "figures": drawn,
        **{name: make(Page(tuple(runs))) for name, make in sections.SECTIONS.items()},
    }


def title(records: Sequence[RunRecord]) -> str:
    """The workload and model, where the runs have them in common."""
    first = records[0]
    if len({(each.workload.get("name"), each.model.get("name")) for each in records}) > 1:
        return "Side by side"
    return f"{first.workload.get('name', 'a workload')} on {first.model.get('name', 'a model')}"


def subtitle(arms: Sequence[Arm]) -> str:
    """What ran where, in one line."""
    records, names = [arm.representative.record for arm in arms], [arm.label for arm in arms]
    repeated = any(len(arm.runs) > 1 for arm in arms)
    dtypes = ", ".join(dict.fromkeys(str(record.model.get("dtype", "")) for record in records))
    if len(records) > 1:
        parts = [
            f"{len(records)} arms" if repeated else f"{len(records)} runs",
            f"reference: {names[0]}",
            dtypes,
        ]
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
        "csv": tables.to_csv(tables.full_table([run.sample for run in runs])),
    }


def script_json(data: Any) -> str:
    """JSON that may stand inside a <script> element: nothing in it can end the element or open a comment."""
    text = json.dumps(finite(data), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
