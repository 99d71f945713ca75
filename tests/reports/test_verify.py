"""`verify` accepts what a run wrote and catches what was changed since."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from backbench.harness.frames import request_frame, telemetry_frame
from backbench.harness.replay import replay
from backbench.reports.metrics import validity
from backbench.reports.metrics.compute import sections
from backbench.reports.metrics.run import RunTables
from backbench.reports.record import REQUESTS_FILE, STEPS_FILE, RunDirectory, RunRecord, sign
from backbench.reports.verify import differences, examine, verify


@pytest.fixture
def directory(
    tmp_path: Path, make_target: Any, make_workload: Any, make_context: Any, make_steps: Any, clock: Any
) -> RunDirectory:
    """A run of eight requests, one of them failed, with steps and power samples, signed and written."""
    script: dict[int, Any] = {i: [(10 + i, 1), (20 + i, 1), (40 + i, 1)] for i in range(7)} | {
        7: [("error", 5)]
    }
    done = replay(make_target(script), make_workload([3] * 8, concurrency=2), clock=clock)
    requests = request_frame(done)
    steps = make_steps(
        *(
            {
                "start_ns": i * 10**6,
                "end_ns": (i + 1) * 10**6 + i * 1000,
                "num_decodes": 2,
                "context_tokens": 10 * i,
            }
            for i in range(20)
        )
    )
    samples = [
        {"time_ns": done.start_ns + i * 10**7, "device": 0, "power_w": 300.0 + i, "energy_j": 3.0 * i}
        for i in range(-1, 40)
    ]
    telemetry = telemetry_frame(samples, done.start_ns)
    context = make_context(mode="closed", concurrency=2, gpus=1, slo_s={"ttft": 0.012})
    given = {"energy": {"sensor_reasons": ["a reason"]}}
    run = RunTables.read(requests, steps, context, telemetry, given)
    found = sections(run, ("metrics", "schedule", "roofline", "energy"))
    written = RunDirectory.create(tmp_path / "run")
    written.write_requests(requests)
    written.write_steps(steps)
    written.write_telemetry(telemetry)
    record = RunRecord(run={"status": "complete", "uuid": "1"}, **found)
    record = replace(record, validity=validity.of_record(record, telemetry))
    written.write_record(sign(written, record))
    return written


def edit(directory: RunDirectory, change: Any) -> None:
    """Change run.json as someone with a text editor would."""
    path = directory.path / "run.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_fresh_run_verifies(directory: RunDirectory) -> None:
    assert verify(directory) == []


def test_a_record_of_before_a_metric_was_added_still_verifies(directory: RunDirectory) -> None:
    record = directory.read_record()
    metrics = {key: each for key, each in record.metrics.items() if key != "fidelity"}
    metrics["absent"] = {
        key: why for key, why in record.metrics["absent"].items() if not key.startswith("fidelity.")
    }
    assert metrics["absent"] != record.metrics["absent"]
    directory.write_record(sign(directory, replace(record, metrics=metrics)))
    found = examine(directory)
    assert found.problems == ()
    assert any("of before they were added: metrics.fidelity." in each for each in found.unchecked)


def test_reformatting_changes_nothing(directory: RunDirectory) -> None:
    edit(directory, lambda data: None)
    assert verify(directory) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("metrics", "output_tokens_per_s", "whole_run"), 9999.0),
        (("metrics", "ttft_s", "p50", "value"), 0.001),
        (("metrics", "counts", "failed"), 0),
        (("schedule", "lag_s", "max"), 0.5),
        (("roofline", "decode_fit", "slope_s_per_token"), 1e-12),
        (("energy", "joules_per_output_token"), 0.5),
        (("metrics", "goodput_requests_per_s"), 99.0),
    ],
)
def test_an_edited_summary_is_named(directory: RunDirectory, path: tuple[str, ...], value: Any) -> None:
    def change(data: dict[str, Any]) -> None:
        *parents, leaf = path
        for key in parents:
            data = data[key]
        assert data[leaf] != value
        data[leaf] = value

    edit(directory, change)
    problems = verify(directory)
    assert any(problem.startswith(f"{'.'.join(path)} is {value!r}") for problem in problems), problems
    assert any("run.json was edited" in problem for problem in problems)


def test_an_edit_outside_the_metrics_is_caught(directory: RunDirectory) -> None:
    edit(directory, lambda data: data["system"].update(device={"name": "Faster"}))
    assert verify(directory) == ["run.json was edited after the run (its digest differs)"]


def test_an_edited_request_row_is_caught(directory: RunDirectory) -> None:
    requests = directory.read_requests()
    requests.loc[3, "first_ns"] -= 5_000_000
    directory.write_requests(requests)
    problems = verify(directory)
    assert any("requests.parquet is not the file" in problem for problem in problems)
    assert any(problem.startswith("metrics.ttft_s.mean is") for problem in problems)


def test_an_edited_row_that_moves_no_number_is_caught(directory: RunDirectory) -> None:
    requests = directory.read_requests()
    requests["session"] = "other"
    directory.write_requests(requests)
    assert len(verify(directory)) == 1


@pytest.mark.parametrize("name", [REQUESTS_FILE, STEPS_FILE])
def test_a_truncated_table_is_caught(directory: RunDirectory, name: str) -> None:
    path = directory.path / name
    path.write_bytes(path.read_bytes()[:-40])
    problems = verify(directory)
    assert any("truncated" in problem for problem in problems)


def test_a_missing_table_is_caught(directory: RunDirectory) -> None:
    (directory.path / STEPS_FILE).unlink()
    assert any("steps.parquet is missing" in problem for problem in verify(directory))


def test_a_status_that_hides_an_interruption_is_caught(directory: RunDirectory) -> None:
    edit(directory, lambda data: data["metrics"]["context"].update(interrupted=True))
    assert any("the replay was interrupted" in problem for problem in verify(directory))


def test_a_context_with_nonsense_is_a_finding_not_a_crash(directory: RunDirectory) -> None:
    edit(directory, lambda data: data["metrics"]["context"].update(concurrency="many"))
    assert any("cannot be recomputed" in problem for problem in verify(directory))
    edit(directory, lambda data: data["metrics"].pop("context"))
    assert any("not whole" in problem for problem in verify(directory))


def test_an_edited_validity_is_caught(directory: RunDirectory) -> None:
    edit(directory, lambda data: data.update(validity=[]))
    assert any(problem.startswith("validity is []") for problem in verify(directory))


def test_memory_follows_from_telemetry(directory: RunDirectory) -> None:
    """The fixture's samples say nothing of memory: only where they do is a peak checked."""
    telemetry = directory.read_telemetry()
    telemetry["memory_used_bytes"] = pd.array([900] * len(telemetry), dtype="Int64")
    directory.write_telemetry(telemetry)

    def stored(total: int) -> list[str]:
        parts = {"device_idle_bytes": 100, "weights_bytes": 300, "kv_pool_bytes": 200}
        sums = {"device_used_peak_minus_idle_bytes": 800, "total_bytes": total, "other_bytes": total - 500}
        edit(directory, lambda data: data.update(memory=parts | sums))
        return [problem for problem in verify(directory) if problem.startswith("memory")]

    assert stored(800) == []
    assert stored(700) == ["memory.total_bytes is 700, but the tables give 800"]


