"""What a worker does with cells that run, fail, are interrupted, or hold something that is no result."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import pytest
from scripted_worker import measure_script

from backbench.errors import INTERRUPTED, HarnessError
from backbench.harness.options import RunOptions, run_options
from backbench.harness.repeats import Ended
from backbench.harness.sweep.campaign import read_campaign
from backbench.harness.sweep.cells import (
    DONE,
    GIVEN_UP,
    MOST_FAILURES,
    RUNNING,
    WAITING,
    Look,
    State,
    left_out,
    plan,
    retry,
)
from backbench.harness.sweep.lease import FAILED, RELEASED, claim, leases
from backbench.harness.sweep.worker import Worker, in_turn
from backbench.reports.arms import open_arms
from backbench.reports.conclusion import conclusion
from backbench.reports.conditions import arms_by_condition
from backbench.reports.loaded import compare, load
from backbench.reports.record import RunDirectory
from backbench.reports.record.digests import sign
from backbench.reports.record.sweep import MEASURED_FILE, Cell, Measured, Sweep
from backbench.reports.verify import examine_experiment

MakeSweep = Callable[..., Sweep]


@pytest.fixture(scope="module", autouse=True)
def a_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A scripted run, of which all others here are copies under their own names."""
    given = {"workload": "synthetic", "backend": "torch", "num_requests": 2}
    Runs.template = tmp_path_factory.mktemp("template") / "run"
    measure_script(run_options(given), Runs.template, lambda: None)


class Runs:
    """Runs, and what was asked for; `ends` says of a backend how its run ends instead.

    One that says something has written its run before it ends so; one that is silent has not.
    """

    template: Path

    def __init__(self, **ends: Ended | BaseException | str) -> None:
        self.ends = ends
        self.asked: list[tuple[str, object, int]] = []

    def __call__(self, options: RunOptions, out: Path, beat: Callable[[], None]) -> Ended:
        self.asked.append((options.backend, options.load.get("concurrency"), options.seed))
        end = self.ends.get(options.backend)
        if isinstance(end, BaseException):
            raise end
        if isinstance(end, Ended) and not end.said:
            return end
        beat()
        shutil.copytree(self.template, out)
        record = RunDirectory.open(out).read_record()
        record.run.update(uuid=str(uuid4()), seed=options.seed)
        if end == "cut short":
            record.run["status"] = "interrupted"
        directory = RunDirectory.open(out)
        directory.write_record(sign(directory, record))
        if end == "torn":
            (out / "requests.parquet").write_bytes(b"PAR1")
        return end if isinstance(end, Ended) else Ended(0, "")


def work(sweep: Sweep, runs: Runs, once: bool = False) -> list[str]:
    said: list[str] = []
    Worker(sweep.path, said.append, runs, poll_s=0.01).work(once)
    return said


def kinds(sweep: Sweep) -> list[str]:
    look = Look(sweep)
    return [look.at(cell).kind for cell in sweep.cells]


def test_arms_take_turns_and_every_run_is_what_its_cell_says(make_sweep: MakeSweep) -> None:
    sweep, runs = make_sweep({"concurrency": [1, 2], "backend": ["torch", "sdpa"]}, repeats=2), Runs()
    work(sweep, runs)
    there = [("torch", 1, 0), ("sdpa", 1, 0), ("torch", 2, 0), ("sdpa", 2, 0)]
    back = [("sdpa", 2, 1), ("torch", 2, 1), ("sdpa", 1, 1), ("torch", 1, 1)]
    assert runs.asked == there + back
    assert kinds(sweep) == [DONE] * 8
    work(sweep, runs)
    assert len(runs.asked) == 8, "what is done is not run again"


