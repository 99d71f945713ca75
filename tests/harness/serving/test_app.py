"""The routes of `bench serve` over `tiny`: what clients send, and what they are sent back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from serving_fixtures import CONTEXT, MAX_BODY_BYTES, MAX_SEQS, PROMPT, Server, serving, tiny_engine

from backbench.engine.request import SamplingParams


def asking(ask: Callable[[Server], Awaitable[None]], **options: Any) -> None:
    """Run `ask` against a server."""

    async def main() -> None:
        async with serving(**options) as server:
            await ask(server)

    asyncio.run(main())


def greedy(max_tokens: int) -> tuple[list[int], list[int], str]:
    """The prompt's token ids, and those and the text of its greedy continuation by the engine alone."""
    engine = tiny_engine()
    prompt = engine.tokenizer.encode(PROMPT)
    (done,) = engine.generate([prompt], SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    return prompt, done.token_ids, engine.tokenizer.decode(done.token_ids, skip_special_tokens=True)


def test_a_completion_is_what_the_engine_generates() -> None:
    prompt, token_ids, text = greedy(12)

    async def ask(server: Server) -> None:
        for given in (PROMPT, prompt, [PROMPT], [prompt]):
            reply = await server.complete(prompt=given, max_tokens=12, ignore_eos=True, model="other")
            assert reply.status == 200
            (choice,) = reply.json["choices"]
            assert (choice["text"], choice["finish_reason"], choice["index"]) == (text, "length", 0)
            assert reply.json["usage"] == {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(token_ids),
                "total_tokens": len(prompt) + len(token_ids),
            }
            assert (reply.json["object"], reply.json["model"]) == ("text_completion", "tiny")

    asking(ask)


def test_a_stream_has_an_event_for_each_token_and_one_for_the_usage() -> None:
    _, token_ids, text = greedy(12)

    async def ask(server: Server) -> None:
        options = {"include_usage": True}
        reply = await server.complete(max_tokens=12, ignore_eos=True, stream=True, stream_options=options)
        assert reply.headers["content-type"].startswith("text/event-stream")
        *tokens, last = reply.events
        assert len(tokens) == len(token_ids) and len(reply.chunks) == len(token_ids) + 2
        assert "".join(each["choices"][0]["text"] for each in tokens) == text
        assert [each["choices"][0]["finish_reason"] for each in tokens] == [None] * 11 + ["length"]
        assert "usage" not in tokens[0]
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 12)
        plain = await server.complete(max_tokens=3, ignore_eos=True, stream=True, stream_options=None)
        assert len(plain.events) == 3

    asking(ask)


