"""The report: one self-contained HTML page for one run or several, the same bytes for the same records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from backbench.reports import tables
from backbench.reports.arms import Arm, Run, arm_differences, arms_incomparable, compared_in, open_arms
from backbench.reports.metrics import latency
from backbench.reports.metrics.requests import Context
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.series import panels
from backbench.reports.page import answer, figures, overview, sections
from backbench.reports.page.figure import Figure, shape_definitions
from backbench.reports.page.run_data import Page, RunData, labels_of
from backbench.reports.page.style import run_styles
from backbench.reports.quantities import QUANTITIES
from backbench.reports.record import RunDirectory, RunRecord, digest_problems, finite

TEMPLATES = Path(__file__).parent / "templates"
LONGEST_LABEL = 80
"""Characters of a run's name on the page; its provenance has the whole text."""
SIDE_BY_SIDE = 6
"""Runs that fit beside each other as columns; more stand below each other."""

GateRows = Sequence[Mapping[str, Any]]
"""One a gate and metric, oldest first: utc, gate, verdict, metric, loss, low, high, margin, detectable."""


def render_report(directories: Sequence[RunDirectory], gates: GateRows = ()) -> str:
    """The page as text; a directory may be an experiment's."""
    return render(load_page([directory.path for directory in directories]), gates)


def render(page: Page, gates: GateRows = ()) -> str:
    """The page of runs that are at hand."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    css = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "chart.css"))
    drawn = draw(page, gates)
    return environment.get_template("report.html").render(
        **shown(page, drawn, gates),
        css=Markup(css),
        js=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        definitions=Markup(shape_definitions() + "".join(each.defs for each in drawn)),
        payload=Markup(script_json(embedded_data(page))),
    )


def load_page(paths: Sequence[Path]) -> Page:
    """The runs and experiments at `paths`: one entry an arm, with the run that stands for it."""
    arms = _named(open_arms(paths))
    styles = run_styles([arm.representative.record for arm in arms], [arm.label for arm in arms])
    runs = [
        RunData(arm.representative.record, style, partial(_read, arm.representative), _problems(arm), arm)
        for arm, style in zip(arms, styles, strict=True)
    ]
    return Page(tuple(runs), tuple(overview.chosen(runs, not arms_incomparable(arms))))


def _named(arms: Sequence[Arm]) -> list[Arm]:
    """Labels of a length that a page can show, still distinct; of several devices with the device's name."""
    devices = [sections.device(arm.representative.record) for arm in arms]
    apart = len(set(devices)) > 1
    full = [
        f"{arm.label} · {device}" if apart and device not in arm.label else arm.label
        for arm, device in zip(arms, devices, strict=True)
    ]
    names = [name if len(name) <= LONGEST_LABEL else f"{name[:LONGEST_LABEL]}…" for name in full]
    return [
        replace(arm, label=name if names.count(name) == 1 else f"{name} #{names[:place].count(name) + 1}")
        for place, (arm, name) in enumerate(zip(arms, names, strict=True))
    ]


def _read(run: Run) -> RunTables:
    assert run.directory is not None
    context = Context.from_dict(run.record.metrics.get("context") or {})
    directory = run.directory
    return RunTables.read(
        directory.read_requests(), directory.read_steps(), context, directory.read_telemetry()
    )


def _problems(arm: Arm) -> tuple[str, ...]:
    return tuple(
        problem if len(arm.runs) == 1 else f"{each.directory.path.name}: {problem}"
        for each in arm.runs
        if each.directory is not None
        for problem in digest_problems(each.directory, each.record)
    )


def draw(page: Page, gates: GateRows = ()) -> list[Figure]:
    """Every figure that there is data for, in the page's order."""
    runs = page.drawn
    read = [run.tables for run in runs]
    found: list[Figure | None] = []
    if len(page.runs) > 2 and not arms_incomparable(page.arms):
        found.append(overview.ranking_figure(page.runs))
    if len(page.runs) > 1:
        found += overview.front_figures(page.runs)
    ttft, itl = [latency.ttft(each) for each in read], [latency.itl(each) for each in read]
    found += [
        figures.ecdf_figure("ttft", "Time to first token", "TTFT", "requests", runs, ttft),
        figures.ecdf_figure("itl", "Inter-token latency", "ITL", "tokens", runs, itl),
        *figures.over_time_figures(runs, panels(read)),
        figures.decode_figure(runs),
        overview.gate_figure(gates, runs[0].style),
    ]
    return [each for each in found if each is not None]


