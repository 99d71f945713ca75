"""What a campaign file asks for, in which order, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import BackbenchError
from backbench.harness.sweep.campaign import Campaign, defines_condition, read_campaign
from backbench.harness.sweep.cells import planned

BASE = '[base]\nworkload = "synthetic"\nbackend = "torch"\n'


def campaign(tmp_path: Path, text: str) -> Campaign:
    file = tmp_path / "night.toml"
    file.write_text(text)
    return read_campaign(file)


def test_a_matrix_less_what_is_excluded_and_what_is_included(tmp_path: Path) -> None:
    found = campaign(
        tmp_path,
        """
        repeats = 2
        [base]
        workload = "synthetic"
        rate = 3
        [base.engine]
        max-seqs = 8
        [matrix]
        backend = ["torch", "sdpa", "triton"]
        concurrency = [1, 4]
        [[exclude]]
        backend = "torch"
        concurrency = 4
        [[include]]
        backend = "sdpa"
        concurrency = 4
        max-seqs = 2
        """,
    )
    assert (found.name, found.repeats) == ("night", 2)
    assert [point.name for point in found.points] == [
        "torch · max_seqs 8 · concurrency 1",
        "sdpa · max_seqs 8 · concurrency 1",
        "triton · max_seqs 8 · concurrency 1",
        "sdpa · max_seqs 8 · concurrency 4",
        "triton · max_seqs 8 · concurrency 4",
        "sdpa · max_seqs 2 · concurrency 4",
    ]
    assert all("rate" not in point.options.load for point in found.points), (
        "one way to offer replaces another"
    )


def test_the_arms_of_a_condition_take_turns_whatever_the_order_of_the_matrix(tmp_path: Path) -> None:
    text = BASE.replace('backend = "torch"\n', "") + '[matrix]\nbackend = ["torch", "sdpa"]\nrate = [1, 2]\n'
    found = campaign(tmp_path, "repeats = 2\n" + text)
    sweep, _ = planned(found, tmp_path / "out", "")
    assert [(cell.block, cell.condition, cell.arm) for cell in sweep.cells] == [
        (0, "rate 1", "torch"),
        (0, "rate 1", "sdpa"),
        (0, "rate 2", "torch"),
        (0, "rate 2", "sdpa"),
        (1, "rate 2", "sdpa"),
        (1, "rate 2", "torch"),
        (1, "rate 1", "sdpa"),
        (1, "rate 1", "torch"),
    ]
    assert {cell.seed - cell.block for cell in sweep.cells} == {0}


def test_what_makes_another_question_is_a_condition_and_what_answers_it_an_arm() -> None:
    asked = ["workload", "model", "dtype", "rate", "concurrency", "input_lengths", "slo"]
    answers = ["backend", "attention", "max_seqs", "graphs", "device"]
    assert [name for name in asked if defines_condition(name)] == asked
    assert not any(map(defines_condition, answers))


def test_a_campaign_of_one_point_has_a_name_for_it(tmp_path: Path) -> None:
    (point,) = campaign(tmp_path, BASE).points
    assert (point.name, point.condition) == ("torch", "")


@given(order=st.permutations(["workload", "rate", "max_seqs", "backend"]), dashes=st.booleans())
def test_a_cell_is_what_it_runs_however_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], dashes: bool
) -> None:
    values = {
        "workload": '"synthetic"',
        "rate": "2" if dashes else "2.0",
        "max_seqs": "4",
        "backend": '"torch"',
    }
    lines = [f"{name.replace('_', '-') if dashes else name} = {values[name]}" for name in order]
    folder = tmp_path_factory.mktemp("x")
    text = "[base]\n" + "\n".join(lines) + "\n"
    (cell,) = planned(campaign(folder, text), folder / "out", "")[0].cells
    flat = BASE + '[matrix]\nrate = [2]\nmax_seqs = [4]\ndtype = ["fp32"]\n'
    (other,) = planned(campaign(folder, flat), folder / "out", "")[0].cells
    (same,) = planned(campaign(folder, flat.replace('dtype = ["fp32"]', "")), folder / "out", "")[0].cells
    assert cell.id == same.id != other.id


def test_another_content_of_a_file_is_another_cell(tmp_path: Path) -> None:
    trace = tmp_path / "mine.jsonl"
    text = f'[base]\nworkload = "{trace}"\nbackend = "torch"\n'
    ids = []
    for content in ("a", "b", "a"):
        trace.write_text(content)
        ids.append(planned(campaign(tmp_path, text), tmp_path / "out", "")[0].cells[0].id)
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("repeat = 2\n" + BASE, ["'repeat'", "did you mean repeats"]),
        ("repeats = 0\n" + BASE, ["repeats", "at least 1"]),
        ("repeats = true\n" + BASE, ["repeats", "whole number"]),
        ("repeats = [1]\n" + BASE, ["repeats", "whole number"]),
        ('name = "../up"\n' + BASE, ["name", "'../up'"]),
        (BASE + "rat = 3\n", ["[base]", "'rat'", "did you mean rate"]),
        (BASE + 'out = "x"\n', ["out", "set by the sweep"]),
        (BASE + "repeat = 3\n", ["repeat is set by the sweep", "repeats = N"]),
        (BASE + "find_load = true\n", ["find_load is set by the sweep", "into the matrix"]),
        (BASE + "[matrix]\nrat = [3]\n", ["[matrix]", "'rat'"]),
        (BASE + "[matrix]\nrate = 3\n", ["rate must be a list"]),
        (BASE + "[matrix]\nrate = []\n", ["rate must be a list"]),
        (BASE + "[matrix]\nrate = [1, -3]\n", ["rate = -3", "--rate must be"]),
        (BASE + "[matrix]\nmax_seqs = ['a']\n", ["max_seqs = a", "--max-seqs must be a whole number"]),
        (BASE + "[matrix]\nrate = [1, 1]\n", ["asks twice", "rate = 1"]),
        (BASE + "[matrix]\nrate = [1]\n[[exclude]]\nrate = 2\n", ["[[exclude]] rate = 2"]),
        (BASE + "[matrix]\nrate = [1]\n[[exclude]]\nrate = 1\n", ["asks for 0 points"]),
        (BASE + "[[include]]\n", ["[[include]] must hold options"]),
        (BASE + "[base.engine]\nrate = 2\n", ["rate belongs into [load]"]),
        ('[base]\nworkload = "synthetic"\nbackend = "torch,sdpa"\n', ["backend = [", "[matrix]"]),
        ('[base]\nworkload = "synthetic"\n', ["--backend"]),
        ("= 3", ["no TOML file"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(BackbenchError) as caught:
        campaign(tmp_path, text)
    said = str(caught.value)
    assert caught.value.exit_code == 2 and len(said) < 300 and "\n" not in said
    assert all(word in said for word in words), said