def test_the_ids_of_tokens_are_given_where_they_are_asked_for() -> None:
    _, token_ids, _ = greedy(12)

    async def ask(server: Server) -> None:
        asked = {"max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
        (choice,) = (await server.complete(**asked)).json["choices"]
        assert choice["token_ids"] == list(token_ids)
        events = (await server.complete(stream=True, **asked)).events
        assert [each["choices"][0]["token_ids"] for each in events] == [[each] for each in token_ids]
        (choice,) = (await server.chat(**asked)).json["choices"]
        assert len(choice["token_ids"]) == 12
        (choice,) = (await server.complete(**asked | {"return_token_ids": False})).json["choices"]
        assert "token_ids" not in choice

    asking(ask)


def test_continuous_usage_counts_up() -> None:
    async def ask(server: Server) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        reply = await server.chat(max_tokens=5, ignore_eos=True, stream=True, stream_options=options)
        counts = [each["usage"]["completion_tokens"] for each in reply.events]
        assert counts == [1, 2, 3, 4, 5, 5]

    asking(ask)


def test_chat_puts_messages_in_the_models_template() -> None:
    engine = tiny_engine()
    prompt = engine.tokenizer.encode(f"user: {PROMPT}\nassistant:")
    (done,) = engine.generate([prompt], SamplingParams(max_tokens=9, ignore_eos=True))

    async def ask(server: Server) -> None:
        parts = [{"type": "text", "text": PROMPT}]
        for content in (PROMPT, parts):
            messages = [{"role": "user", "content": content}]
            reply = await server.chat(messages=messages, max_completion_tokens=9, ignore_eos=True)
            (choice,) = reply.json["choices"]
            assert choice["message"] == {"role": "assistant", "content": done.text}
            assert reply.json["usage"]["prompt_tokens"] == len(prompt)
        stream = await server.chat(max_tokens=9, ignore_eos=True, stream=True)
        deltas = [each["choices"][0]["delta"] for each in stream.events]
        assert [each.get("role") for each in deltas] == ["assistant"] + [None] * 8
        assert "".join(each["content"] for each in deltas) == done.text

    asking(ask)


def test_an_answer_to_chat_may_fill_the_context() -> None:
    async def ask(server: Server) -> None:
        reply = await server.chat(ignore_eos=True)
        assert reply.json["usage"]["total_tokens"] == CONTEXT
        too_long = await server.chat(messages=[{"role": "user", "content": "word " * 400}])
        assert too_long.status == 400 and "context of 256" in too_long.error

    asking(ask)


def test_prompts_and_sequences_are_numbered_together() -> None:
    async def ask(server: Server) -> None:
        asked = {"n": 2, "max_tokens": 4, "ignore_eos": True, "temperature": 1, "seed": 3}
        reply = await server.complete(prompt=["One", "Two", "Three"], **asked)
        assert [each["index"] for each in reply.json["choices"]] == list(range(6))
        assert reply.json["usage"]["completion_tokens"] == 24
        stream = await server.complete(prompt=["One", "Two", "Three"], stream=True, **asked)
        texts = [""] * 6
        for event in stream.events:
            (choice,) = event["choices"]
            texts[choice["index"]] += choice["text"]
        assert texts == [each["text"] for each in reply.json["choices"]]
        assert len(set(texts)) > 3

    asking(ask)


def test_log_probabilities_in_both_shapes() -> None:
    engine = tiny_engine()
    prompt, token_ids, _ = greedy(5)
    params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=True)
    (done,) = engine.generate([prompt], params)
    texts = [engine.tokenizer.decode([token]) for token in token_ids]

    async def ask(server: Server) -> None:
        asked = {"max_tokens": 5, "ignore_eos": True}
        plain = (await server.complete(logprobs=0, **asked)).json["choices"][0]["logprobs"]
        assert plain["tokens"] == texts
        assert plain["token_logprobs"] == pytest.approx(done.logprobs, abs=1e-4)
        assert plain["text_offset"] == [len("".join(texts[:i])) for i in range(5)]
        assert plain["top_logprobs"] is None
        stream = (await server.complete(logprobs=1, stream=True, **asked)).events
        pieces = [each["choices"][0]["logprobs"] for each in stream]
        assert [each["text_offset"][0] for each in pieces] == plain["text_offset"]
        assert [list(each["top_logprobs"][0]) for each in pieces] == [[text] for text in texts]
        reply = await server.chat(logprobs=True, top_logprobs=1, **asked)
        for entry in reply.json["choices"][0]["logprobs"]["content"]:
            assert entry["top_logprobs"] == [{key: entry[key] for key in ("token", "logprob", "bytes")}]
            assert bytes(entry["bytes"]).decode() == entry["token"]
        assert (await server.complete(logprobs=None, **asked)).json["choices"][0]["logprobs"] is None
        for reply in (
            await server.complete(logprobs=5, **asked),
            await server.complete(logprobs=1, **asked | {"temperature": 1}),
            await server.chat(top_logprobs=1, **asked),
        ):
            assert reply.status == 400 and "logprobs" in reply.error

    asking(ask)


def test_a_stop_string_ends_the_text_before_it() -> None:
    _, _, text = greedy(24)
    stop = text[9:13]
    before = text[: text.index(stop)]

    async def ask(server: Server) -> None:
        asked = {"max_tokens": 24, "ignore_eos": True, "stop": ["nowhere to be found", stop]}
        whole = (await server.complete(**asked)).json["choices"][0]
        assert (whole["text"], whole["finish_reason"]) == (before, "stop")
        kept = (await server.complete(include_stop_str_in_output=True, **asked)).json["choices"][0]
        assert kept["text"] == before + stop
        stream = (await server.complete(stream=True, **asked)).events
        assert "".join(each["choices"][0]["text"] for each in stream) == before
        late = (await server.complete(min_tokens=20, **asked)).json
        assert late["usage"]["completion_tokens"] > 20

    asking(ask)


