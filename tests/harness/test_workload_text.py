"""Only text needs a tokenizer: it is built at the first text, once, and never for a trace of lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backbench.engine.models.checkpoint import DirectorySource
from backbench.harness.cli import run_command

SMALL = ("-b", "torch", "--warmup", 0, "--max-len", 64, "--max-step-tokens", 64)


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str]]:
    """`bench run` on `tiny` with a trace of this text: (exit code, stderr)."""

    def run(text: str) -> tuple[int, str]:
        path = tmp_path / "trace"
        path.write_text(text)
        words = ("run", "-w", path, *SMALL, "--out", tmp_path / "run")
        try:
            code = run_command([str(each) for each in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tokenizers that were built."""
    made: list[Any] = []
    build = DirectorySource.tokenizer

    def counted(source: DirectorySource) -> Any:
        made.append(build(source))
        return made[-1]

    monkeypatch.setattr(DirectorySource, "tokenizer", counted)
    return made


def without_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DirectorySource, "has_tokenizer", property(lambda source: False))


HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens\n"


def test_lengths_run_on_a_model_without_a_tokenizer(
    bench: Any, built: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_tokenizer(monkeypatch)
    code, errors = bench(HEADER + "0,6,2\n0,5,2\n")
    assert code == 0, errors
    assert not built


def test_a_bad_line_is_refused_before_a_tokenizer_is_built(bench: Any, built: list[Any]) -> None:
    code, errors = bench(HEADER + "0,6,2\n1,x,2\n")
    assert code == 2
    assert "line 3, field num_prefill_tokens: 'x' is no whole number." in errors
    assert not built


def test_text_builds_one_tokenizer(bench: Any, built: list[Any]) -> None:
    body = {"messages": [{"role": "user", "content": "How so?"}], "max_tokens": 2}
    code, errors = bench("\n".join(json.dumps(body) for _ in range(3)))
    assert code == 0, errors
    assert len(built) == 1


def test_text_on_a_model_without_a_tokenizer_says_so(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    without_tokenizer(monkeypatch)
    code, errors = bench('{"prompt": [1], "max_tokens": 2}\n{"prompt": "a", "max_tokens": 2}\n')
    assert code == 2
    assert "line 2, field prompt: text needs a tokenizer; choose a model that has one." in errors
