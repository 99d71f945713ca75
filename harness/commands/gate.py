"""`bench gate`, `bench calibrate`, `bench trend`: is the candidate worse than the baseline?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from backbench.harness.gate.arms import Arm
    from backbench.harness.gate.fingerprint import Fingerprint
    from backbench.harness.gate.policy import Policy
    from backbench.harness.gate.session import Session
    from backbench.harness.gate.stored import Stored

POLICY = click.option(
    "--policy",
    "policy_file",
    type=click.Path(path_type=Path),
    help="TOML file of workload, options and margins; default bench-gate.toml where there is one.",
)
CALIBRATION = click.option(
    "--calibration",
    "calibration_file",
    type=click.Path(path_type=Path),
    help="File of the machines' noise; default bench-calibration.json.",
)


def out(default: str, holds: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "-o",
        "--out",
        type=click.Path(path_type=Path),
        default=Path(default),
        show_default=True,
        help=f"Directory of {holds}; one that was stopped goes on in it.",
    )


@click.command()
@click.option(
    "--baseline",
    required=True,
    metavar="ARM",
    help="Options of bench run ('--backend flash'), a checkout's folder, a git ref, or stored runs.",
)
@click.option("--candidate", required=True, metavar="ARM", help="The same, for what is to be judged.")
@click.option("--baseline-python", metavar="PATH", help="Interpreter of the baseline; default this one.")
@click.option("--candidate-python", metavar="PATH", help="Interpreter of the candidate; default this one.")
@POLICY
@CALIBRATION
@out("gate", "the pairs and the answer")
@click.option(
    "--max-minutes", type=click.FloatRange(min=0, min_open=True), help="Begin no pair that may end later."
)
@click.option("--json", "as_json", is_flag=True, help="Print gate.json instead of the summary.")
def gate(
    baseline: str,
    candidate: str,
    baseline_python: str | None,
    candidate_python: str | None,
    policy_file: Path | None,
    calibration_file: Path | None,
    out: Path,
    max_minutes: float | None,
    as_json: bool,
) -> None:
    """Run baseline and candidate in pairs (A B B A) until the difference is clear, and say what it is.

    A baseline of stored runs (a run's or an experiment's directory) is for every night: a loss then ends with
    code 3 and the command of the gate of pairs. Leaves gate.json, junit.xml and summary.md in --out. See
    docs/gate.md and docs/ci.md.

    Exit codes: 0 pass, 1 regressed, 2 usage, 3 inconclusive, 4 invalid, 5 wrong results, 130 interrupted.
    """
    from backbench.harness.gate.arms import BASELINE, CANDIDATE, parse_arm
    from backbench.harness.gate.calibration import cell_of
    from backbench.harness.gate.outcome import headline, to_json, to_markdown, write
    from backbench.harness.gate.stored import find_stored, stored_arm

    policy = _policy(policy_file)
    stored: dict[str, Stored] = {}
    arms: list[Arm] = []
    for name, text, python in (
        (BASELINE, baseline, baseline_python),
        (CANDIDATE, candidate, candidate_python),
    ):
        if (runs := find_stored(name, text)) is not None:
            stored[name] = runs
            arms.append(stored_arm(name, text, runs))
        else:
            arms.append(parse_arm(name, text, python))
    before, after = arms
    opened = _opened(policy, before, after, out)
    if stored:
        again = (after.code or "REF")[:12] if CANDIDATE in stored else candidate
        opened = _opened_stored(policy, before, after, out, stored, again, policy_file)
    with opened as session:
        session.max_minutes = max_minutes
        session.blind = _blind(calibration_file, policy, cell_of(policy, before))
        outcome = session.run()
    write(outcome, out)
    click.echo(to_json(outcome) if as_json else to_markdown(outcome))
    click.echo(headline(outcome), err=True)
    raise SystemExit(outcome.exit_code)


@click.command()
@click.option(
    "--arm",
    default="",
    metavar="ARM",
    help="What runs against itself: options of bench run, a checkout's folder, or a git ref; "
    "default what is installed.",
)
@click.option("--pairs", type=int, default=12, show_default=True, metavar="N", help="Valid pairs to run.")
@POLICY
@CALIBRATION
@out("calibration", "the pairs")
@click.option("--json", "as_json", is_flag=True, help="Print the calibration instead of a table.")
def calibrate(
    arm: str,
    pairs: int,
    policy_file: Path | None,
    calibration_file: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Measure how much runs of the same code differ here, so that a gate knows what it can see.

    Exit codes: 0 ok, 2 usage or a fault, 4 the machine is not fit to measure on, 130 interrupted.
    """
    from dataclasses import asdict

    from backbench.harness.commands.output import print_json
    from backbench.harness.gate.arms import BASELINE, CANDIDATE, parse_arm
    from backbench.harness.gate.calibration import CALIBRATION_FILE, LOOKS, store
    from backbench.harness.gate.calibration import calibrate as run_calibration

    both = parse_arm(BASELINE, arm), parse_arm(CANDIDATE, arm)
    with _opened(_policy(policy_file), *both, out) as session:
        found = run_calibration(session, pairs)
    file = calibration_file or Path(CALIBRATION_FILE)
    store(found, file)
    if as_json:
        print_json(asdict(found))
        return
    click.echo(
        f"| metric | noise of a pair | {' | '.join(f'seen by {n}' for n in LOOKS)} | proposed margin |"
    )
    click.echo("|---|---|" + "---|" * len(LOOKS) + "---|")
    for name, each in found.metrics.items():
        seen = " | ".join(f"{each.detectable[str(look)]:.2%}" for look in LOOKS)
        click.echo(f"| {name} | {each.noise:.2%} | {seen} | {each.proposed_margin:.1%} |")
    click.echo(f"Stored in {file}: {found.cell} on {found.fingerprint.hard['system.device.name']}")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print rows instead of a table.")
