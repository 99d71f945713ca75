"""Tables say value, interval and reason; Markdown and CSV can be read back."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

from backbench.reports.arms import arms_of
from backbench.reports.compare import differences
from backbench.reports.quantities import QUANTITIES
from backbench.reports.record import RunDirectory
from backbench.reports.tables import (
    Cell,
    Table,
    clipping,
    comparison_table,
    difference_table,
    faster_up_to,
    full_table,
    latency_table,
    quantity_tables,
    quantization_table,
    scorecard_table,
    summary_rows,
    summary_table,
    to_csv,
    to_markdown,
)


def test_summary_has_values_intervals_and_reasons(cpu_run: RunDirectory) -> None:
    lines = {line.label: line for line in summary_rows(cpu_run.read_record())}
    assert lines["TTFT p50"].value.endswith(" ms")
    assert "–" in lines["TTFT p50"].interval
    assert lines["TTFT p99"].value == "—"
    assert "sample size" in lines["TTFT p99"].note
    assert "Energy per output token" not in lines


def test_a_gpu_summary_has_energy(gpu_runs: list[RunDirectory]) -> None:
    lines = {line.label: line.value for line in summary_rows(gpu_runs[0].read_record())}
    assert lines["Energy per output token"] == "210 mJ/token"


def test_schemes_have_a_table_of_what_they_are_worth(gpu_runs: list[RunDirectory]) -> None:
    records = [run.read_record() for run in gpu_runs[:2]]
    assert quantization_table(arms_of(records)) is None
    quantized = replace(records[1], model=records[1].model | {"quantization": "int4-g128"})
    table = quantization_table(arms_of([records[0], quantized]))
    assert table is not None
    assert [row[1].value for row in table.rows] == ["—", "int4-g128"]
    for column in ("Weights", "Decode step, intercept", "TPOT p50", "Memory bandwidth used (MBU)"):
        assert column in table.columns
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert "Faster up to" not in table.columns
    linears = {"qkv": {"scheme": "int4-g128", "faster_than_dense_up_to_rows": 128, "served_beyond": None}}
    timed = replace(quantized, backend=quantized.backend | {"linears": linears})
    table = quantization_table(arms_of([records[0], timed]))
    assert table is not None and table.columns[2] == "Faster up to"
    assert [row[2].value for row in table.rows] == ["—", "128 rows"]
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_up_to_how_many_rows_quantized_products_are_faster(gpu_runs: list[RunDirectory]) -> None:
    record = gpu_runs[0].read_record()

    def said(**rows: int | None) -> tuple[str, str]:
        linears = {
            role: {
                "scheme": "int8",
                "faster_than_dense_up_to_rows": up_to,
                "served_beyond": None if up_to == 128 else "dequantized",
            }
            for role, up_to in rows.items()
        }
        dense = {"head": {"scheme": "none", "faster_than_dense_up_to_rows": None}}
        cell = faster_up_to(replace(record, backend=record.backend | {"linears": linears | dense}))
        return cell.value, cell.note

    assert said(qkv=64, down=128) == said(down=128, qkv=64) == ("64 rows", "qkv; then dequantized")
    assert said(qkv=0, down=64) == ("0 rows", "qkv; then dequantized")
    assert said(qkv=128) == ("128 rows", "qkv; then not measured")
    assert said(qkv=64, down=None) == ("not measured", "down")
    assert said(qkv=None, down=None) == ("not measured", "")
    assert said()[0] == faster_up_to(replace(record, backend={})).value == "—"


def test_all_rows_are_as_wide_as_the_header(gpu_runs: list[RunDirectory]) -> None:
    records = [run.read_record() for run in gpu_runs]
    tables = [
        summary_table(records[0]),
        latency_table(records[:1]),
        latency_table(records),
        scorecard_table(arms_of(records)),
        scorecard_table(arms_of(records), with_ratios=False),
        comparison_table(arms_of(records)),
        comparison_table(arms_of(records), headline_only=True, with_ratios=False),
        difference_table(differences(records), ["a", "b", "c"]),
        full_table(arms_of(records)),
        *quantity_tables(records[0]),
    ]
    for table in tables:
        assert table.rows, table.title
        assert {len(row) for row in table.rows} == {len(table.columns)}, table.title


def test_the_first_run_has_no_ratio(gpu_runs: list[RunDirectory]) -> None:
    table = scorecard_table(arms_of([run.read_record() for run in gpu_runs]))
    assert not any(cell.ratio for cell in table.rows[0])
    assert all(cell.ratio for cell in table.rows[1][1:])
    without = scorecard_table(arms_of([run.read_record() for run in gpu_runs]), with_ratios=False)
    assert not any(cell.ratio for row in without.rows for cell in row)


def test_markdown_escapes_what_would_break_a_row() -> None:
    text = to_markdown(Table("T", ("a|b", "c"), ((Cell("x\ny"), Cell("p|q")),)))
    assert text == "### T\n\n| a\\|b | c |\n| --- | ---: |\n| x y | p\\|q |\n"
    text = to_markdown(Table("<b>", ("</script>", "&lt;"), ((Cell("<img src=x>"), Cell("1")),)))
    assert "<" not in text and "&amp;lt;" in text


def test_csv_keeps_every_digit(cpu_run: RunDirectory) -> None:
    record = cpu_run.read_record()
    rows = list(csv.DictReader(io.StringIO(to_csv(full_table(arms_of([record]))))))
    assert len(rows) == len(QUANTITIES)
    found = next(row for row in rows if row["quantity"] == "metrics.tpot_s.p50")
    assert float(found["value"]) == record.metrics["tpot_s"]["p50"]["value"]
    assert float(found["high"]) == record.metrics["tpot_s"]["p50"]["high"]
    missing = next(row for row in rows if row["quantity"] == "energy.joules_per_output_token")
    assert (missing["value"], missing["reason"]) == ("", "not measured")


def test_a_rate_names_its_stretch_and_a_missing_steady_state_its_reason(cpu_run: RunDirectory) -> None:
    record = cpu_run.read_record()
    steady = {"start_s": 1.25, "end_s": 4.0, "duration_s": 2.75, "requests": 37}
    record = replace(record, metrics=record.metrics | {"steady_state": steady})
    lines = {line.label: line for line in summary_rows(record)}
    assert lines["Output tok/s, steady state"].note == "from 1.25 to 4.00 s, 37 requests"
    rates = {"whole_run": 100.0, "steady_state": None}
    metrics = record.metrics | {"output_tokens_per_s": rates, "steady_state": dict.fromkeys(steady)}
    metrics["absent"] = {"output_tokens_per_s.steady_state": "only 4 requests finished"}
    lines = {line.label: line for line in summary_rows(replace(record, metrics=metrics))}
    assert lines["Output tok/s, steady state"].note == "only 4 requests finished"


def test_what_the_context_cut_off_is_said(cpu_run: RunDirectory) -> None:
    record = cpu_run.read_record()
    assert clipping(record) == ""
    clip = {"kind": "clip", "max_len": 4096, "requests": 3, "input_tokens": 24_000, "output_tokens": 0}
    parameters = {"num_requests": 3, "transformations": [{"kind": "scale"}, clip]}
    record = replace(record, workload=record.workload | {"parameters": parameters})
    assert clipping(record) == (
        "3 of 3 requests shortened to 4,096 tokens: 24,000 prompt and 0 output tokens were cut off"
    )
