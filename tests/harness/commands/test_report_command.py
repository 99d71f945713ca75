"""`bench report`: a page, Markdown or CSV by the suffix, with figures and the history of gates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backbench.harness.cli import run_command

OLD = Path(__file__).parents[2] / "reports" / "fixtures" / "schema-1"
RUNS = [str(OLD / name) for name in ("torch", "sdpa")]
GATE = {
    "schema_version": 1,
    "utc": "2026-01-02T03:04:05+00:00",
    "verdict": "pass",
    "arms": {"baseline": {"ref": "main"}, "candidate": {"ref": "HEAD"}},
    "findings": [
        {
            "metric": "tpot_p50",
            "loss": 0.004,
            "low": -0.01,
            "high": 0.02,
            "margin": 0.03,
            "detectable": 0.015,
        }
    ],
}


def report(*arguments: object) -> int:
    return run_command(["report", *map(str, arguments)])


def test_the_suffix_says_the_kind(tmp_path: Path) -> None:
    for name, start in (("a.html", "<!doctype"), ("a.md", "<!-- a Backbench report"), ("a.csv", "run,")):
        assert report(*RUNS, "-o", tmp_path / name) == 0
        assert (tmp_path / name).read_text().lstrip().startswith(start)


def test_figures_and_gates_are_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = tmp_path / "gates" / "nightly"
    gate.mkdir(parents=True)
    (gate / "gate.json").write_text(json.dumps(GATE))
    out, figures = tmp_path / "a.html", tmp_path / "figures"
    assert report(*RUNS, "-o", out, "--figures", figures, "--gates", tmp_path / "gates", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"report": str(out), "bytes": out.stat().st_size}
    assert {"gates.svg", "ttft.svg", "front.svg"} <= {each.name for each in figures.iterdir()}
    assert "Gate history and noise floor" in out.read_text()
    assert "1.50%" in out.read_text()  # what it could have seen


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*RUNS, "-o", "a.pdf"], "choose a suffix"),
        (["nowhere", "-o", "a.html"], "no run directory"),
        ([*RUNS, "-o", "a.html", "--gates", "nowhere"], "no directory nowhere"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report(*arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said) < 300
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
