"""`bench gate`: is the candidate worse than the baseline?"""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--baseline", required=True, help="Options of bench run ('--backend flash'), or a checkout.")
@click.option("--candidate", required=True, help="The same, for what is to be judged.")
@click.option(
    "--policy",
    "policy_file",
    type=click.Path(path_type=Path),
    help="TOML file of workload, options and margins; default bench-gate.toml where there is one.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("gate"),
    show_default=True,
    help="Directory of the pairs and the answer; a gate that was stopped goes on in it.",
)
@click.option("--max-minutes", type=click.FloatRange(min=0, min_open=True), help="Stop before this is spent.")
@click.option("--json", "as_json", is_flag=True, help="Print gate.json instead of the summary.")
def gate(
    baseline: str,
    candidate: str,
    policy_file: Path | None,
    out: Path,
    max_minutes: float | None,
    as_json: bool,
) -> None:
    """Run baseline and candidate in pairs (A B B A) until the difference is clear, and say what it is.

    Exit codes: 0 pass, 1 regressed, 2 usage, 3 inconclusive, 5 wrong results, 130 interrupted.
    """
    from backbench.harness.gate.arms import BASELINE, CANDIDATE, parse_arm, run_in_process
    from backbench.harness.gate.outcome import headline, to_json, to_markdown, write
    from backbench.harness.gate.policy import POLICY_FILE, Policy, read_policy
    from backbench.harness.gate.session import Session

    default = Path(POLICY_FILE)
    file = policy_file or (default if default.is_file() else None)
    policy = read_policy(file) if file is not None else Policy()
    session = Session(
        policy,
        parse_arm(BASELINE, baseline),
        parse_arm(CANDIDATE, candidate),
        out,
        run_in_process,
        tell=lambda text: click.echo(text, err=True),
        max_minutes=max_minutes,
    )
    outcome = session.run()
    write(outcome, out)
    click.echo(to_json(outcome) if as_json else to_markdown(outcome))
    click.echo(headline(outcome), err=True)
    raise SystemExit(outcome.exit_code)
