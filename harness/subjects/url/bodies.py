"""A request of a workload as the body of an HTTP request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbench.errors import HarnessError
from backbench.harness.subjects.url.servers import Server
from backbench.workloads.request import Request

TOKENIZER_FILE = "tokenizer.json"


class Tokenizer:
    """A model's tokenizer, from its file; needs the library `tokenizers` and no torch."""

    def __init__(self, path: Path) -> None:
        """Raises HarnessError where there is none."""
        from tokenizers import Tokenizer as Library

        file = path / TOKENIZER_FILE if path.is_dir() else path
        try:
            self._library = Library.from_file(str(file))
        except Exception as error:  # the library raises Exception itself
            said = " ".join(str(error).split())[:100]
            raise HarnessError(f"--tokenizer {path} is no {TOKENIZER_FILE} and holds none: {said}.") from None

    @property
    def vocab_size(self) -> int:
        return int(self._library.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Without tokens that a model adds to every text."""
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """A text that shows every token, special ones too; encoding it may give others."""
        return str(self._library.decode(list(tokens), skip_special_tokens=False))


@dataclass(frozen=True)
class Bodies:
    """How requests of one run are written for one server."""

    server: Server
    api: str
    model: str
    tokenizer: Tokenizer | None = None
    token_ids: bool = False
    """Ask for the ids of generated tokens, where the server can give them."""

    def __post_init__(self) -> None:
        if self.as_text and self.tokenizer is None:
            why = "/chat/completions takes" if self.api == "chat" else f"{self.server.title} takes"
            raise HarnessError(f"{why} prompts as text only; give the model's tokenizer by --tokenizer.")

    @property
    def as_text(self) -> bool:
        """Prompts are sent as text, whose tokens the server may count otherwise."""
        return self.api == "chat" or not self.server.token_prompts

    def body(self, request: Request) -> dict[str, Any]:
        """The fields as sent; what the server does not take is left out."""
        server = self.server
        found: dict[str, Any] = {"model": self.model}
        prompt: Any = list(request.prompt)
        if self.as_text:
            assert self.tokenizer is not None
            prompt = self.tokenizer.decode(prompt)
        if self.api == "chat":
            found |= {
                "messages": [{"role": "user", "content": prompt}],
                server.chat_limit: request.output_tokens,
            }
        else:
            found |= {"prompt": prompt, "max_tokens": request.output_tokens}
        found |= {"temperature": request.temperature, "seed": request.seed, "stream": True}
        found["stream_options"] = {"include_usage": True}
        if server.continuous_usage:
            found["stream_options"]["continuous_usage_stats"] = True
        if server.ignore_eos:
            found["ignore_eos"] = True
        if self.token_ids and server.token_ids:
            found["return_token_ids"] = True
        return found

    def encode(self, request: Request) -> bytes:
        """The body as UTF-8 JSON."""
        return json.dumps(self.body(request), separators=(",", ":")).encode()

    def describe(self) -> dict[str, Any]:
        """For the record: how prompts and lengths were asked for."""
        return {
            "prompts": "text" if self.as_text else "token ids",
            "output_length": "exact (ignore_eos)"
            if self.server.ignore_eos
            else "at most: EOS ends an answer",
            "tokens_of_a_chunk": "counted by the server"
            if self.server.continuous_usage
            else "one where its total equals the chunks, else unknown",
        }