def trend(directory: Path, as_json: bool) -> None:
    """Show the history of gates under a directory, newest last, and where a metric's level changed.

    Levels are of the candidates, by machine and by what they ran. It never fails a build.
    """
    from backbench.harness.commands.output import print_json
    from backbench.harness.gate.trend import history, to_markdown

    found = history(directory)
    for each in found.odd:
        _tell(f"left out: {each}")
    if as_json:
        print_json({"gates": found.rows, "changes": found.changes})
    else:
        click.echo(to_markdown(found))


def _tell(text: str) -> None:
    from backbench.harness.commands.stored import say

    say(text)


@contextmanager
def _opened(policy: Policy, baseline: Arm, candidate: Arm, out: Path) -> Iterator[Session]:
    """The gate of these arms in its directory, with their trees checked out while it is open."""
    from backbench.harness.gate.arms import checked_out, run_in_process
    from backbench.harness.gate.kernels import InProcesses, KernelSession
    from backbench.harness.gate.session import Session

    with ExitStack() as stack:
        session = Session(policy, baseline, candidate, out, run_in_process, _tell)
        if policy.kernels is not None:
            options = {arm.name: _kernel_options(policy, arm) for arm in (baseline, candidate)}
        session.claim()
        before = stack.enter_context(checked_out(baseline, out / "trees"))
        after = stack.enter_context(checked_out(candidate, out / "trees"))
        if policy.kernels is not None:
            turns = stack.enter_context(InProcesses((before, after), options))
            session = KernelSession(policy, before, after, out, tell=_tell, take_turns=turns)
        session.baseline, session.candidate = before, after
        yield session


@contextmanager
def _opened_stored(
    policy: Policy,
    baseline: Arm,
    candidate: Arm,
    out: Path,
    stored: dict[str, Stored],
    again: str,
    policy_file: Path | None,
) -> Iterator[Session]:
    """The gate against stored runs in its directory."""
    from backbench.errors import HarnessError
    from backbench.harness.gate.arms import checked_out, run_in_process
    from backbench.harness.gate.stored import StoredSession, common_seeds, paired_again, replaying

    if baseline.name not in stored or policy.kernels is not None:
        raise HarnessError("Stored runs are a gate's baseline, or both its arms, and hold no kernels.")
    session = StoredSession(
        policy,
        baseline,
        candidate,
        out,
        replaying(run_in_process, stored),
        _tell,
        seeds=common_seeds(stored),
        again=paired_again(baseline, again, policy_file),
    )
    session.claim()
    with checked_out(candidate, out / "trees") as session.candidate:
        yield session


def _kernel_options(policy: Policy, arm: Arm) -> dict[str, Any]:
    """What `bench kernels` would be asked with the policy's and the arm's options."""
    from backbench.errors import HarnessError
    from backbench.harness.commands.kernels import kernels

    given = kernels.make_context(f"the {arm.name}'s kernels", [*(policy.kernels or ()), *arm.options]).params
    if "all_reduce" in given["kinds"]:
        raise HarnessError("A gate on kernels judges those of one device; leave all_reduce out of --kinds.")
    printed = ("as_json", "csv_file", "html_file", "seconds", "tp")
    if "," in given["backend_names"]:
        raise HarnessError(f"An arm's kernels run on one backend, not {given['backend_names']}.")
    return {name: value for name, value in given.items() if name not in printed}


def _policy(given: Path | None) -> Policy:
    from backbench.harness.gate.policy import POLICY_FILE, Policy, read_policy

    default = Path(POLICY_FILE)
    file = given or (default if default.is_file() else None)
    return read_policy(file) if file is not None else Policy()


def _blind(given: Path | None, policy: Policy, cell: str) -> Callable[[Fingerprint], str | None]:
    """Why a machine cannot see the policy's margins, by the calibrations there are."""
    from backbench.harness.gate.calibration import CALIBRATION_FILE, find, read_calibrations

    file = given or Path(CALIBRATION_FILE)
    known = read_calibrations(file) if given is not None or file.is_file() else []

    def blind(machine: Fingerprint) -> str | None:
        found = find(known, machine, cell)
        return None if found is None else found.blind(policy)

    return blind
