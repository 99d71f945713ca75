"""A metric is added in one file and a report section in two: a copy of the room is edited and used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLD = Path(__file__).parent / "fixtures" / "schema-1" / "torch"

METRIC = """

METRICS = (
    *METRICS,
    Metric(
        ("metrics", "first_answer_s"),
        "First answer of all",
        "s",
        False,
        "From the run's start to the first token of any measured request.",
        lambda run: float(run.rows.first_ns.min()) / 1e9,
        "Throughput",
        parts=(Part(summary=True),),
    ),
)
"""

USE_OF_METRIC = """
import sys
from dataclasses import replace
from backbench.reports.arms import arms_of
from backbench.reports.ratios import ratio_table
from backbench.reports.metrics.compute import sections
from backbench.reports.metrics.requests import Context
from backbench.reports.metrics.run import RunTables
from backbench.reports.page.html import render_report
from backbench.reports.record import RunDirectory, sign
from backbench.reports.tables import summary_table
from backbench.reports.verify import verify

directory = RunDirectory.open(sys.argv[1])
record = directory.read_record()
context = Context.from_dict(record.metrics["context"])
run = RunTables.read(
    directory.read_requests(), directory.read_steps(), context, directory.read_telemetry(),
    {"energy": record.energy},
)
record = replace(record, **sections(run, ("metrics", "schedule", "roofline", "energy")))
assert abs(record.metrics["first_answer_s"] - 0.04672) < 1e-6, record.metrics["first_answer_s"]
directory.write_record(sign(directory, record))
assert verify(directory) == [], verify(directory)
assert any("First answer of all" in row for row in summary_table(record).texts())
assert "First answer of all" in set(ratio_table(arms_of([record, record]))["metric"])
assert "First answer of all" in render_report([directory])
metrics = record.metrics | {"first_answer_s": 0.001}
directory.write_record(sign(directory, replace(record, metrics=metrics)))
assert [each.split(" is ")[0] for each in verify(directory)] == ["metrics.first_answer_s"]
"""

SECTION = """

SECTIONS["longest"] = lambda page: [int(run.tables.rows.output_tokens.max()) for run in page.runs]
"""

USE_OF_SECTION = """
import sys
from backbench.reports.page.html import render_report
from backbench.reports.record import RunDirectory
assert "<p>Longest answer: 984 tokens</p>" in render_report([RunDirectory.open(sys.argv[1])])
"""


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A copy of the package with reports alone."""
    package = tmp_path / "tree" / "backbench"
    package.mkdir(parents=True)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "backbench" / name, package / name)
    shutil.copytree(ROOT / "reports", package / "reports", ignore=shutil.ignore_patterns("__pycache__"))
    return package / "reports"


def use(room: Path, program: str, tmp_path: Path) -> None:
    run = shutil.copytree(OLD, tmp_path / "run")
    environment = os.environ | {"PYTHONPATH": str(room.parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(run)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_metric_is_one_file(room: Path, tmp_path: Path) -> None:
    """It is computed, in the record, in the summary, in the comparison, on the page, and verified."""
    file = room / "metrics" / "throughput.py"
    file.write_text(file.read_text() + METRIC)
    use(room, USE_OF_METRIC, tmp_path)


def test_a_report_section_is_two_files(room: Path, tmp_path: Path) -> None:
    sections, page = room / "page" / "sections.py", room / "page" / "templates" / "report.html"
    sections.write_text(sections.read_text() + SECTION)
    text = page.read_text()
    assert "</main>" in text
    page.write_text(
        text.replace(
            "</main>", "{% for each in longest %}<p>Longest answer: {{ each }} tokens</p>{% endfor %}</main>"
        )
    )
    use(room, USE_OF_SECTION, tmp_path)
