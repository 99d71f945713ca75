"""`bench serve` over engines that speculate or lie on several devices: the answers of the plain one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from click.testing import CliRunner
from parallel_fixtures import gone
from serving_fixtures import CONTEXT, MAX_SEQS, parse, serving, tiny_engine

from backbench.engine.engine import Engine
from backbench.errors import BackendError, EngineError
from backbench.harness.commands.serve import serve
from backbench.harness.serving.options import serve_options
from backbench.harness.serving.server import open_engine

SIZES = {"max_seqs": MAX_SEQS, "max_len": CONTEXT, "num_blocks": 64, "max_step_tokens": 256}
REPEATING = "one two three four " * 6
ASKED: list[dict[str, Any]] = [
    {"prompt": REPEATING, "max_tokens": 40},
    {"temperature": 1, "seed": 5, "n": 2, "max_tokens": 20, "ignore_eos": True},
    {"prompt": ["The first", REPEATING], "temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 3},
    {"prompt": REPEATING, "stop": ["four"], "max_tokens": 60, "min_tokens": 3},
]


def opened(**how: Any) -> Engine:
    return open_engine(serve_options("tiny", {"backend": "torch", "device": "cpu"} | SIZES | how))


async def answers(engine: Engine) -> tuple[list[Any], str]:
    """What every request of ASKED is answered, all at once, and a chat token by token; and /metrics."""
    async with serving(engine=engine) as server:
        replies = await asyncio.gather(*(server.complete(**asked) for asked in ASKED))
        chat = await server.chat(max_tokens=12, stream=True)
        counted = server.front.metrics.text()
    assert [reply.status for reply in replies] == [200] * len(ASKED)
    choices = [reply.json["choices"] for reply in replies]
    return [*choices, [event["choices"] for event in chat.events]], counted


@pytest.mark.parametrize(
    "how",
    [
        {"speculate": "ngram:3"},
        {"speculate": "draft:tiny-draft:2"},
        {"tp": 2, "collectives": "torch"},
        {"tp": 2, "speculate": "draft:tiny-draft:2"},
    ],
    ids=["n-grams", "a model that drafts", "two devices", "both"],
)
def test_answers_are_those_of_the_plain_engine(how: dict[str, Any]) -> None:
    plain, _ = asyncio.run(answers(tiny_engine()))
    with opened(adaptive_drafts=False, **how) as engine:
        pids = [] if engine.ranks is None else engine.ranks.team.pids
        found, counted = asyncio.run(answers(engine))
        assert found == plain
    assert gone(pids)
    accepted = parse(counted).get("backbench:spec_decode_num_accepted_tokens_total", 0)
    assert (accepted > 0) == ("speculate" in how)


def test_what_became_of_drafts_is_in_the_answer_and_in_the_metrics() -> None:
    async def main() -> None:
        async with serving(engine=engine, vllm_metrics=True) as server:
            asked = {"prompt": REPEATING, "max_tokens": 40, "ignore_eos": True}
            whole = (await server.complete(**asked)).json
            text = b"".join((await server.call("GET", "/metrics")).chunks).decode()
            options = {"include_usage": True}
            stream = (await server.complete(**asked, stream=True, stream_options=options)).events
            several = (await server.complete(**asked, n=2)).json
        told = whole["metrics"]["speculative_decoding"]
        assert stream[-1]["metrics"] == whole["metrics"]
        assert not any("metrics" in event for event in stream[:-1]) and "metrics" not in several
        histogram = told["acceptance_histogram"]
        assert (len(histogram), told["num_spec_tokens"]) == (4, 3)
        steps, accepted = told["num_spec_steps"], told["num_accepted_draft_tokens"]
        assert sum(histogram) == steps > 0
        assert sum(count * length for length, count in enumerate(histogram)) == accepted > 0
        assert steps + accepted < 40, (
            "a step gives one token more than it accepts, the first one of the prompt"
        )
        assert told["mean_acceptance_length"] == pytest.approx(1 + accepted / steps)
        assert told["draft_acceptance_rate"] == pytest.approx(accepted / told["num_draft_tokens"])
        counted = parse(text)
        for prefix in ("backbench", "vllm"):
            name = f"{prefix}:spec_decode_num"
            assert counted[f"{name}_drafts_total"] == steps
            assert counted[f"{name}_draft_tokens_total"] == told["num_draft_tokens"]
            assert counted[f"{name}_accepted_tokens_total"] == accepted
            places = [counted[f"{name}_accepted_tokens_per_pos_total[{place}]"] for place in range(3)]
            assert places == [sum(histogram[place + 1 :]) for place in range(3)]
            assert f"{name}_accepted_tokens_per_pos_total[3]" not in counted

    with opened(speculate="ngram:3", adaptive_drafts=False) as engine:
        asyncio.run(main())


def test_an_engine_that_does_not_speculate_counts_no_drafts() -> None:
    async def main() -> None:
        async with serving() as server:
            assert "metrics" not in (await server.complete(max_tokens=4)).json
            assert "spec_decode" not in server.front.metrics.text()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (("--tp", "3"), BackendError, "cannot be divided among 3 devices"),
        (("--collectives", "torch"), BackendError, "--collectives is for several devices; give --tp as well"),
        (("--speculate", "draft:tinny:2"), EngineError, "Unknown model"),
        (("--speculate", "ngram:99"), EngineError, "must lie in 1 to 15"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_starts(
    arguments: tuple[str, ...], kind: type[Exception], words: str
) -> None:
    given = ["tiny", "--port", "0", "-b", "torch", "--device", "cpu", *arguments]
    done = CliRunner().invoke(serve, given)
    assert isinstance(done.exception, kind) and words in str(done.exception)
    assert len(str(done.exception)) < 300