def test_correctness_totals_follow_from_kept_differences(directory: RunDirectory) -> None:
    section = {"passed": None, "max_abs_logprob_diff": 0.4, "mean_abs_logprob_diff": 0.2}
    edit(directory, lambda data: data.update(correctness=section | {"differences": [0.0, 0.2, 0.4]}))
    assert not [problem for problem in verify(directory) if "logprob" in problem]
    edit(directory, lambda data: data["correctness"].update(max_abs_logprob_diff=0.1))
    assert any(problem.startswith("correctness.max_abs") for problem in verify(directory))
    edit(directory, lambda data: data["correctness"].update(tolerance=0.05, passed=True))
    assert any("passed is True, but max_abs_logprob_diff is 0.1" in each for each in verify(directory))
    edit(directory, lambda data: data["correctness"].pop("differences"))
    assert any("correctness.max_abs_logprob_diff" in line for line in examine(directory).unchecked)


@pytest.mark.parametrize("column", ["output_tokens", "last_ns"])
def test_columns_that_contradict_the_chunks_are_caught(directory: RunDirectory, column: str) -> None:
    requests = directory.read_requests()
    requests.loc[2, column] += 1
    directory.write_requests(requests)
    assert any(f"{column} of request 2" in problem for problem in verify(directory))


def test_columns_of_another_type_are_caught(directory: RunDirectory) -> None:
    path = directory.path / STEPS_FILE
    table = pq.read_table(path)
    place = table.schema.get_field_index("num_seqs")
    table = table.set_column(place, "num_seqs", table["num_seqs"].cast(pa.float64()))
    pq.write_table(table, path)
    assert any("other types than its schema: num_seqs" in problem for problem in verify(directory))


def test_numbers_of_an_unknown_metric_schema_are_not_called_checked(directory: RunDirectory) -> None:
    edit(directory, lambda data: data["metrics"].update(schema=99))
    found = examine(directory)
    assert found.unchecked == ("every number: metric schema 99 is not known to this Backbench",)


def test_differences_names_every_leaf() -> None:
    stored = {"a": 1.0, "b": {"c": None, "d": [1, 2]}, "gone": 1}
    computed = {"a": 1.0 + 1e-13, "b": {"c": 0.0, "d": [1, 3]}, "new": 2}
    found = differences(stored, computed, "x")
    assert [line.split(" ")[0] for line in found] == ["x.b.c", "x.b.d[1]", "x.gone", "x.new"]


def test_a_record_signs_the_same_after_a_round_trip(directory: RunDirectory) -> None:
    record = directory.read_record()
    assert asdict(sign(directory, record)) == asdict(record)
