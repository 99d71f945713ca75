"""Stop strings: watching one sequence's text as its tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StopWatcher:
    """Decodes a sequence's tokens as they come and says when a stop string has appeared."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._token_ids: list[int] = []
        self._window = 4 * max(len(stop) for stop in stops) + 8
        """Tokens decoded at each push. A token holds at least a byte and a character at most four, so this
        many tokens always cover the longest stop string and the cut character before it."""

    def push(self, token: int) -> bool:
        """Add a token; True when the text now holds a stop string that this token completed."""
        self._token_ids.append(token)
        text = self._tokenizer.decode(self._token_ids[-self._window :])
        return any(stop in text for stop in self._stops)
