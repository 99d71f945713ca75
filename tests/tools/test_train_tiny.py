"""The training script of the bundled models, on a few hundred kilobytes of made-up text."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

# `tools` is no package: its scripts import one another as neighbours, and so does this test.
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import tiny_texts
import train_tiny as script


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One text of about 260 KB: 32 documents, of which number 25 is held out."""
    folder = tmp_path_factory.mktemp("texts")
    words = [
        f"{a}{b}" for a in ("sea", "ship", "whale", "deck", "rope") for b in ("", "s", "ing", "ed", "er")
    ]
    pick = random.Random(0)
    paragraphs = (" ".join(pick.choices(words, k=80)) + ".\n\n" for _ in range(600))
    (folder / "voyage.txt").write_text("".join(paragraphs))
    return folder


@given(st.lists(st.text(min_size=0, max_size=40), max_size=30), st.integers(1, 200))
def test_cutting_loses_nothing_and_cuts_between_paragraphs(paragraphs: list[str], characters: int) -> None:
    text = "\n\n".join(paragraphs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_texts, "DOCUMENT_CHARACTERS", characters)
        documents = list(tiny_texts.cut_documents(text))
    assert "".join(documents) == text
    assert all(d.endswith("\n\n") and len(d) > characters for d in documents[:-1])


def test_held_out_documents_are_not_in_training(texts: Path) -> None:
    corpus = tiny_texts.read_corpus(texts)
    assert len(corpus.held_out) == 1
    assert not set(corpus.held_out) & set(corpus.train)
    total = sum(map(len, corpus.train)) + sum(map(len, corpus.held_out))
    assert total == len((texts / "voyage.txt").read_text())


def test_only_wrapped_prose_is_joined() -> None:
    long = "It was a long line of prose that the margin alone had broken here"
    code = "fn main() {\n    let x = 1;\n}"
    verse = "O that this too too solid flesh would melt\nThaw and resolve itself into a dew"
    listing = f"```\n{long}\n{long}\n```"
    document = "\n\n".join([f"{long}\n{long}\nshort.", code, verse, listing, ""])
    joined = tiny_texts.join_lines(document)
    assert joined == "\n\n".join([f"{long} {long} short.", code, verse, listing, ""])


def test_folder_without_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(SystemExit, match=r"holds no \.txt or \.md text above"):
        tiny_texts.read_corpus(tmp_path)


def test_tokenizer_is_deterministic_and_lossless(texts: Path) -> None:
    corpus = tiny_texts.read_corpus(texts)
    tokenizer = script.train_tokenizer(corpus.train)
    assert tokenizer.to_str() == script.train_tokenizer(corpus.train).to_str()
    assert tokenizer.token_to_id(script.END_OF_TEXT) == 0
    for text in ("sea ships\n\n  whaling", "café “naïve” 鯨 🐋 \x00\t"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_stream_separates_documents(texts: Path) -> None:
    corpus = tiny_texts.read_corpus(texts)
    stream = script.encode_documents(script.train_tokenizer(corpus.train), corpus.train)
    assert stream[0] == stream[-1] == 0
    assert int((stream == 0).sum()) == len(corpus.train) + 1


def test_schedule_rises_then_falls_to_zero() -> None:
    shares = [script.learning_rate_share(step / 1000, 0.03) for step in range(1001)]
    peak = shares.index(max(shares))
    assert 29 <= peak <= 31 and shares[peak] == pytest.approx(1)
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert shares[0] < 0.05 and shares[-1] == pytest.approx(0)


@pytest.mark.parametrize("dropout", ["0", "0.2"])
def test_three_steps_train_and_write_a_checkpoint(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dropout: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = f"--data {texts} --out {tmp_path} --steps 3 --batch 1 --window-tokens 128"
    script.main([*options.split(), "--device", "cpu", "--dropout", dropout])

    output = capsys.readouterr().out.splitlines()
    losses = [float(line.split("validation")[1]) for line in output if line.startswith("step")]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    card = (tmp_path / "README.md").read_text()
    final = float(output[-1].split()[2])
    assert f"**{final:.4f} nats per token**" in card
    assert "| voyage | not known to the training script |" in card
    assert "3 steps of 1 x 128 tokens" in card and "--steps 3 --seed 0" in card

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.dtype in (torch.float32, torch.bfloat16)
    held_out = script.encode_documents(tokenizer.backend_tokenizer, tiny_texts.read_corpus(texts).held_out)
    # The card rounds to four decimals; the same fp32 sums on the same machine differ by less than that.
    assert script.validation_loss(model, held_out, autocast=False) == pytest.approx(final, abs=2e-4)


def test_time_limit_ends_training_with_an_annealed_rate(texts: Path, tmp_path: Path) -> None:
    options = f"--data {texts} --out {tmp_path} --batch 1 --window-tokens 16 --device cpu"
    script.main([*options.split(), "--max-seconds", "0.2"])
    card = (tmp_path / "README.md").read_text()
    steps = int(card.split(" steps of 1 x 16")[0].split("\n")[-1].replace(",", ""))
    assert 1 <= steps < script.RECIPE.steps


def test_training_goes_on_from_a_checkpoint(texts: Path, tmp_path: Path) -> None:
    options = f"--data {texts} --steps 1 --batch 1 --window-tokens 16 --device cpu"
    first, second = tmp_path / "first", tmp_path / "second"
    script.main([*options.split(), "--out", str(first)])
    script.main(
        [*options.split(), "--out", str(second), "--start", str(first), "--seed", "1", "--learning-rate", "0"]
    )
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert f"--start {first}" in (second / "README.md").read_text()
