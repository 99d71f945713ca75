"""`bench kernels`: one operation at a time, each backend side by side, against the roofline."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from backbench.harness.commands.flags import flag, subject_flag
from backbench.options import Option

SECONDS = Option(
    "seconds",
    "seconds",
    float,
    0.02,
    "Measuring time of one cell over all its rounds. GPUs under a longer load meet their power limit.",
    metavar="S",
    minimum=0.001,
    maximum=60,
)


@click.command()
@subject_flag("backend", parameter="backend_names", default="torch", help="Backends, separated by commas.")
@click.option("--shapes", help="Attention batches like 8q1s32k,2q4k_32q1s1k: count q queries s keys.")
@click.option(
    "--kinds", default="attention", help="Of attention, linear, operations and all_reduce, by commas."
)
@subject_flag("model", default="shape:qwen3-8b", help="Whose heads, weights and sizes are used.")
@subject_flag("quantize", default="none", help="Schemes of the linear weights, separated by commas.")
@click.option("--tokens", default="1,16,64,256", help="Rows of the linear and fused operations.")
@subject_flag("dtype", unset="fp32 on a CPU, else bf16")
@subject_flag("block_size")
@subject_flag("device", parameter="prefer")
@subject_flag("tp", default=2)
@flag(SECONDS, default=0.02)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows.")
@click.option("--html", "html_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a page.")
def kernels(
    backend_names: str,
    shapes: str | None,
    kinds: str,
    model: str,
    quantize: str,
    tokens: str,
    dtype: str | None,
    block_size: int | None,
    prefer: str | None,
    tp: int,
    seconds: float,
    as_json: bool,
    csv_file: Path | None,
    html_file: Path | None,
) -> None:
    """Time single operations: cold caches, permuted blocks, random values, correctness beside each time.

    On a GPU every cell is timed eagerly, launches and all, and in a graph, the kernel alone. Backends take
    turns, the whole list is measured twice, and the interval is over rounds that lie that far apart; an
    eager time still depends on the process and the host. all_reduce sums `--tokens` rows of hidden
    states over `--tp` devices, beside torch's own kernels. Exit code 5 when a result is wrong.
    """
    from backbench.harness.commands.output import print_json, print_table
    from backbench.harness.kernels import page
    from backbench.harness.kernels.cost import require_memory, warning
    from backbench.harness.kernels.measure import measure
    from backbench.harness.kernels.plan import Asked, plan
    from backbench.harness.peaks import device_peaks

    planned = plan(Asked(backend_names, shapes, kinds, model, tokens, dtype, block_size, prefer, quantize))
    device, backends, problems, number_type = planned[:4]
    require_memory(problems, device)
    peaks = device_peaks(device, number_type)
    if text := warning(problems, len(backends), device, peaks):
        click.echo(f"warning: {text}", err=True)

    interactive = sys.stderr.isatty()

    def progress(text: str) -> None:
        if interactive:
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)

    results = list(measure(problems, backends, device, peaks, budget_s=seconds, progress=progress))
    if planned.rows:
        from backbench.harness.kernels.collectives import Sizes, measure_all_reduce

        sizes = Sizes(planned.rows, planned.hidden_size, number_type)
        results += measure_all_reduce([each.name for each in backends], sizes, tp, device)
    progress("")
    facts = {
        "Device": device.name,
        "Data type": str(number_type).removeprefix("torch."),
        "Measured peaks": f"{page.rate(peaks.measured_bytes_per_s, 1e9)} GB/s, "
        f"{page.rate(peaks.measured_flops_per_s, 1e12)} TFLOP/s",
    }
    if peaks.datasheet_bytes_per_s is not None:
        facts["Datasheet"] = (
            f"{page.rate(peaks.datasheet_bytes_per_s, 1e9)} GB/s, "
            f"{page.rate(peaks.datasheet_flops_per_s, 1e12)} TFLOP/s"
        )
    if csv_file is not None:
        csv_file.write_text(page.to_csv(results))
    if html_file is not None:
        html_file.write_text(page.to_html(results, facts))
    if as_json:
        print_json({"facts": facts, "rows": [result.to_json() for result in results]})
    else:
        title = "; ".join(f"{name}: {value}" for name, value in facts.items())
        print_table(title, page.COLUMNS, page.table_rows(results), right=range(4, 8))
    if any(result.correct is False for result in results):
        click.get_current_context().exit(5)
