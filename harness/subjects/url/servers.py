"""What each OpenAI-compatible server takes, leaves out, and calls its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

COUNTERS = (
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "preemptions",
    "requests_succeeded",
    "drafts",
    "drafted_tokens",
    "accepted_draft_tokens",
)
"""Metrics that only grow: their difference over the run is recorded."""
GAUGES = ("requests_running", "requests_waiting", "kv_cache_usage")
"""Metrics that are sampled while it runs."""

_VLLM_NAMES = {
    "requests_running": ("num_requests_running",),
    "requests_waiting": ("num_requests_waiting",),
    "kv_cache_usage": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "prompt_tokens": ("prompt_tokens_total",),
    "generation_tokens": ("generation_tokens_total",),
    "prefix_cache_queries": ("prefix_cache_queries_total", "gpu_prefix_cache_queries_total"),
    "prefix_cache_hits": ("prefix_cache_hits_total", "gpu_prefix_cache_hits_total"),
    "preemptions": ("num_preemptions_total",),
    "requests_succeeded": ("request_success_total",),
    "drafts": ("spec_decode_num_drafts_total",),
    "drafted_tokens": ("spec_decode_num_draft_tokens_total",),
    "accepted_draft_tokens": ("spec_decode_num_accepted_tokens_total",),
}


def _prefixed(prefix: str, names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {ours: tuple(prefix + each for each in theirs) for ours, theirs in names.items()}


@dataclass(frozen=True)
class Server:
    """One kind of server. What it does not take is left out of requests, and the record says so."""

    title: str
    owned_by: tuple[str, ...] = ()
    """What it says in `/v1/models` as `owned_by`; "" = found otherwise."""
    header: str | None = None
    """How its `Server` header begins."""
    token_prompts: bool = True
    """`/completions` takes a prompt as a list of token ids."""
    ignore_eos: bool = True
    """Without it an answer may end before its length."""
    continuous_usage: bool = False
    """It says in each chunk how many tokens there are so far."""
    token_ids: bool = False
    """It gives the ids of generated tokens where asked (`return_token_ids`)."""
    version_at: tuple[str, str] = ("version", "version")
    """The page that tells its version, and under which name."""
    chat_limit: str = "max_tokens"
    """The name under which `/chat/completions` takes the number of output tokens."""
    metrics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Ours -> its names of a metric, the newest first."""

    def takes(self) -> dict[str, Any]:
        """For the record: what requests may hold."""
        found = asdict(self)
        return {name: found[name] for name in ("token_prompts", "ignore_eos", "continuous_usage")}


SERVERS: dict[str, Server] = {
    "backbench": Server(
        "Backbench",
        ("backbench",),
        continuous_usage=True,
        token_ids=True,
        metrics=_prefixed("backbench:", _VLLM_NAMES),
    ),
    "vllm": Server(
        "vLLM",
        ("vllm",),
        continuous_usage=True,
        token_ids=True,
        metrics=_prefixed("vllm:", _VLLM_NAMES),
    ),
    "sglang": Server(
        "SGLang",
        ("sglang",),
        continuous_usage=True,
        version_at=("get_server_info", "version"),
        metrics=_prefixed(
            "sglang:",
            {
                "requests_running": ("num_running_reqs",),
                "requests_waiting": ("num_queue_reqs",),
                "kv_cache_usage": ("token_usage",),
                "prompt_tokens": ("prompt_tokens_total",),
                "generation_tokens": ("generation_tokens_total",),
                "prefix_cache_hits": ("cached_tokens_total",),
                "preemptions": ("num_retracted_reqs_total", "num_retracted_reqs"),
            },
        ),
    ),
    "tgi": Server(
        "Text Generation Inference",
        token_prompts=False,
        ignore_eos=False,
        version_at=("info", "version"),
        metrics={
            "requests_running": ("tgi_batch_current_size",),
            "requests_waiting": ("tgi_queue_size",),
            "prompt_tokens": ("tgi_request_input_length_sum",),
            "generation_tokens": ("tgi_request_generated_tokens_sum",),
            "requests_succeeded": ("tgi_request_success",),
        },
    ),
    "tensorrt-llm": Server("TensorRT-LLM", ("tensorrt_llm",), continuous_usage=True),
    "llama.cpp": Server(
        "llama.cpp",
        ("llamacpp",),
        header="llama.cpp",
        version_at=("props", "build_info"),
        metrics=_prefixed(
            "llamacpp:",
            {
                "requests_running": ("requests_processing",),
                "requests_waiting": ("requests_deferred",),
                "kv_cache_usage": ("kv_cache_usage_ratio",),
                "prompt_tokens": ("prompt_tokens_total",),
                "generation_tokens": ("tokens_predicted_total",),
            },
        ),
    ),
    "triton": Server("Triton Inference Server", ("Triton Inference Server",), token_prompts=False),
    "null": Server(
        "Backbench's null server",
        ("backbench-null",),
        continuous_usage=True,
        metrics=_prefixed("null:", _VLLM_NAMES),
    ),
    "openai": Server("any other", ignore_eos=False, chat_limit="max_completion_tokens"),
}
"""Name, as --server takes it -> what is known of it. Sources: each project's request schema as of 2026."""


def cards(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `/v1/models` lists, whatever else stands there."""
    found = models.get("data")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def identify(models: Mapping[str, Any], headers: Mapping[str, str], metrics: str) -> str:
    """The server's name by `/v1/models` (parsed), its `Server` header or its metrics; else "openai"."""
    owners = [each.get("owned_by") for each in cards(models)]
    said = headers.get("Server", "")
    for name, server in SERVERS.items():
        if any(owner in server.owned_by for owner in owners):
            return name
        if server.header is not None and said.startswith(server.header):
            return name
    for name, server in SERVERS.items():
        theirs = {each for names in server.metrics.values() for each in names}
        if any(line.startswith(tuple(theirs)) for line in metrics.splitlines() if theirs):
            return name
    return "openai"