def test_a_sweep_is_loaded_verified_and_paired_as_one(make_sweep: MakeSweep) -> None:
    sweep = make_sweep({"concurrency": [1, 2], "backend": ["torch", "sdpa"]}, repeats=2)
    work(sweep, Runs())
    found = load(sweep.path)
    names = [f"{backend} · concurrency {each}" for each in (1, 2) for backend in ("torch", "sdpa")]
    assert list(found.arms) == names
    blocks = {arm: [int(each) for each in rows["block"]] for arm, rows in found.values.groupby("arm")}
    assert blocks["torch · concurrency 1"] == blocks["sdpa · concurrency 1"]
    assert not {*blocks["torch · concurrency 1"]} & {*blocks["torch · concurrency 2"]}
    assert found.experiment.finished
    assert examine_experiment(sweep.path).problems == ()
    arms = open_arms([sweep.path])
    assert "under several conditions" in conclusion(arms)
    groups = arms_by_condition(sweep.path, arms)
    assert {name: [arm.label for arm in each] for name, each in groups.items()} == {
        "concurrency 1": ["torch", "sdpa"],
        "concurrency 2": ["torch", "sdpa"],
    }
    table = compare([sweep.path])
    assert set(table["condition"]) == {"concurrency 1", "concurrency 2"}
    # Copies of one run; without a verdict where the machine was not its own while it was made.
    assert not set(table["sdpa / torch verdict"]) & {"better", "worse"}


def test_a_failed_point_does_not_stop_the_rest(make_sweep: MakeSweep) -> None:
    sweep = make_sweep({"backend": ["torch", "sdpa"]}, repeats=2)
    runs = Runs(torch=Ended(2, "Loading\nerror: The card has no memory left.\n"))
    said = work(sweep, runs)
    assert [name for name, *_ in runs.asked].count("torch") == 2 * MOST_FAILURES
    look = Look(sweep)
    states = {(cell.arm, cell.block): look.at(cell) for cell in sweep.cells}
    for block in (0, 1):
        assert states["sdpa", block].kind == DONE
        assert states["torch", block] == State(GIVEN_UP, "The card has no memory left.")
    assert "Failed, attempt 2 of 2: torch: The card has no memory left." in said
    assert load(sweep.path).arms.keys() == {"sdpa"}
    retry(sweep)
    work(sweep, Runs())
    assert kinds(sweep) == [DONE] * 4


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (Ended(-9, ""), "it ended with code -9."),
        (Ended(INTERRUPTED, "interrupted"), "interrupted"),
        (Ended(-11, "Checking results\nSegmentation fault\n"), "Segmentation fault"),
        ("torn", "requests.parquet"),
        ("cut short", "its status is 'interrupted'"),
    ],
)
def test_what_is_no_result_is_not_published(make_sweep: MakeSweep, end: Ended | str, why: str) -> None:
    sweep = make_sweep({"backend": ["torch"]})
    work(sweep, Runs(torch=end))
    assert not sweep.result(sweep.cells[0]).exists()
    assert why in Look(sweep).at(sweep.cells[0]).note


def test_an_interruption_gives_the_cell_back(make_sweep: MakeSweep) -> None:
    sweep = make_sweep({"backend": ["torch"]})
    with pytest.raises(KeyboardInterrupt):
        work(sweep, Runs(torch=KeyboardInterrupt()))
    assert [each.how for each in leases(sweep.directory(sweep.cells[0]))] == [RELEASED]
    assert kinds(sweep) == [WAITING]


def test_a_marker_is_not_believed_a_result_is_verified(make_sweep: MakeSweep) -> None:
    """A lease that says published, a result that was changed, and a result of another cell."""
    sweep = make_sweep({"backend": ["torch", "sdpa", "triton"]})
    work(sweep, Runs())
    gone, torn, other = sweep.cells
    shutil.rmtree(sweep.result(gone))
    (sweep.result(torn) / "steps.parquet").write_bytes(b"PAR1")
    shutil.rmtree(sweep.result(other))
    shutil.copytree(sweep.result(torn), sweep.result(other))
    look = Look(sweep)
    assert look.at(gone) == State(WAITING)
    assert "does not verify" in look.at(torn).note
    assert f"it is a run of cell '{torn.id}'" in look.at(other).note
    problems = examine_experiment(sweep.path).problems
    assert any("steps.parquet" in each for each in problems)
    assert any("it is a run of cell" in each for each in problems)
    runs = Runs()
    work(sweep, runs)
    assert len(runs.asked) == 3
    assert kinds(sweep) == [DONE] * 3
    kept = [path.name for path in sweep.directory(torn).glob("lease-2/published/*")]
    assert kept == ["rejected"]


