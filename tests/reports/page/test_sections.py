"""Memory bars add up, floors stand beside the fit, and the answer says what the record says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from backbench.reports.arms import arm_of
from backbench.reports.compare import Difference
from backbench.reports.page.answer import advice, all_chips, chips, sentences, tiles
from backbench.reports.page.html import load_page
from backbench.reports.page.sections import (
    correctness_table,
    fit_table,
    memory_bars,
    operation_table,
    portability_table,
    provenance,
    schedule_notes,
    telling,
    time_table,
    turned,
)
from backbench.reports.quantities import format_value
from backbench.reports.record import RunDirectory, RunRecord
from backbench.reports.tables import difference_table

GIB = 2**30


def with_memory(vendor: str, **memory: object) -> RunRecord:
    return RunRecord(
        run={"status": "complete"}, system={"device": {"vendor": vendor, "name": "x"}}, memory=dict(memory)
    )


def text(words: list[list[object]]) -> str:
    return " ".join("".join(each.text for each in sentence) for sentence in words)  # type: ignore[attr-defined]


def test_memory_bars_fill_the_card() -> None:
    memory = {"weights_bytes": 10 * GIB, "kv_pool_bytes": 60 * GIB, "kv_used_peak_bytes": 20 * GIB}
    record = with_memory(
        "nvidia", **memory, other_bytes=10 * GIB, total_bytes=80 * GIB, capacity_bytes=100 * GIB
    )
    (bar,) = memory_bars([record], ["a"])
    shares = {segment.kind: segment.percent for segment in bar.segments}
    assert shares == {"weights": 10, "kv-used": 20, "kv-free": 40, "other": 10, "free": 20}
    assert "100 GiB, the device's capacity" in bar.scale


def test_memory_bars_of_two_cards_have_one_scale() -> None:
    records = [
        with_memory("nvidia", weights_bytes=GIB, kv_pool_bytes=GIB, other_bytes=0, capacity_bytes=each * GIB)
        for each in (100, 200)
    ]
    small, large = memory_bars(records, ["a", "b"])
    assert sum(segment.percent for segment in small.segments) == pytest.approx(50)
    assert sum(segment.percent for segment in large.segments) == pytest.approx(100)


def test_a_cpus_memory_is_shown_without_its_capacity() -> None:
    record = with_memory("cpu", weights_bytes=GIB, total_bytes=4 * GIB, capacity_bytes=64 * GIB)
    (bar,) = memory_bars([record], ["a"])
    assert [(segment.kind, segment.percent) for segment in bar.segments] == [("weights", 25), ("other", 75)]


def test_no_memory_no_bar() -> None:
    assert memory_bars([with_memory("cpu")], ["a"]) == []


def test_step_time_shares_add_up(gpu_runs: list[RunDirectory]) -> None:
    for row in time_table(load_page([run.path for run in gpu_runs]).runs).rows:
        shares = [float(str(cell).rstrip("%")) for cell in row[2:5]]
        assert sum(shares) == pytest.approx(100, abs=0.2)  # three shares, each shown to three digits


def test_the_floor_stands_beside_the_fit(cpu_run: RunDirectory) -> None:
    table = fit_table([cpu_run.read_record()], ["torch"])
    rows = {row[0]: row[1:] for row in table.texts()}
    # The intercept holds the host too, so no ratio stands beside it.
    assert rows["Intercept: weights and host"] == ("9.00 ms", "4.95 ms", "—")
    assert rows["Slope: KV read, per context token"] == ("300 ns", "210 ns", "1.43×")


def test_an_unknown_floor_is_a_dash(cpu_run: RunDirectory) -> None:
    fit = {"intercept_s": 1.0, "slope_s_per_token": 1e-6, "intercept_floor_s": None}
    record = replace(cpu_run.read_record(), roofline={"decode_fit": fit})
    assert fit_table([record], ["torch"]).texts()[0][2:] == ("—", "—")


def test_operations_name_what_ran(gpu_runs: list[RunDirectory]) -> None:
    records = [run.read_record() for run in gpu_runs[:2]]
    rows = operation_table(records, ["a", "b"]).texts()
    assert ("attention", "torch", "triton (tuned)") in rows
    assert ("linear", "torch", "torch (untuned: 2 of 6 shapes, no entry for sm90-132)") in rows
    assert ("norm", "torch", "torch") in rows


def test_portability_says_what_only_compiled(gpu_runs: list[RunDirectory], cpu_run: RunDirectory) -> None:
    table = portability_table([run.read_record() for run in gpu_runs])
    states = {row[0].value: row[1].value for row in table.rows}
    assert states == {"sm90": "ran here", "gfx942": "compiled, not run"}
    assert not portability_table([cpu_run.read_record()]).rows


def test_correctness_says_failed_and_unchecked(cpu_run: RunDirectory) -> None:
    record = cpu_run.read_record()
    failed = replace(record, correctness=record.correctness | {"passed": False})
    unchecked = replace(record, correctness={"passed": None})
    rows = correctness_table([record, failed, unchecked], ["a", "b", "c"]).texts()
    assert [row[1] for row in rows] == ["passed", "failed", "not checked"]
    assert [chips(each)[1].kind for each in (record, failed, unchecked)] == ["good", "bad", "warn"]


def test_one_runs_answer_has_its_numbers(cpu_run: RunDirectory) -> None:
    record = cpu_run.read_record()
    answer = text(sentences([arm_of(record, "torch")]))
    assert "output tok/s in steady state" in answer
    for name in ("ttft_s", "tpot_s"):
        assert format_value(record.metrics[name]["p50"]["value"], "s") in answer
    assert [tile.label for tile in tiles(arm_of(record, "torch"))][:3] == [
        "Output throughput",
        "TTFT, median",
        "TPOT, median",
    ]


def test_without_a_steady_state_the_answer_says_whole_run(cpu_run: RunDirectory) -> None:
    record = cpu_run.read_record()
    rates = {"whole_run": 100.0, "steady_state": None}
    answer = text(
        sentences([arm_of(replace(record, metrics=record.metrics | {"output_tokens_per_s": rates}), "torch")])
    )
    assert "100 output tok/s over the whole run" in answer


def test_an_empty_run_still_has_an_answer(cpu_run: RunDirectory) -> None:
    answer = text(sentences([arm_of(replace(cpu_run.read_record(), metrics={}), "torch")]))
    assert "without a measured output rate" in answer


def test_several_runs_answer_with_ratios_to_the_first(gpu_runs: list[RunDirectory]) -> None:
    records = [run.read_record() for run in gpu_runs]
    found = sentences([arm_of(record, name) for record, name in zip(records, "abc", strict=True)])
    assert len(found) == 3
    assert text(found[:1]) == "One run each: no verdict."
    arms = [arm_of(record, name) for record, name in zip(records, "abc", strict=True)]
    assert (advice(arms) or "").startswith("bench run ")
    assert advice(arms[:1]) is None
    assert len(sentences(arms, most=2)) == 1
    rates = [each.metrics["output_tokens_per_s"]["steady_state"] for each in records]
    assert f"{rates[1] / rates[0]:.2f}"[:3] in text(found[1:2])


def test_incomparable_runs_get_no_ratio(cpu_run: RunDirectory, gpu_runs: list[RunDirectory]) -> None:
    other = cpu_run.read_record()
    other = replace(other, model=other.model | {"name": "another"})
    answer = text(sentences([arm_of(gpu_runs[0].read_record(), "a"), arm_of(other, "b")]))
    assert "do not compare" in answer
    assert "×" not in answer


def test_doubts_and_interruptions_are_chips(cpu_run: RunDirectory) -> None:
    record = replace(cpu_run.read_record(), validity=["throttled", "client saturated"])
    record = replace(record, run=record.run | {"status": "interrupted"})
    assert {"Doubtful: 2 reasons", "Interrupted"} <= {chip.text for chip in chips(record)}


def test_many_runs_are_counted(gpu_runs: list[RunDirectory]) -> None:
    runs = load_page([run.path for run in gpu_runs]).runs
    assert [chip.text for chip in all_chips(runs)] == ["All 3 runs valid and correct"]
    doubtful = replace(runs[0], record=replace(runs[0].record, validity=["throttled"]), arm=None)
    assert [(chip.kind, chip.text) for chip in all_chips([doubtful, *runs[1:]])] == [
        ("bad", "1 of 3 runs doubtful")
    ]


def test_differences_that_tell_nothing_stand_apart() -> None:
    names = [
        "backend.asked",
        "software.git_sha",
        "warmup.seconds",
        "run.command",
        "backend.kernel_source_hash.attention",
    ]
    names += ["engine.max_seqs", "run.seed"]
    told, rest = telling([Difference(name, (1, 2)) for name in names])
    assert [each.field for each in told] == ["backend.asked", "engine.max_seqs", "run.seed"]
    assert len(rest) == 4


def test_many_runs_stand_below_each_other() -> None:
    table = difference_table([Difference("a", (1, 2)), Difference("b", (3, 4))], ["x", "y"])
    assert turned(table).columns == ("Run", "a", "b")
    assert turned(table).texts() == [("x", "1", "3"), ("y", "2", "4")]


def test_clipping_is_said(cpu_run: RunDirectory) -> None:
    record = cpu_run.read_record()
    clip = {"kind": "clip", "requests": 3, "max_len": 4096, "input_tokens": 10, "output_tokens": 0}
    parameters = record.workload["parameters"] | {"transformations": [clip]}
    notes = schedule_notes(replace(record, workload=record.workload | {"parameters": parameters}))
    assert "3 of 120 requests shortened to 4,096 tokens" in notes[0]


def test_a_machine_that_was_shared_is_a_chip_with_the_figure(cpu_run: RunDirectory) -> None:
    reason = "other processes took 48.0% of the 2 usable CPUs (limit 10%)"
    record = replace(cpu_run.read_record(), validity=[f"disturbed: {reason}"])
    assert f"Disturbed: {reason}" in {chip.text for chip in chips(record)}
    assert not any(chip.text.startswith("Disturbed") for chip in chips(cpu_run.read_record()))


def test_provenance_holds_command_seed_and_hashes(cpu_run: RunDirectory) -> None:
    record = cpu_run.read_record()
    fields = {f"{section}.{name}": value for section, rows in provenance(record) for name, value in rows}
    assert fields["Run.command"] == record.run["command"]
    assert fields["Run.seed"] == "0"
    assert fields["Workload.content_hash"] == record.workload["content_hash"]
    assert fields["Software.git_sha"] == "abcdef0"


def test_schedule_notes_name_trouble(cpu_run: RunDirectory) -> None:
    record = cpu_run.read_record()
    record = replace(record, schedule=record.schedule | {"client_saturated": True})
    counts = record.metrics["counts"] | {"failed": 3, "never_sent": 2}
    notes = " ".join(schedule_notes(replace(record, metrics=record.metrics | {"counts": counts})))
    assert "saturated" in notes
    assert "3 requests failed" in notes
    assert "2 requests never sent" in notes
