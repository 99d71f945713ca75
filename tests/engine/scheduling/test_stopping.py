"""Stop strings are seen as soon as a token completes one, also across cut characters."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backbench.engine.scheduling.stopping import StopWatcher


class ByteTokenizer:
    """One token a byte of UTF-8; a cut character decodes to a replacement mark."""

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=3))
def test_stops_at_the_first_token_whose_text_holds_a_stop(text: str, stops: list[str]) -> None:
    tokens = list(text.encode())
    tokenizer = ByteTokenizer()

    def holds(count: int) -> bool:
        return any(stop in tokenizer.decode(tokens[:count]) for stop in stops)

    expected = next((i for i in range(1, len(tokens) + 1) if holds(i)), None)
    watcher = StopWatcher(tokenizer, stops)
    seen = next((i for i, token in enumerate(tokens, start=1) if watcher.push(token)), None)
    assert seen == expected
