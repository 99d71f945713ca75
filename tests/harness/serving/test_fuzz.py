"""Random bodies, sound and broken: no server error, no leaked block, no request without its answer."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any

import pytest
from serving_fixtures import Reply, serving, tiny_engine

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
TEXTS = (
    "",
    "a",
    "Hello there",
    "héllo 好 🙂",
    "\ud83d",
    "\x00\x1b[31m",
    "<|endoftext|>",
    "word " * 400,
    "\u202e{{ x }}",
)
NUMBERS = (0, 1, 2, 3, -1, 0.5, 1.0, 1e308, -0.0, 2**31, 2**63, 2**64, 10**30, 4095, 4096)
FIELDS: dict[str, tuple[Any, ...]] = {
    "model": ("tiny", "other", "gpt", ""),
    "max_tokens": (1, 2, 5, 8, 0, 300),
    "max_completion_tokens": (1, 2, 5, 8),
    "min_tokens": (0, 1, 3, 9),
    "n": (1, 2, 3, 100),
    "best_of": (1, 2),
    "temperature": (0, 0.7, 1, 2, 1e-40),
    "top_p": (1, 0.5, 1e-9, 0),
    "top_k": (-1, 0, 1, 50, 10**6),
    "min_p": (0, 0.1, 1),
    "seed": (0, 7, -1, 2**62, 2**64 - 1, 2**64),
    "stop": ("a", ["a", "e"], [""], [], ["é"], "x" * 300),
    "stop_token_ids": ([], [0, 5], [-1], [2**70], ["a"]),
    "ignore_eos": (True, False),
    "stream": (True, False),
    "stream_options": ({"include_usage": True, "continuous_usage_stats": True}, {}, {"x": 1}),
    "logprobs": (True, False, 0, 1, 5),
    "top_logprobs": (0, 1, 20),
    "echo": (False, True),
    "presence_penalty": (0, 1),
    "repetition_penalty": (1.0, 1.1),
    "logit_bias": ({}, {"5": 100}),
    "user": ("me", 5),
    "response_format": ({"type": "text"}, {"type": "json_object"}),
    "skip_special_tokens": (True, False),
    "include_stop_str_in_output": (True, False),
    "add_special_tokens": (True, False),
    "return_token_strs": (True, False),
    "return_token_ids": (True, False, 1),
    "tools": ([], [{}]),
}


def any_value(draw: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = draw.randrange(8 if depth < 4 else 5)
    if kind < 2:
        return draw.choice(TEXTS)
    if kind < 4:
        return draw.choice(NUMBERS)
    if kind == 4:
        return draw.choice((None, True, False))
    values = [any_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return values if kind < 7 else {draw.choice(list(FIELDS)): value for value in values}


def any_tokens(draw: random.Random) -> list[int]:
    return [draw.randrange(4096) for _ in range(draw.choice((1, 3, 17, 40, 300)))]


def any_prompt(draw: random.Random) -> Any:
    ways = (
        lambda: draw.choice(TEXTS),
        lambda: any_tokens(draw),
        lambda: [draw.choice(TEXTS) for _ in range(draw.randrange(4))],
        lambda: [any_tokens(draw) for _ in range(draw.randrange(4))],
        lambda: any_value(draw),
    )
    return draw.choice(ways)()


def any_messages(draw: random.Random) -> Any:
    if draw.random() < 0.1:
        return any_value(draw)
    parts = [{"type": "text", "text": draw.choice(TEXTS)}]
    contents = (draw.choice(TEXTS), parts, any_value(draw))
    roles = ("user", "assistant", "system", any_value(draw))
    return [
        {"role": draw.choice(roles), "content": draw.choice(contents)} for _ in range(draw.randrange(1, 4))
    ]


def any_request(draw: random.Random) -> tuple[str, bytes, int | None]:
    """A path, a body, and after how many chunks the client leaves."""
    path = draw.choice(PATHS[:2] if draw.random() < 0.8 else PATHS)
    fields: dict[str, Any] = (
        {"prompt": any_prompt(draw)} if path != PATHS[1] else {"messages": any_messages(draw)}
    )
    if path == PATHS[3]:
        fields = {"tokens": any_tokens(draw) if draw.random() < 0.7 else any_value(draw)}
    fields["max_tokens"] = draw.choice((1, 4, 8))
    for name in draw.sample(list(FIELDS), draw.choice((0, 1, 2, 4))):
        fields[name] = draw.choice(FIELDS[name]) if draw.random() < 0.9 else any_value(draw)
    if draw.random() < 0.03:
        fields[draw.choice(TEXTS)] = any_value(draw)
    body = json.dumps(fields).encode()
    if draw.random() < 0.1:  # damaged
        at = draw.randrange(len(body))
        damaged = (body[:at], body[:at] + draw.randbytes(3) + body[at:], b"[" * at + body, b"")
        body = draw.choice(damaged)
    leave_after = draw.choice((0, 1, 2)) if draw.random() < 0.1 else None
    return path, body, leave_after


def require_whole(reply: Reply, body: bytes, path: str) -> None:
    """An answer that is one: no server error, and a stream ends as it should."""
    assert 200 <= reply.status < 500, (path, body[:500], reply)
    assert reply.ended, (path, body[:500], reply)
    if reply.status != 200:
        assert reply.error
    elif reply.headers["content-type"].startswith("text/event-stream"):
        assert all("error" not in event for event in reply.events), (path, body[:500])
    else:
        assert reply.json


def fuzz(count: int, seed: int) -> Counter[int]:
    """Send `count` random requests, 24 at a time; returns how often each status was answered."""
    draw = random.Random(seed)
    requests = [any_request(draw) for _ in range(count)]
    statuses: Counter[int] = Counter()
    control = {"max_tokens": 12, "ignore_eos": True}

    async def main() -> None:
        async with serving(max_queue=32) as server:

            async def work() -> None:
                while requests:
                    path, body, leave_after = requests.pop()
                    reply = await server.call("POST", path, body, leave_after=leave_after)
                    statuses[reply.status] += 1
                    if leave_after is None:
                        require_whole(reply, body, path)
                    else:
                        assert reply.status < 500

            before = (await server.complete(**control)).json["choices"]
            async with asyncio.TaskGroup() as group:
                for _ in range(24):
                    group.create_task(work())
            await server.idle()
            assert (await server.complete(**control)).json["choices"] == before
            assert not server.front.metrics._live
            assert not server.front._async_engine._queues

    asyncio.run(main())
    return statuses


def test_some_hundred_random_bodies() -> None:
    statuses = fuzz(400, seed=1)
    assert sum(statuses.values()) == 400
    assert statuses[200] > 60 and statuses[400] > 60, statuses  # both kinds are there


@pytest.mark.slow
def test_ten_thousand_random_bodies() -> None:
    statuses = fuzz(10_000, seed=2)
    assert sum(statuses.values()) == 10_000
    assert tiny_engine().pool.num_used == 0