def test_the_same_seed_gives_the_same_text_and_none_a_new_one() -> None:
    async def ask(server: Server) -> None:
        asked = {"max_tokens": 16, "ignore_eos": True, "temperature": 1}
        replies = [await server.complete(**asked, seed=seed) for seed in (1, 1, 2, None, None)]
        texts = [reply.json["choices"][0]["text"] for reply in replies]
        assert texts[0] == texts[1]
        assert len(set(texts)) == 4

    asking(ask)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": None}, "prompt must be"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": [1, "a"]}, "prompt must be"),
        ({"prompt": [[1], [True]]}, "prompt must be"),
        ({"prompt": [10**6]}, "outside the vocabulary"),
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": "\ud800"}, "surrogates"),
        ({"max_tokens": 0}, "max_tokens must lie in"),
        ({"max_tokens": 10**6}, "context of 256"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens"),
        ({"temperature": -1}, "temperature must"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"stop": [""]}, "stop must be"),
        ({"stop": "x" * 1000}, "stop must be"),
        ({"n": MAX_SEQS + 17}, "may run and wait"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True}, "echo is not served"),
        ({"presence_penalty": 0.5}, "presence_penalty is not served"),
        ({"stream_options": {"include_usage": True}}, "needs stream"),
        ({"stream": True, "stream_options": {"wrong": 1}}, "stream_options.wrong"),
        ({"nonsense": 0}, "nonsense"),
        ({"model": 5}, "model must be text"),
    ],
)
def test_what_cannot_be_served_is_named(fields: dict[str, Any], said: str) -> None:
    async def ask(server: Server) -> None:
        reply = await server.complete(**fields)
        assert (reply.status, reply.json["error"]["type"]) == (400, "invalid_request_error")
        assert said in reply.error and len(reply.error) < 300

    asking(ask)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages must be"),
        (["x"], "messages[0] must be an object"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "messages[0].tool_calls"),
    ],
)
def test_messages_that_cannot_be_served_are_named(messages: Any, said: str) -> None:
    async def ask(server: Server) -> None:
        reply = await server.chat(messages=messages)
        assert reply.status == 400 and said in reply.error

    asking(ask)


def test_what_asks_for_nothing_is_ignored() -> None:
    async def ask(server: Server) -> None:
        reply = await server.complete(
            max_tokens=1,
            nonsense=None,
            repetition_penalty=1.0,
            logit_bias={},
            user="me",
            suffix=None,
            top_k=-1,
        )
        assert reply.status == 200

    asking(ask)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"\xff", b'{"temperature": NaN}', b'{"a":' * 5000, b'{"max_tokens": 1' + b"0" * 5000],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    async def ask(server: Server) -> None:
        reply = await server.call("POST", "/v1/completions", body)
        assert reply.status == 400 and "body" in reply.error.lower()

    asking(ask)


def test_a_body_beyond_the_limit_is_refused() -> None:
    async def ask(server: Server) -> None:
        body = b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}'
        told = await server.call("POST", "/v1/completions", body, {"content-length": str(len(body))})
        untold = await server.call("POST", "/v1/completions", body)
        assert (told.status, untold.status) == (413, 413)

    asking(ask)


def test_another_model_or_path_is_not_found() -> None:
    async def ask(server: Server) -> None:
        for reply in (await server.complete(model="gpt"), await server.call("GET", "/v2/completions")):
            assert (reply.status, reply.json["error"]["type"]) == (404, "not_found_error")
        assert (await server.call("GET", "/v1/completions")).status == 405

    asking(ask)


