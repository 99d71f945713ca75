"""Which server it is, what is asked of it, and what a run may say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from faulty_server import Exchange, FaultyServer

from backbench.errors import HarnessError
from backbench.harness.options import run_options
from backbench.harness.subjects.url.asked import describe, headers_of
from backbench.harness.subjects.url.bodies import Bodies, Tokenizer
from backbench.harness.subjects.url.options import ServerOptions, parse_url
from backbench.harness.subjects.url.servers import COUNTERS, GAUGES, SERVERS, identify
from backbench.workloads.request import Request

ROOT = Path(__file__).parents[4]
REQUEST = Request(3, 0, (5, 6, 7), 9, temperature=0.5, seed=11)
ASKED = {"workload": "synthetic", "url": "http://127.0.0.1:8000/v1"}


def models(owned_by: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": "small", "owned_by": owned_by}]}


@pytest.mark.parametrize(
    ("owned_by", "name"),
    [
        ("vllm", "vllm"),
        ("sglang", "sglang"),
        ("tensorrt_llm", "tensorrt-llm"),
        ("llamacpp", "llama.cpp"),
        ("Triton Inference Server", "triton"),
        ("backbench", "backbench"),
        ("backbench-null", "null"),
        ("organization-owner", "openai"),
    ],
)
def test_a_server_is_known_by_its_list_of_models(owned_by: str, name: str) -> None:
    assert identify(models(owned_by), {}, "") == name


def test_or_by_its_header_or_its_metrics() -> None:
    assert identify({}, {"Server": "llama.cpp"}, "") == "llama.cpp"
    assert identify({}, {"Server": "uvicorn"}, 'vllm:num_requests_running{engine="0"} 1\n') == "vllm"
    assert identify(models("someone/model"), {}, "# HELP x\ntgi_queue_size 3\n") == "tgi"
    assert identify({"data": None}, {}, "") == identify({"data": [7]}, {}, "") == "openai"
    assert identify({"data": 7}, {}, "") == identify({"data": [{"owned_by": ["vllm"]}]}, {}, "") == "openai"


def test_the_metrics_are_all_named() -> None:
    for server in SERVERS.values():
        assert server.metrics.keys() <= {*COUNTERS, *GAUGES}


def test_prompts_are_token_ids_where_they_are_taken() -> None:
    body = Bodies(SERVERS["vllm"], "completions", "small").body(REQUEST)
    assert body["prompt"] == [5, 6, 7]
    assert (body["max_tokens"], body["temperature"], body["seed"], body["stream"]) == (9, 0.5, 11, True)
    assert body["ignore_eos"] is True
    assert json.loads(Bodies(SERVERS["vllm"], "completions", "small").encode(REQUEST)) == body


def test_what_a_server_does_not_take_is_left_out() -> None:
    body = Bodies(SERVERS["openai"], "completions", "small").body(REQUEST)
    assert "ignore_eos" not in body
    assert body["stream_options"] == {"include_usage": True}
    assert Bodies(SERVERS["openai"], "completions", "small").describe()["output_length"].startswith("at most")


def test_ids_of_tokens_are_asked_for_where_sessions_need_them() -> None:
    asked = Bodies(SERVERS["vllm"], "completions", "small", token_ids=True).body(REQUEST)
    assert asked["return_token_ids"] is True
    assert "return_token_ids" not in Bodies(SERVERS["sglang"], "completions", "m", token_ids=True).body(
        REQUEST
    )


@pytest.mark.parametrize(
    ("server", "api"), [("tgi", "completions"), ("triton", "completions"), ("vllm", "chat")]
)
def test_text_needs_a_tokenizer(server: str, api: str) -> None:
    with pytest.raises(HarnessError, match="--tokenizer"):
        Bodies(SERVERS[server], api, "small")


def tokenizer_file() -> Path:
    return ROOT / "engine" / "checkpoints" / "tiny" / "tokenizer.json"


def test_text_is_what_the_tokens_say() -> None:
    tokenizer = Tokenizer(tokenizer_file())
    tokens = tokenizer.encode("the quick brown fox")
    request = Request(0, 0, tuple(tokens), 4)
    chat = Bodies(SERVERS["openai"], "chat", "small", tokenizer).body(request)
    assert chat["messages"] == [{"role": "user", "content": "the quick brown fox"}]
    assert chat["max_completion_tokens"] == 4 and "max_tokens" not in chat
    text = Bodies(SERVERS["tgi"], "completions", "small", Tokenizer(tokenizer_file().parent)).body(request)
    assert text["prompt"] == "the quick brown fox"
    assert 0 < tokenizer.vocab_size < 2**24


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(HarnessError, match="--tokenizer") as caught:
            Tokenizer(path)
        assert len(str(caught.value)) < 300


async def unused(exchange: Exchange) -> None:
    raise AssertionError("nothing is to be sent")


def test_a_server_is_asked_what_it_is() -> None:
    card = {"max_model_len": 512, "vocab_size": 300}
    with FaultyServer(unused, "vllm", card) as server:
        found = describe(ServerOptions(url=server.url))
    assert (found.kind, found.model, found.max_len, found.vocab_size) == ("vllm", "small", 512, 300)
    assert found.server is SERVERS["vllm"] and not found.kind_stated


def test_llama_cpp_says_it_elsewhere_and_an_option_wins() -> None:
    card = {"max_model_len": None, "meta": {"n_ctx_train": 2048, "n_vocab": 700}}
    with FaultyServer(unused, "llamacpp", card) as server:
        found = describe(ServerOptions(url=server.url))
        stated = describe(
            ServerOptions(url=server.url, server="sglang", url_model="other", metrics_url="none")
        )
    assert (found.kind, found.max_len, found.vocab_size) == ("llama.cpp", 2048, 700)
    assert (stated.kind, stated.model, stated.max_len, stated.metrics_url) == ("sglang", "other", None, None)


def test_no_server_is_one_line() -> None:
    with pytest.raises(HarnessError, match="No server answers at http") as caught:
        describe(ServerOptions(url="http://127.0.0.1:9/v1"))
    assert len(str(caught.value)) < 300


def test_a_page_that_is_no_list_of_models() -> None:
    with FaultyServer(unused, card={"id": ""}) as server, pytest.raises(HarnessError, match="--url-model"):
        describe(ServerOptions(url=server.url))


def test_a_key_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ServerOptions(url="http://localhost/v1", api_key_env="OUR_KEY")
    monkeypatch.delenv("OUR_KEY", raising=False)
    with pytest.raises(HarnessError, match="OUR_KEY"):
        headers_of(options)
    monkeypatch.setenv("OUR_KEY", "secret")
    assert headers_of(options) == {"Authorization": "Bearer secret"}
    monkeypatch.setenv("OUR_KEY", "sec\r\nret")
    with pytest.raises(HarnessError):
        headers_of(options)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://x/v1", "http://", "http://a b/v1", "http://x:99999/v1", "http://u:p@x/v1",
            "http://x/v1?key=1", "http://x/v1#a", "http://x\n/v1", "http://" + "x" * 2000]
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(HarnessError, match="address") as caught:
        parse_url(url)
    assert len(str(caught.value)) < 300


def test_an_address_ends_without_a_slash() -> None:
    assert parse_url("http://[::1]:8000/v1/") == "http://[::1]:8000/v1"


def test_a_servers_run_needs_no_backend() -> None:
    options = run_options(ASKED | {"api": "chat", "max_len": 100, "concurrency": 3})
    assert options.backend == "url"
    assert options.server == {"url": ASKED["url"], "api": "chat"}
    assert run_options(ASKED | {"backend": "url"}).backend == "url"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"backend": "torch"}, "leave --backend out"),
        ({"model": "shape:qwen3-8b"}, "--model says nothing to the server"),
        ({"collectives": "torch"}, "--collectives says nothing to the server"),
        ({"beams": 4}, "--beams says nothing to the server"),
        ({"tp": 2}, "--tp says nothing to the server"),
        ({"quantize": "int8"}, "--quantize says nothing"),
        ({"max_seqs": 3}, "--max-seqs says nothing"),
        ({"url": None, "backend": "torch", "api": "chat"}, "--api is about a server"),
        ({"url": None}, "A run needs --backend"),
    ],
)
def test_options_of_both_subjects_do_not_mix(given: dict[str, Any], words: str) -> None:
    with pytest.raises(HarnessError, match=words):
        run_options(ASKED | given)
