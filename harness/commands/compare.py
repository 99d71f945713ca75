"""`bench compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path

import click

from backbench.errors import INVALID


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--anyway", is_flag=True, help="Go on although the runs are not comparable.")
@click.option("--json", "as_json", is_flag=True, help="Print the differences and the ratios as JSON.")
def compare(runs: tuple[Path, ...], anyway: bool, as_json: bool) -> None:
    """Put two or more RUNS side by side; ratios are to the first one.

    Runs of another workload, model or metric schema are refused (exit 4) with the differences named.
    """
    import json

    from backbench.errors import HarnessError
    from backbench.harness.commands.output import print_json, print_report_table
    from backbench.harness.commands.stored import read, reading, say
    from backbench.reports.compare import differences, incomparable, labels, ratio_table
    from backbench.reports.tables import comparison_table, difference_table

    if len(runs) < 2:
        raise HarnessError("A comparison needs at least two runs.")
    with reading(*runs):
        records = [read(run)[1] for run in runs]
        hard = incomparable(records)
        if hard and not anyway:
            what = "; ".join(map(str, hard))
            what = what if len(what) <= 200 else what[:197] + "..."
            raise HarnessError(f"These runs do not compare: {what} (--anyway goes on).", exit_code=INVALID)
        soft = differences(records)
        if as_json:
            print_json(
                {
                    "runs": labels(records),
                    "comparable": not hard,
                    "incomparable": [str(each) for each in hard],
                    "differences": {each.field: list(each.values) for each in soft},
                    "metrics": json.loads(ratio_table(records).to_json(orient="records")),
                }
            )
            return
        for each in hard:
            say(f"not comparable: {each}")
        for run, record in zip(runs, records, strict=True):
            for reason in record.validity:
                say(f"{run} is not valid: {reason}")
        print_report_table(comparison_table(records))
        print_report_table(difference_table(soft, labels(records)))