def test_models_health_and_tokens() -> None:
    prompt, _, _ = greedy(1)

    async def ask(server: Server) -> None:
        assert (await server.call("GET", "/health")).status == 200
        models = (await server.call("GET", "/v1/models")).json["data"]
        assert [(each["id"], each["max_model_len"]) for each in models] == [
            ("tiny", CONTEXT),
            ("other", CONTEXT),
        ]
        # What a load generator needs that sends token ids.
        assert {each["vocab_size"] for each in models} == {4096}
        found = (await server.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True})).json
        assert (found["tokens"], found["count"], found["max_model_len"]) == (prompt, len(prompt), CONTEXT)
        assert len(found["token_strs"]) == len(prompt)
        back = await server.post("/detokenize", {"tokens": prompt, "model": "tiny"})
        assert back.json == {"prompt": PROMPT}
        chat = (await server.post("/tokenize", {"messages": [{"role": "user", "content": PROMPT}]})).json
        assert chat["tokens"] == tiny_engine().tokenizer.encode(f"user: {PROMPT}\nassistant:")
        assert (await server.post("/detokenize", {"tokens": [-1]})).status == 400
        assert (await server.post("/tokenize", {})).status == 400

    asking(ask)


def test_the_key_is_asked_for_everywhere_but_of_health() -> None:
    async def ask(server: Server) -> None:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            reply = await server.call("GET", "/v1/models", headers=headers)
            assert (reply.status, reply.json["error"]["type"]) == (401, "authentication_error")
        assert (await server.call("GET", "/metrics")).status == 401
        assert (await server.call("GET", "/health")).status == 200
        assert (
            await server.call("GET", "/v1/models", headers={"authorization": "Bearer secret"})
        ).status == 200

    asking(ask, api_key="secret")


def test_the_request_id_comes_back() -> None:
    async def ask(server: Server) -> None:
        for path in ("/health", "/nowhere"):
            reply = await server.call("GET", path, headers={"x-request-id": "mine-1"})
            assert reply.headers["x-request-id"] == "mine-1"
        assert len((await server.call("GET", "/health")).headers["x-request-id"]) == 32

    asking(ask)


def test_a_full_queue_answers_429_and_has_room_again() -> None:
    async def ask(server: Server) -> None:
        asked = {"max_tokens": 8, "ignore_eos": True, "stream": True}
        replies = await asyncio.gather(*(server.complete(**asked) for _ in range(MAX_SEQS + 6)))
        served = [reply for reply in replies if reply.status == 200]
        refused = [reply for reply in replies if reply.status == 429]
        assert (len(served), len(refused)) == (MAX_SEQS + 2, 4)
        assert all(len(reply.events) == 8 for reply in served)
        assert refused[0].headers["retry-after"] == "1"
        assert refused[0].json["error"]["type"] == "rate_limit_error"
        assert (await server.complete(**asked)).status == 200

    asking(ask, max_queue=2)


@pytest.mark.parametrize("leave_after", [0, 1, 3])
def test_a_client_that_leaves_frees_its_blocks(leave_after: int) -> None:
    async def ask(server: Server) -> None:
        fields = {
            "prompt": [PROMPT, "Another"],
            "n": 2,
            "ignore_eos": True,
            "max_tokens": 200,
            "stream": True,
        }
        reply = await server.post("/v1/completions", fields, leave_after=leave_after)
        assert not reply.ended
        await server.idle()
        assert (
            'request_success_total{model_name="tiny",finished_reason="abort"} 2'
            in server.front.metrics.text()
        )

    asking(ask)


def test_a_client_that_leaves_before_a_whole_answer_frees_its_blocks() -> None:
    async def ask(server: Server) -> None:
        fields = {"prompt": PROMPT, "ignore_eos": True, "max_tokens": 200}
        reply = await server.post("/v1/completions", fields, leave_after=0)
        assert reply.status == 499
        await server.idle()

    asking(ask)


def test_a_failed_engine_is_said_and_health_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    real_step = engine.step

    async def main() -> None:
        async with serving() as server:
            running = asyncio.create_task(server.complete(max_tokens=200, ignore_eos=True, stream=True))
            await asyncio.sleep(0.1)

            def broken(**how: bool) -> None:
                raise RuntimeError("the device is gone")

            monkeypatch.setattr(engine, "step", broken)
            cut = await running
            events = b"".join(cut.chunks).split(b"\n\n")
            assert "the device is gone" in json.loads(events[-2].removeprefix(b"data: "))["error"]["message"]
            assert (await server.call("GET", "/health")).status == 503
            assert (await server.complete()).status == 503
            monkeypatch.setattr(engine, "step", real_step)
            for request_id in list(engine.requests):
                engine.abort(request_id)

    asyncio.run(main())
