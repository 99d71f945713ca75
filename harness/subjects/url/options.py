"""What may be said of an OpenAI-compatible server that is measured instead of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from backbench.errors import HarnessError, shown
from backbench.harness.subjects.url.servers import SERVERS
from backbench.options import option, settle

APIS = ("completions", "chat")
LONGEST_WAIT_S = 86_400.0


def parse_url(given: Any) -> str:
    """The address without a slash at its end; raises HarnessError where it is none or holds a password."""
    text = str(given).rstrip("/")
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not text.isprintable() or " " in text or len(text) > 1024:
        raise HarnessError(f"A server's address is like http://HOST:PORT/v1; not {shown(given)}.")
    if parts.username is not None or parts.query or parts.fragment:
        raise HarnessError(
            "A server's address holds no user, query or fragment, which would stand in the record; "
            "give a key by --api-key-env."
        )
    return text


def parse_metrics_url(given: Any) -> str:
    """An address, or "none"."""
    return "none" if given == "none" else parse_url(given)


@dataclass(frozen=True)
class ServerOptions:
    """None = found out by asking the server, and then recorded."""

    url: str | None = option(
        None,
        "Measure the OpenAI-compatible server at this address instead of the engine; docs/targets.md.",
        group="server",
        metavar="http://HOST:PORT/v1",
        read=parse_url,
    )
    url_model: str | None = option(
        None,
        "The model's name at the server.",
        group="server",
        unset="the only one that it lists",
        metavar="NAME",
    )
    api: str | None = option(
        None,
        "Prompts as token ids to /completions, or as a user's message to /chat/completions.",
        group="server",
        unset="completions",
        metavar="|".join(APIS),
        choices={each: each for each in APIS},
    )
    server: str | None = option(
        None,
        f"Which server it is: {', '.join(SERVERS)}; what it does not take is left out of requests.",
        group="server",
        unset="what it says of itself",
        metavar="NAME",
        choices={each: each for each in SERVERS},
    )
    api_key_env: str | None = option(
        None, "Environment variable that holds the server's API key.", group="server", metavar="VARIABLE"
    )
    tokenizer: Path | None = option(
        None,
        "The model's tokenizer.json or its folder, where prompts must be text or the workload holds text.",
        group="server",
        metavar="FILE|DIR",
    )
    url_vocab: int | None = option(
        None,
        "Token ids of drawn prompts are below N.",
        group="server",
        unset="the tokenizer's, the server's, or 1000",
        minimum=16,
        maximum=2**24,
    )
    client_processes: int | None = option(
        None,
        "Processes that send and receive.",
        group="server",
        unset="one for each 1000 streams at once, at most half of the CPUs",
        minimum=1,
        maximum=256,
    )
    calibrate: bool = option(
        True,
        "Measure the client's own cost against a null server before and after; without it the run is not "
        "valid.",
        group="server",
        name="calibrate_client",
    )
    metrics_url: str | None = option(
        None,
        "The server's Prometheus metrics; or none.",
        group="server",
        unset="/metrics beside /v1",
        metavar="URL|none",
        read=parse_metrics_url,
    )
    connect_timeout_s: float = option(
        10.0,
        "Fail a request whose connection takes longer.",
        name="connect_timeout",
        group="server",
        metavar="S",
        above=0,
        maximum=LONGEST_WAIT_S,
    )
    first_token_timeout_s: float = option(
        300.0,
        "Fail a request whose first token takes longer.",
        name="first_token_timeout",
        group="server",
        metavar="S",
        above=0,
        maximum=LONGEST_WAIT_S,
    )
    token_timeout_s: float = option(
        120.0,
        "Fail a request that waits longer for its next token.",
        name="token_timeout",
        group="server",
        metavar="S",
        above=0,
        maximum=LONGEST_WAIT_S,
    )
    request_timeout_s: float = option(
        3600.0,
        "Fail a request that takes longer in all.",
        name="request_timeout",
        group="server",
        metavar="S",
        above=0,
        maximum=LONGEST_WAIT_S,
    )

    def __post_init__(self) -> None:
        settle(self, HarnessError)
