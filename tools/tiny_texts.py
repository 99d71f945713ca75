"""The texts of the bundled models: read, cut into documents, held out, and joined into long lines."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCUMENT_CHARACTERS = 8192
HELD_OUT_EVERY = 50  # one document in 50 = 2 % of every text
WRAPPED_CHARACTERS = 50  # no line of a hard-wrapped paragraph but its last is shorter

PUBLIC_DOMAIN = "public domain (Project Gutenberg edition)"
SOURCES = {
    "moby-dick": ("Herman Melville, *Moby-Dick; or, The Whale*", PUBLIC_DOMAIN),
    "pride-and-prejudice": ("Jane Austen, *Pride and Prejudice*", PUBLIC_DOMAIN),
    "sherlock-holmes": ("Arthur Conan Doyle, *The Adventures of Sherlock Holmes*", PUBLIC_DOMAIN),
    "war-and-peace": ("Leo Tolstoy, *War and Peace*, translated by L. and A. Maude", PUBLIC_DOMAIN),
    "tinyshakespeare": ("William Shakespeare, plays (tinyshakespeare)", "public domain"),
    "rust-book": ("*The Rust Programming Language*, The Rust Project Developers", "MIT OR Apache-2.0"),
}


@dataclass(frozen=True)
class Corpus:
    """The documents of every text, training and held out."""

    names: tuple[str, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def held_out_bytes(self) -> int:
        return sum(len(document.encode()) for document in self.held_out)


def read_corpus(folder: Path) -> Corpus:
    """Read and split every text of a folder.

    Raises:
        SystemExit: the folder holds no text, or too little to hold out a document.
    """
    files = [p for p in sorted(folder.glob("*")) if p.name.removesuffix(".gz").endswith((".txt", ".md"))]
    train: list[str] = []
    held_out: list[str] = []
    for path in files:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for index, document in enumerate(cut_documents(raw.decode())):
            # The middle of each 50, so that a text's title page and contents stay in training.
            is_held_out = index % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
            (held_out if is_held_out else train).append(document)
    if not held_out:
        needed_kb = HELD_OUT_EVERY // 2 * DOCUMENT_CHARACTERS // 1000
        raise SystemExit(f"{folder} holds no .txt or .md text above {needed_kb} KB; name another --data.")
    return Corpus(tuple(path.name.split(".")[0] for path in files), tuple(train), tuple(held_out))


def cut_documents(text: str) -> Iterator[str]:
    """Cut a text at the first end of a paragraph past `DOCUMENT_CHARACTERS`; nothing is lost."""
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + DOCUMENT_CHARACTERS)
        end = len(text) if end < 0 else end + 2
        yield text[start:end]
        start = end


def join_lines(document: str) -> str:
    """The document with every hard-wrapped paragraph on one line; verse, lists and code stay as they are."""
    return "\n\n".join(
        paragraph.replace("\n", " ") if is_wrapped_prose(paragraph) else paragraph
        for paragraph in document.split("\n\n")
    )


def is_wrapped_prose(paragraph: str) -> bool:
    """Whether the lines look broken by a margin alone: all but the last long, none indented or fenced."""
    lines = paragraph.split("\n")
    return all(len(line) >= WRAPPED_CHARACTERS for line in lines[:-1]) and not any(
        line.startswith((" ", "\t", "```", "- ", "* ", "|", ">")) for line in lines
    )
