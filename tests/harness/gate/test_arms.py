"""Arms from the command line, git refs checked out, and what a run's process gets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backbench.errors import HarnessError
from backbench.harness.gate import arms
from backbench.harness.gate.arms import Arm, checked_out, digest, parse_arm, run_in_process, unchecked
from backbench.harness.gate.policy import Policy


def git(*arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of a package whose command writes down what ran it; its first commit holds no package."""
    monkeypatch.chdir(tmp_path)
    git("init", "-q", "-b", "main")
    (tmp_path / "README").write_text("empty")
    git("add", ".")
    git("commit", "-qm", "nothing yet")
    git("tag", "empty")
    package = tmp_path / "backbench" / "harness"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    for version in ("one", "two"):
        code = f"import sys\ndef main(): sys.exit('error: {version} ' + repr(sys.argv[1:]))\n"
        (package / "cli.py").write_text(code)
        git("add", ".")
        git("commit", "-qm", version)
        git("tag", version)
    return tmp_path


def test_options() -> None:
    found = parse_arm("baseline", "--backend flash --dtype 'bfloat16'")
    assert found.options == ("--backend", "flash", "--dtype", "bfloat16")
    assert found.tree is None and found.code == digest(arms.HERE)


def test_nothing_is_the_code_that_gates() -> None:
    assert parse_arm("candidate", "").options == ()


def test_a_checkout(repository: Path) -> None:
    found = parse_arm("candidate", str(repository))
    assert found.tree == repository and found.ref is None
    before = found.code
    (repository / "backbench" / "harness" / "cli.py").write_text("pass")
    assert parse_arm("candidate", str(repository)).code != before


def test_a_ref_is_pinned_to_its_commit(repository: Path) -> None:
    found = parse_arm("baseline", "one")
    assert found.ref == "one" and found.code == git("rev-parse", "one")
    assert found.describe() == {"ref": "one", "code": found.code}


@pytest.mark.parametrize("text", ["no-such-ref", "/nowhere", "main~99", "one two", "x" * 500])
def test_what_is_no_arm_is_one_line(repository: Path, text: str) -> None:
    with pytest.raises(HarnessError) as caught:
        parse_arm("baseline", text)
    assert "none of them" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_outside_a_repository_a_ref_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(HarnessError, match=r"none of them .*not a git repository"):
        parse_arm("baseline", "main")


@pytest.mark.parametrize("text", ["--seed 3", "--out=x", "--backend torch --repeat 2"])
def test_what_the_gate_sets_is_refused(text: str) -> None:
    with pytest.raises(HarnessError, match="set by the gate"):
        parse_arm("baseline", text)


def test_options_that_do_not_split_are_one_line() -> None:
    with pytest.raises(HarnessError, match="No closing quotation"):
        parse_arm("baseline", "--backend 'flash")


def ran(arm: Arm, tmp_path: Path) -> str:
    """What the arm's own command said."""
    with pytest.raises(HarnessError) as caught:
        run_in_process(arm, Policy("synthetic", ("--num-requests", "2")), 5, tmp_path / "out")
    return str(caught.value)


def test_a_ref_runs_its_own_code_and_is_removed(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gate" / "trees"
    with checked_out(parse_arm("baseline", "one"), folder) as arm:
        assert arm.tree is not None and arm.tree.is_dir()
        said = ran(arm, tmp_path)
    # The working directory holds version two, which must not be what runs.
    assert "The baseline could not run: one ['run', '--workload', 'synthetic', '--num-requests', '2'" in said
    assert "'--seed', '5', '--out'" in said
    assert not arm.tree.exists() and len(git("worktree", "list").splitlines()) == 1


def test_a_tree_that_a_killed_gate_left_is_replaced(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gate" / "trees"
    git("worktree", "add", "--detach", str(folder / "baseline"), "one")
    with checked_out(parse_arm("baseline", "two"), folder) as arm:
        assert "two [" in ran(arm, tmp_path)
    git("worktree", "add", "--detach", str(folder / "baseline"), "one")
    shutil.rmtree(folder)  # git still knows of it
    with checked_out(parse_arm("baseline", "two"), folder) as arm:
        assert "two [" in ran(arm, tmp_path)


def test_a_tree_is_removed_when_the_gate_fails(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), checked_out(parse_arm("baseline", "one"), tmp_path / "t"):
        raise KeyboardInterrupt
    assert len(git("worktree", "list").splitlines()) == 1


def test_a_ref_without_the_package_is_one_line(repository: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(HarnessError, match="empty holds no package backbench"),
        checked_out(parse_arm("baseline", "empty"), tmp_path / "t"),
    ):
        pass
    assert len(git("worktree", "list").splitlines()) == 1


def test_a_checkout_runs_its_own_code(repository: Path, tmp_path: Path) -> None:
    assert "two [" in ran(parse_arm("candidate", str(repository)), tmp_path)


def test_an_interpreter_of_its_own(repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\necho "other interpreter, $PYTHONPATH" >&2\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    arm = parse_arm("candidate", str(repository), str(other))
    assert arm.describe()["python"] == "python" and "two [" in ran(arm, tmp_path)
    missing = parse_arm("candidate", "--backend torch", str(tmp_path / "none"))
    assert missing.code is None  # whatever that has installed
    assert "cannot start" in ran(missing, tmp_path)


def test_options_run_the_code_that_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    said = ran(parse_arm("baseline", "--backend nonesuch"), tmp_path)
    assert "nonesuch" in said and "could not run" in said
    assert os.environ.get("PYTHONPATH") is None


def test_a_run_is_spared_what_the_gate_need_not_have(repository: Path, tmp_path: Path) -> None:
    """An arm that knows the options gets them; --no-check only where it was asked for."""
    arm = parse_arm("candidate", str(repository))
    assert "--no-report" not in ran(unchecked(arm), tmp_path)  # this one prints no help
    cli = repository / "backbench" / "harness" / "cli.py"
    cli.write_text(
        "import sys\ndef main():\n"
        "    if '--help' in sys.argv: print('--check / --no-check --no-report')\n"
        "    else: sys.exit('error: ' + repr(sys.argv[1:]))\n"
    )
    arms._help.cache_clear()
    assert "'--no-report'" in (said := ran(arm, tmp_path)) and "--no-check" not in said
    assert "'--no-report', '--no-check'" in (said := ran(unchecked(arm), tmp_path))
    assert "--quiet" not in said
    arms._help.cache_clear()


def test_bench_run_knows_what_a_gate_spares_it() -> None:
    assert set(arms.SPARED) <= arms._help(sys.executable, arms.HERE)
