"""Who holds a cell: one of many, by one rename; a holder that vanished is fenced out for good."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from backbench.harness.sweep import lease
from backbench.harness.sweep.lease import (
    BROKEN,
    FAILED,
    HELD,
    OWNER_FILE,
    PUBLISHED,
    RELEASED,
    Lease,
    LeaseLost,
    claim,
    forgive,
    leases,
    me,
)


def write_run(held: Lease, text: str = "run") -> None:
    held.run.mkdir()
    (held.run / "run.json").write_text(text)


def grow_old(held: Lease, seconds: float) -> None:
    """As if its holder, who lives, had shown no life for so long."""
    then = time.time() - seconds
    os.utime(held.held / OWNER_FILE, (then, then))


def claimed(cell: Path, stale_s: float = 60.0) -> Lease:
    found = claim(cell, stale_s)
    assert found is not None
    return found


def test_a_cell_has_one_holder_until_it_ends(tmp_path: Path) -> None:
    first = claimed(tmp_path)
    assert claim(tmp_path) is None
    first.end(RELEASED)
    second = claimed(tmp_path)
    assert second.number == 2
    write_run(second)
    second.publish()
    assert (tmp_path / "result" / "run.json").read_text() == "run"
    assert [each.how for each in leases(tmp_path)] == [RELEASED, PUBLISHED]
    assert not list(tmp_path.rglob(OWNER_FILE)), "a host's name stays only while it is needed"


def test_a_silent_holder_is_fenced_out(tmp_path: Path) -> None:
    silent = claimed(tmp_path)
    write_run(silent, "of the silent one")
    grow_old(silent, 59)
    assert claim(tmp_path) is None, "a holder is given its minute"
    grow_old(silent, 61)
    heir = claimed(tmp_path)
    for late in (silent.beat, silent.publish, lambda: silent.fail("late"), lambda: silent.end(RELEASED)):
        with pytest.raises(LeaseLost):
            late()
    assert not (tmp_path / "result").exists()
    write_run(heir, "of the heir")
    heir.publish()
    assert (tmp_path / "result" / "run.json").read_text() == "of the heir"


def test_a_late_holder_whose_run_a_rename_would_still_find_looks_at_the_numbers(tmp_path: Path) -> None:
    """NFS may rename by the handle of the directory that was moved."""
    late = claimed(tmp_path)
    write_run(late)
    grow_old(late, 61)
    claimed(tmp_path)
    shutil.copytree(late.path / BROKEN, late.held)
    with pytest.raises(LeaseLost):
        late.publish()
    assert not (tmp_path / "result").exists()


def test_a_sign_of_life_keeps_a_lease(tmp_path: Path) -> None:
    held = claimed(tmp_path)
    grow_old(held, 61)
    held.beat()
    assert claim(tmp_path) is None


def test_a_killed_holder_on_this_machine_is_known_at_once(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from backbench.harness.sweep.lease import claim\n"
    code += "claim(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    assert claim(tmp_path) is None
    process.send_signal(signal.SIGKILL)
    while (Path("/proc") / str(process.pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert claimed(tmp_path).number == 2, "also while nobody has waited for it"
    process.communicate()
    assert [each.how for each in leases(tmp_path)] == [BROKEN, HELD]


def test_the_pid_of_another_machine_or_of_an_earlier_process_says_nothing(tmp_path: Path) -> None:
    mine = me()
    assert not mine.gone
    assert replace(mine, started="1").gone, "the pid is another process's by now"
    assert not replace(mine, machine="another boot", pid=2**22 - 1).gone


@pytest.mark.parametrize("before", ["nothing", "a stale lease"])
def test_of_many_at_once_one_gets_it(tmp_path: Path, before: str) -> None:
    rounds, racers = 20, 4
    for number in range(rounds):
        (tmp_path / str(number)).mkdir()
        if before != "nothing":
            grow_old(claimed(tmp_path / str(number)), 61)
    code = (
        "import sys, time; from pathlib import Path; from backbench.harness.sweep.lease import claim\n"
        "root = Path(sys.argv[1]); (root / f'ready{sys.argv[2]}').touch()\n"
        "while not (root / 'go').exists(): pass\n"
        f"print(sum(claim(root / str(number)) is not None for number in range({rounds})), flush=True)\n"
        "sys.stdin.read()"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(racer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for racer in range(racers)
    ]
    while len(list(tmp_path.glob("ready*"))) < racers:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    won = [int(each.stdout.readline()) for each in processes if each.stdout is not None]
    for each in processes:
        each.communicate("")
    assert sum(won) == rounds
    for number in range(rounds):
        assert [each.how for each in leases(tmp_path / str(number))].count(HELD) == 1


def test_failures_are_kept_and_can_be_forgiven(tmp_path: Path) -> None:
    held = claimed(tmp_path)
    held.fail("no such card")
    assert held.reason == "no such card"
    assert [each.how for each in leases(tmp_path)] == [FAILED]
    forgive(tmp_path)
    assert [each.how for each in leases(tmp_path)] == ["forgiven"]
    assert claimed(tmp_path).number == 2


class Holders(RuleBasedStateMachine):
    """Any number of holders that may be silent, wake, publish late, or end, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Path(mkdtemp())
        self.taken: list[Lease] = []
        self.standing: Lease | None = None
        """The one that may publish."""
        self.published: Lease | None = None

    def teardown(self) -> None:
        shutil.rmtree(self.cell)

    @rule(silent=st.booleans())
    def claim(self, silent: bool) -> None:
        if self.standing is not None and silent:
            grow_old(self.standing, 61)
        found = claim(self.cell)
        assert (found is not None) == (silent or self.standing is None)
        if found is not None:
            assert found.number == len(self.taken) + 1
            write_run(found, str(found.number))
            self.taken.append(found)
            self.standing = found

    @rule(which=st.integers(0, 9), how=st.sampled_from(["publish", "fail", "release", "beat"]))
    def go_on(self, which: int, how: str) -> None:
        if not self.taken:
            return
        one = self.taken[which % len(self.taken)]
        may = one == self.standing and not (how == "publish" and self.published)
        act = {
            "publish": one.publish,
            "fail": lambda: one.fail("why"),
            "release": lambda: one.end(RELEASED),
            "beat": one.beat,
        }[how]
        try:
            act()
        except LeaseLost:
            assert not may
            return
        assert may
        if how == "publish":
            self.published = one
        if how != "beat":
            self.standing = None

    @invariant()
    def there_is_one_result_of_the_one_who_might(self) -> None:
        result = self.cell / "result" / "run.json"
        assert result.exists() == (self.published is not None)
        if self.published is not None:
            assert result.read_text() == str(self.published.number)


TestHolders = Holders.TestCase
TestHolders.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)


def test_a_namespace_that_cannot_be_read_leaves_the_hosts_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert lease.machine() == lease.platform.node()