def test_planning_again_keeps_what_is_done_and_adds_what_is_new(make_sweep: MakeSweep) -> None:
    runs = Runs()
    work(make_sweep({"backend": ["torch"]}), runs)
    sweep = make_sweep({"backend": ["torch", "sdpa"]}, repeats=2)
    assert kinds(sweep) == [DONE, WAITING, WAITING, WAITING] and left_out(sweep) == 0
    work(sweep, runs)
    assert len(runs.asked) == 4 and kinds(sweep) == [DONE] * 4


def test_a_changed_campaign_never_mixes_with_what_it_was(make_sweep: MakeSweep, tmp_path: Path) -> None:
    before = make_sweep({"backend": ["torch", "sdpa"]})
    work(before, Runs())
    after = make_sweep({"backend": ["torch"]}, output_lengths="fixed:7")
    assert kinds(after) == [WAITING] and left_out(after) == 2
    work(after, Runs())
    assert [len(runs) for runs in load(after.path).arms.values()] == [1]
    again = make_sweep({"backend": ["torch", "sdpa"]})
    assert kinds(again) == [DONE, DONE] and left_out(again) == 1
    (tmp_path / "other.toml").write_text((tmp_path / "campaign.toml").read_text())
    with pytest.raises(HarnessError, match="holds the campaign 'campaign'"):
        plan(read_campaign(tmp_path / "other.toml"), again.path, "")