def shown(page: Page, drawn: Sequence[Figure], gates: GateRows = ()) -> dict[str, Any]:
    """What the template shows."""
    arms, names = page.arms, page.names
    hard = arms_incomparable(arms)
    several, many = len(page.runs) > 1, len(page.runs) > SIDE_BY_SIDE
    telling, rest = sections.telling(arm_differences(arms) if several else [])
    turned = sections.turned if many else lambda table: table
    few = page.drawn if many else page.runs
    return {
        "runs": page.runs,
        "drawn": page.drawn,
        "few": few,
        "several": several,
        "many": many,
        "title": title(page.records),
        "subtitle": subtitle(arms),
        "synthetic": [run.style.label for run in page.runs if run.record.run.get("synthetic")],
        "sentences": answer.sentences(arms, SIDE_BY_SIDE),
        "advice": answer.advice(arms),
        "tiles": [] if several else answer.tiles(arms[0]),
        "chips": [answer.arm_chips(run.sample, run.problems) for run in page.runs],
        "all_chips": answer.all_chips(page.runs),
        "fine": answer.fine_print(arms),
        "repeated": any(len(arm.runs) > 1 for arm in arms),
        "repeats": tables.repeats_table(arms),
        "interval_note": tables.interval_note(arms),
        "incomparable": [] if answer.search_of(arms) else hard,
        "differences": turned(tables.difference_table(telling, names)),
        "other_differences": replace(
            turned(tables.difference_table(rest, names)), title="Hashes, stamps and durations that differ"
        ),
        "scorecard": tables.scorecard_table(arms, not hard) if several else None,
        "quantized": tables.quantization_table(arms),
        "comparison": tables.comparison_table(arms, with_ratios=not hard) if several and not many else None,
        "quantities": [] if several else tables.quantity_tables(page.records[0]),
        "latency": tables.latency_table([run.record for run in few], labels_of(few)),
        "figures": drawn,
        "gates": sections.gate_table(gates),
        "glossary": sections.glossary(compared_in(arms)),
        "meanings": {each.label: each.definition for each in QUANTITIES if each.definition},
        **{name: make(page) for name, make in sections.SECTIONS.items()},
    }


def title(records: Sequence[RunRecord]) -> str:
    """The workload and model, where the runs have them in common."""
    first = records[0]
    if len({(str(each.workload.get("name")), str(each.model.get("name"))) for each in records}) > 1:
        return "Side by side"
    workload, model = (
        str(name)[:LONGEST_LABEL]
        for name in (first.workload.get("name", "a workload"), first.model.get("name", "a model"))
    )
    return f"{workload} on {model}"


def subtitle(arms: Sequence[Arm]) -> str:
    """What ran where, in one line."""
    records, names = [arm.representative.record for arm in arms], [arm.label for arm in arms]
    repeated = any(len(arm.runs) > 1 for arm in arms)
    dtypes = ", ".join(dict.fromkeys(str(record.model.get("dtype", "")) for record in records))
    devices = list(dict.fromkeys(filter(None, map(sections.device, records))))
    where = ", ".join(devices) if len(devices) <= 3 else f"{len(devices)} kinds of device"
    if len(records) > 1:
        counted = f"{len(records)} {'arms' if repeated else 'runs'}"
        parts = [counted, f"reference: {names[0]}", where, dtypes]
    else:
        parts = [names[0], where, dtypes]
    return " · ".join(part for part in parts if part)


def embedded_data(page: Page) -> dict[str, Any]:
    """What the page's download buttons save."""
    return {
        "records": [json.loads(record.to_json()) for record in page.records],
        "labels": page.names,
        "csv": tables.to_csv(tables.full_table(page.arms)),
    }


def script_json(data: Any) -> str:
    """JSON that may stand inside a <script> element: nothing in it can end the element or open a comment."""
    text = json.dumps(finite(data), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
