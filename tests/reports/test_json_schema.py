"""The published JSON Schema is the one that the code gives, and says of records what reading them says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from backbench.harness.cli import run_command
from backbench.reports.json_schema import json_schema
from backbench.reports.metrics.catalogue import METRICS
from backbench.reports.record import REQUEST_COLUMNS, RunDirectory
from backbench.reports.record.shape import KINDS, misshapen

ROOT = Path(__file__).parents[2]
OLD = Path(__file__).parent / "fixtures" / "schema-1"


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="comes with the test extra")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((OLD / "torch" / "run.json").read_text())
    return found


def test_the_published_schema_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["schema"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "run.schema.json").read_text(), (
        "run: bench schema > docs/run.schema.json"
    )


def test_it_names_every_metric_and_every_column() -> None:
    schema = json_schema()
    for metric in METRICS:
        place = schema["properties"][metric.path[0]]
        for key in metric.path[1:]:
            place = place["properties"][key]
        assert place["description"] == metric.definition
    assert list(schema["$defs"]["requests.parquet"]["properties"]) == list(REQUEST_COLUMNS)


@pytest.mark.parametrize("run", ["torch", "sdpa"])
def test_stored_records_fit(validator: Any, run: str) -> None:
    validator.validate(json.loads((OLD / run / "run.json").read_text()))


def test_fresh_records_fit(validator: Any, cpu_run: RunDirectory, gpu_runs: list[RunDirectory]) -> None:
    for directory in (cpu_run, *gpu_runs):
        validator.validate(json.loads(directory.read_record().to_json()))


@pytest.mark.slow
def test_the_record_of_a_run_fits(validator: Any, tmp_path: Path) -> None:
    options = "--workload synthetic --backend torch --num-requests 4 --no-report --quiet --out"
    assert run_command(["run", *options.split(), str(tmp_path / "run")]) == 0
    validator.validate(json.loads((tmp_path / "run" / "run.json").read_text()))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metrics.ttft_s.p50.value", "fast"),
        ("metrics.ttft_s", "fast"),
        ("metrics.counts", [1]),
        ("metrics.counts.failed", "none"),
        ("system.device", "x"),
        ("backend.used", [1]),
        ("backend.tuned", ["x"]),
        ("backend.passed_over", "x"),
        ("metrics.context.peaks", None),
        ("metrics.context.slo_s", [1]),
        ("metrics.context.end_ns", "late"),
        ("memory.total_bytes", "all"),
        ("roofline.decode_fit", 3),
        ("run.command", {"a": 1}),
        ("run.status", "done"),
        ("validity", [1]),
        ("energy.reasons", "none"),
        ("correctness.passed", "yes"),
        ("accuracy.perplexity.value", "low"),
        ("accuracy.sequences.kl_divergence", 3),
        ("accuracy.sequences.kl_divergence", ["low"]),
        ("metrics.ttft_s.p50.low", True),
        ("metrics.ttft_s.p50.unsupported", 3),
        ("schema_version", 99),
        ("metrics.made_up.deep.latency_s", "long"),
    ],
)
def test_what_is_refused_when_read_does_not_fit(validator: Any, path: str, value: Any) -> None:
    data = record()
    *parents, leaf = path.split(".")
    place = data
    for key in parents:
        place = place.setdefault(key, {})
    place[leaf] = value
    assert not validator.is_valid(data)
    if path not in ("schema_version", "run.status"):
        assert misshapen(copy.deepcopy(data)) is not None


def test_a_section_must_be_there(validator: Any) -> None:
    data = record()
    del data["metrics"]
    assert not validator.is_valid(data)


def test_every_kind_is_in_the_schema() -> None:
    """A field that `shape` checks is typed here: what has a type there has one here."""
    for path in KINDS:
        place = json_schema()["properties"][path.split(".")[0]]
        for key in path.split(".")[1:]:
            within = {"*": "additionalProperties", "[]": "items"}.get(key)
            place = place["properties"][key] if within is None else place[within]
        assert "type" in place or "enum" in place, path
