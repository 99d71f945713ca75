"""One sequence's text, as it becomes certain with each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for the bytes of a character that is not whole yet."""


class TextStream:
    """Decodes tokens as they come: what it returned, put together, is the text of all of them.

    Bytes of a character wait for the rest of it. So does text that may be the beginning of a stop string: the
    engine says when one has appeared, and neither it nor what follows is returned.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        keep_stop: bool = False,
    ) -> None:
        """keep_stop: the stop string that ended the sequence is part of its text."""
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._skip_special_tokens = skip_special_tokens
        self._keep_stop = keep_stop
        self._window: list[int] = []
        """The last tokens: those whose text is known, as what follows depends on it, and others."""
        self._num_known = 0
        self._known = ""
        """Text of the window's known tokens."""
        self._held = ""
        """Decoded text that may be the beginning of a stop string."""

    def push(self, token: int, finish_reason: str | None = None) -> str:
        """Add a token, the last one with the reason why; returns the text that is certain now."""
        self._held += self._decoded(token, last=finish_reason is not None)
        if finish_reason == "stop":
            end = self._stop_at()
        elif finish_reason is not None:
            end = len(self._held)
        else:
            end = self._open_at()
        certain, self._held = self._held[:end], self._held[end:]
        return certain

    def _decoded(self, token: int, *, last: bool) -> str:
        """The new whole characters. A token's text depends on those before it: they are decoded together."""
        self._window.append(token)
        text = self._decode(self._window)
        if len(text) <= len(self._known) or (text.endswith(REPLACEMENT) and not last):
            return ""
        new = text[len(self._known) :]
        del self._window[: self._num_known]
        self._num_known = len(self._window)
        self._known = self._decode(self._window)
        return new

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
        return text

    def _stop_at(self) -> int:
        """Where the text ends that a stop string may have ended; an end-of-sequence token leaves it all."""
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if not found:
            return len(self._held)
        at, stop = min(found)
        return at + len(stop) * self._keep_stop

    def _open_at(self) -> int:
        """Where a stop string may have begun that is not whole yet."""
        held = self._held
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for at in range(max(0, len(held) - longest), len(held)):
            if any(stop.startswith(held[at:]) for stop in self._stops):
                return at
        return len(held)
