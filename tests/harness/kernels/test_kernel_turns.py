"""The process whose kernels are timed in turns: what it answers, line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backbench.harness.kernels.turns import serve

OPTIONS = {
    "backend_names": "sdpa",
    "shapes": "2q1s40,1q30",
    "kinds": "attention",
    "model": "tiny",
    "tokens": "1",
    "dtype": None,
    "block_size": None,
    "prefer": "cpu",
}
WRONG = """
from dataclasses import replace
from backbench.backends.interface import Backend
from backbench.backends.torch.attention import TorchAttention, TorchRunner
from backbench.backends.torch import BACKEND as TORCH

class Short(TorchRunner):
    def run(self, q, cache, batch, out):
        super().run(q, cache, replace(batch, seq_lens=batch.seq_lens - 1), out)

class ShortAttention(TorchAttention):
    def open(self, spec, device):
        return Short(spec, device)

BACKEND = Backend("wrong", "", ShortAttention())
"""


def ask(*questions: dict[str, Any]) -> list[dict[str, Any]]:
    return list(serve(json.dumps(each) for each in questions))


def test_sides_take_turns_and_say_what_ran() -> None:
    sides = {"begin": {"baseline": OPTIONS, "candidate": OPTIONS | {"backend_names": "torch"}}}
    began, *turns = ask(sides, {"turn": "candidate"}, {"turn": "baseline"}, {"turn": "baseline"})
    assert began["baseline"]["wrong"] == [] and began["candidate"]["refused"] == {}
    assert began["baseline"]["dtype"] == "torch.float32"
    assert began["baseline"]["system"]["device"]["vendor"] == "cpu"
    assert "torch" in began["baseline"]["software"]["packages"]
    for turn in turns:
        assert [name.split()[1] for name in turn] == ["2q1s40", "1q30"]
        assert all(name.startswith("attention ") and name.endswith(", eager") for name in turn)
        assert all(0 < seconds < 1 for seconds in turn.values())
    assert turns[1] != turns[2]


def test_a_wrong_kernel_is_told(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    (began,) = ask({"begin": {"candidate": OPTIONS | {"backend_names": str(tmp_path / "wrong.py")}}})
    assert any("2q1s40" in each and "off by" in each for each in began["candidate"]["wrong"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (OPTIONS | {"backend_names": "nonesuch"}, "Unknown backend 'nonesuch'"),
        (OPTIONS | {"shapes": "wide"}, "Attention shape 'wide'"),
        (OPTIONS | {"colour": "red"}, "colour"),
    ],
)
def test_what_cannot_be_set_up_is_one_line(options: dict[str, Any], words: str) -> None:
    (answer,) = ask({"begin": {"baseline": options}})
    assert words in answer["error"] and "\n" not in answer["error"]