def test_a_directory_of_something_else_is_refused(make_sweep: MakeSweep, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.tex").touch()
    with pytest.raises(HarnessError, match="holds no sweep"):
        make_sweep({"backend": ["torch"]})


def test_a_cell_that_is_not_what_was_planned_is_not_run(make_sweep: MakeSweep) -> None:
    sweep, runs = make_sweep({"backend": ["torch"]}), Runs()
    file = sweep.directory(sweep.cells[0]) / "cell.json"
    file.write_text(file.read_text().replace("fixed:5", "fixed:6"))
    work(sweep, runs)
    assert runs.asked == []
    assert "is not what was planned" in Look(sweep).at(sweep.cells[0]).note


def test_a_file_that_changed_since_it_was_planned_is_not_run(make_sweep: MakeSweep, tmp_path: Path) -> None:
    trace = tmp_path / "mine.jsonl"
    trace.write_text("{}")
    sweep, runs = make_sweep({"backend": ["torch"]}, workload=str(trace)), Runs()
    trace.write_text("{} ")
    work(sweep, runs)
    assert runs.asked == []
    assert "is not here as it was planned" in Look(sweep).at(sweep.cells[0]).note


def test_once_is_one_cell(make_sweep: MakeSweep) -> None:
    sweep, runs = make_sweep({"backend": ["torch", "sdpa"]}), Runs()
    work(sweep, runs, once=True)
    assert len(runs.asked) == 1
    claim(sweep.directory(sweep.cells[1]))
    work(sweep, runs, once=True)
    assert len(runs.asked) == 1, "the other one is taken, and nobody waits for it"


def test_a_lost_lease_ends_the_run_and_the_worker_goes_on(make_sweep: MakeSweep) -> None:
    sweep = make_sweep({"backend": ["torch", "sdpa"]})
    silent: list[str] = []

    def measure(options: RunOptions, out: Path, beat: Callable[[], None]) -> Ended:
        if options.backend == "torch" and not silent:
            silent.append("once")
            out.parent.rename(out.parent.with_name("broken"))  # as another would, had this one been silent
        return Runs()(options, out, beat)

    said: list[str] = []
    Worker(sweep.path, said.append, measure, poll_s=0.01).work()
    assert any("took over torch" in line for line in said)
    assert kinds(sweep) == [DONE, DONE]


def test_nothing_of_a_result_names_the_machine(make_sweep: MakeSweep, tmp_path: Path) -> None:
    sweep = make_sweep({"backend": ["torch"]})
    work(sweep, Runs())
    measured = Measured.read(sweep.result(sweep.cells[0]))
    assert measured is not None and measured.seconds > 0
    text = (sweep.result(sweep.cells[0]) / MEASURED_FILE).read_text()
    assert json.loads(text) == asdict(measured)
    assert platform.node() not in text and str(tmp_path) not in text


def cell(condition: str, block: int, arm: str) -> Cell:
    return Cell(f"{condition}{block}{arm}", arm, condition, block, block)


def test_the_arms_of_a_comparison_run_on_the_host_that_began_them() -> None:
    one, two, three, four = (cell("c1", block, arm) for block in (0, 1) for arm in "ab")
    states = {
        one: State(DONE, host="A"),
        two: State(WAITING),
        three: State(WAITING),
        four: State(WAITING),
    }
    assert [*in_turn(states, "A")] == [two, three, four]
    assert [*in_turn(states, "B")] == [three, four, two], "A has gone home: its rest is last"
    states[three] = State(RUNNING, host="A")
    assert [*in_turn(states, "B")] == [], "A is at work and will do them all"
    assert [*in_turn(states, "A")] == [two, four]


def test_runs_of_two_hosts_or_two_states_of_the_code_are_no_pair(make_sweep: MakeSweep) -> None:
    sweep = make_sweep({"backend": ["torch", "sdpa"]}, repeats=2)
    work(sweep, Runs())
    assert len(set(load(sweep.path).values["block"])) == 2
    moved = sweep.result(sweep.cells[0]) / MEASURED_FILE
    for name in ("host", "code"):
        content = json.loads(moved.read_text())
        moved.write_text(json.dumps(content | {name: "another"}))
        assert len(set(load(sweep.path).values["block"])) == 3
        moved.write_text(json.dumps(content))


def test_points_that_two_kinds_of_device_measured_are_arms_of_their_own(make_sweep: MakeSweep) -> None:
    sweep = make_sweep({"backend": ["torch"]}, repeats=2)
    work(sweep, Runs())
    directory = RunDirectory.open(sweep.result(sweep.cells[0]))
    record = directory.read_record()
    record.system["device"]["name"] = "another script"
    directory.write_record(record)
    assert list(load(sweep.path).arms) == ["torch · another script", "torch · a script"]
    assert FAILED not in {each.how for each in leases(sweep.directory(sweep.cells[0]))}


def test_quantized_cells(make_sweep: MakeSweep) -> None:
    """Schemes, KV caches and sparsity are arms, each with cells of its own that ask for it."""

    class Asking(Runs):
        def __call__(self, options: RunOptions, out: Path, beat: Callable[[], None]) -> Ended:
            schemes.append((options.quantize, options.engine.get("kv_dtype"), options.engine.get("sparsity")))
            return super().__call__(options, out, beat)

    schemes: list[tuple[object, ...]] = []
    sweep = make_sweep(
        {"quantize": ["none", "int8"], "kv_dtype": ["fp8"], "sparsity": ["2:4"]}, repeats=2, backend="torch"
    )
    runs = Asking()
    work(sweep, runs)
    assert kinds(sweep) == [DONE] * 4
    one, other = (("none", "float8_e4m3fn", "2:4"), ("int8", "float8_e4m3fn", "2:4"))
    assert schemes == [one, other, other, one]
    assert {cell.arm for cell in sweep.cells} == {"torch · quantize none", "torch · quantize int8"}


@pytest.mark.slow
def test_the_number_of_devices_is_an_arm(make_sweep: MakeSweep) -> None:
    """Real runs of the bundled model, a process each: on one device, and divided between two processes."""
    sizes = {"model": "tiny", "device": "cpu", "max_len": 64, "max_step_tokens": 64}
    sweep = make_sweep({"tp": [1, 2]}, backend="torch", concurrency=2, **sizes)
    Worker(sweep.path, lambda text: None).work()
    assert kinds(sweep) == [DONE, DONE]
    assert [cell.arm for cell in sweep.cells] == ["torch", "torch · tp 2"]
    for cell, tp in zip(sweep.cells, (1, 2), strict=True):
        record = RunDirectory.open(sweep.result(cell)).read_record()
        assert record.engine["tp"] == tp and record.correctness["passed"] is True
        assert len(record.memory.get("devices", [])) == (tp if tp > 1 else 0)
    assert [arm.label for arm in open_arms([sweep.path])] == ["torch", "torch · tp 2"]
    assert examine_experiment(sweep.path).problems == ()
