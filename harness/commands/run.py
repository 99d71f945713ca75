"""`bench run`: one experiment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backbench.errors import INTERRUPTED, INVALID, WRONG

if TYPE_CHECKING:
    from backbench.harness.experiment import Outcome

LOAD: tuple[str, ...] = (
    *("rate", "arrival", "concurrency", "time_scale", "num_requests", "dataset", "temperature"),
    *("input_lengths", "output_lengths", "shared_prefix", "turns", "tick", "window_s", "sample", "clip"),
)
"""Options that are fields of `workloads.options.WorkloadOptions`."""
ENGINE = (
    "block_size",
    "max_seqs",
    "max_step_tokens",
    "num_blocks",
    "max_len",
    "kv_memory_fraction",
    "prefill_chunk",
)
"""Options that are fields of `engine.config.EngineConfig`."""
SWITCHES = {"no_graphs": "graphs", "no_overlap": "overlap", "no_prefix_cache": "prefix_cache"}

_OPTIONS: list[Callable[..., Any]] = [
    click.option("--workload", "-w", required=True, metavar="NAME|FILE", help="See `bench workloads`."),
    click.option("--backend", "-b", required=True, metavar="NAME", help="See `bench backends`; or auto."),
    click.option(
        "--model",
        "-m",
        default="tiny",
        show_default=True,
        metavar="NAME|PATH|shape:NAME",
        help="See `bench models`.",
    ),
    click.option("--rate", type=float, metavar="R", help="Open loop at R requests a second."),
    click.option(
        "--arrival", metavar="KIND", help="With --rate: poisson (the default), constant, gamma, weibull."
    ),
    click.option("--concurrency", type=int, metavar="N", help="Closed loop with N requests in flight."),
    click.option("--time-scale", type=float, metavar="X", help="A trace's own times, multiplied by X."),
    click.option("--all-at-once", is_flag=True, help="Every request at time zero."),
    click.option(
        "--num-requests", "-n", type=int, metavar="N", help="Measured requests [48 on a CPU, 512 on a GPU]."
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Fixes everything that is drawn."),
    click.option(
        "--warmup",
        type=int,
        metavar="N",
        help="Warm-up requests, none of them a measured prompt [the concurrency, or 16].",
    ),
    click.option(
        "--repeat", type=int, default=1, show_default=True, metavar="N", help="Runs, each with a cold cache."
    ),
    click.option(
        "--out", "-o", type=click.Path(path_type=Path), metavar="DIR", help="A new or empty directory."
    ),
    click.option("--dataset", metavar="FILE", help="Real text for sharegpt, in ShareGPT_V3 form."),
    click.option("--slo", metavar="ttft=S,tpot=S", help="Limits in seconds (ttft, tpot, e2e) for goodput."),
    click.option("--temperature", type=float, metavar="T", help="0 is greedy [the workload's own]."),
    click.option(
        "--input-lengths", metavar="SPEC", help="synthetic: prompt lengths, such as uniform:100:1024."
    ),
    click.option("--output-lengths", metavar="SPEC", help="synthetic: output lengths."),
    click.option("--shared-prefix", metavar="GROUPSxTOKENS", help="synthetic: shared prompt prefixes."),
    click.option("--turns", type=int, metavar="N", help="synthetic: turns a session."),
    click.option(
        "--tick", type=click.Choice(["spread", "literal"]), help="mooncake: what to do with its 3 s ticks."
    ),
    click.option(
        "--window", "window_s", type=float, nargs=2, metavar="START END", help="Seconds of a trace to keep."
    ),
    click.option("--sample", type=float, metavar="P", help="Fraction of a trace to keep."),
    click.option("--clip/--no-clip", default=None, help="Shorten requests that exceed the context."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="[fp32 on a CPU, else the model's]",
    ),
    click.option("--attention", metavar="NAME", help="Backend for attention alone."),
    click.option("--linear", metavar="NAME", help="Backend for matrix multiplications alone."),
    click.option("--ops", metavar="NAME", help="Backend for elementwise operations alone."),
    click.option("--block-size", type=int, metavar="N", help="Tokens a KV block holds."),
    click.option("--max-seqs", type=int, metavar="N", help="Sequences that may run at once."),
    click.option("--max-step-tokens", type=int, metavar="N", help="Most prompt tokens of one step."),
    click.option(
        "--prefill-chunk", type=int, metavar="N", help="Most prompt tokens of one request in one step."
    ),
    click.option("--num-blocks", type=int, metavar="N", help="KV blocks in the pool."),
    click.option("--max-len", type=int, metavar="N", help="Longest prompt + output."),
    click.option(
        "--kv-memory-fraction", type=float, metavar="P", help="Share of the device the engine may take."
    ),
    click.option("--no-graphs", is_flag=True, help="Do not capture device graphs."),
    click.option("--no-overlap", is_flag=True, help="Do not schedule a step while one runs."),
    click.option("--no-prefix-cache", is_flag=True, help="Compute every prompt token."),
    click.option(
        "--interpret", is_flag=True, help="Triton's interpreter on the CPU (correctness only, slow)."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the record instead of a table."),
]


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@click.command()
@_with_options
def run(as_json: bool, **given: Any) -> None:
    """Replay a workload on the engine with one backend, and write a run directory.

    Exit codes: 0 ok, 2 usage or a fault, 4 not valid, 5 wrong results, 130 interrupted.
    """
    # Threads that wait spin for some microseconds, then sleep. Without a spin, waking them doubled a run's
    # time on two idle cores; with GNU's default spin, a machine that anything else ran on was ten times
    # slower. OpenMP reads this when torch is imported; the record keeps it.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from backbench.harness.experiment import run as run_experiment
    from backbench.harness.progress import open_observer

    options = _options(given)
    with open_observer() as observer:
        outcomes = run_experiment(options, observer)
        reports = [_report(outcome, observer.stage) for outcome in outcomes]
    if as_json:
        _print_json(outcomes)
    else:
        for outcome, report in zip(outcomes, reports, strict=True):
            _print(outcome, report)
    if outcomes and outcomes[-1].failure is not None:
        raise outcomes[-1].failure
    raise SystemExit(max((exit_code(outcome) for outcome in outcomes), default=0))


def _options(given: dict[str, Any]) -> Any:
    from backbench.harness.options import RunOptions, parse_slo
    from backbench.harness.provenance import command_line

    engine = {name: given[name] for name in ENGINE if given[name] is not None}
    engine |= {setting: False for switch, setting in SWITCHES.items() if given[switch]}
    load = {name: given[name] for name in LOAD if given[name] is not None}
    if given["all_at_once"]:
        load["all_at_once"] = True
    overrides = {"attention": given["attention"], "linear": given["linear"], "operations": given["ops"]}
    return RunOptions(
        workload=given["workload"],
        backend=given["backend"],
        model=given["model"],
        load=load,
        seed=given["seed"],
        warmup=given["warmup"],
        repeat=given["repeat"],
        out=given["out"],
        slo_s=parse_slo(given["slo"]) if given["slo"] else {},
        dtype=given["dtype"],
        overrides={operation: name for operation, name in overrides.items() if name is not None},
        engine=engine,
        interpret=given["interpret"],
        command=command_line(sys.argv[1:]),
    )


def _report(outcome: Outcome, stage: Callable[[str], None]) -> Path:
    from backbench.reports.page.html import write_report

    stage("Writing the report")
    path = outcome.directory.report_path
    write_report([outcome.directory.path], path)
    return path


def exit_code(outcome: Outcome) -> int:
    """What one run makes the command end with."""
    from backbench.reports.metrics.validity import INTERPRETED

    record = outcome.record
    if record.run["status"] == "interrupted":
        return INTERRUPTED
    if record.correctness.get("passed") is False:
        return WRONG
    return INVALID if set(record.validity) - {INTERPRETED} else 0


def _print_json(outcomes: list[Outcome]) -> None:
    from dataclasses import asdict

    from backbench.harness.commands.output import print_json

    found = [asdict(outcome.record) | {"directory": str(outcome.directory.path)} for outcome in outcomes]
    print_json(found[0] if len(found) == 1 else found)


def _print(outcome: Outcome, report: Path) -> None:
    from backbench.harness.commands.output import headline, print_report_table, print_tuning, print_validity
    from backbench.reports.tables import summary_table

    click.echo(headline(outcome.record))
    print_tuning(outcome.record)
    print_report_table(summary_table(outcome.record))
    print_validity(outcome.record)
    click.echo(f"Run directory: {outcome.directory.path}")
    click.echo(f"Report:        {report}")
