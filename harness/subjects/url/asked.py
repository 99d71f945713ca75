"""What a server says of itself before a run: its kind, its model, its limits."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Any

from backbench.errors import HarnessError, shown
from backbench.harness.subjects.url.options import ServerOptions
from backbench.harness.subjects.url.scrape import OPENER, fetch_page
from backbench.harness.subjects.url.servers import SERVERS, Server, cards, identify
from backbench.harness.subjects.url.stream import message_of

MAX_LEN = 4096
"""Tokens of a prompt and its output, where a server does not say its context."""
VOCAB_SIZE = 1000
"""Ids below it are in every tokenizer that is in use."""
LONGEST_PAGE = 4 * 2**20
WAIT_S = 30.0


@dataclass(frozen=True)
class Described:
    """One server as far as it is known."""

    kind: str
    """Name in `servers.SERVERS`."""
    kind_stated: bool
    """By --server, not by itself."""
    model: str
    max_len: int | None
    vocab_size: int | None
    version: str | None
    metrics_url: str | None

    @property
    def server(self) -> Server:
        return SERVERS[self.kind]


def headers_of(options: ServerOptions) -> dict[str, str]:
    """The key as servers take it; HarnessError where the variable is not set."""
    if options.api_key_env is None:
        return {}
    key = os.environ.get(options.api_key_env, "")
    if not key or not key.isprintable():
        raise HarnessError(f"--api-key-env {options.api_key_env}: that variable is not set, or holds no key.")
    return {"Authorization": f"Bearer {key}"}


def metrics_headers(options: ServerOptions) -> dict[str, str]:
    """The key is for the server alone: a page elsewhere gets none."""
    return headers_of(options) if options.metrics_url is None else {}


def describe(options: ServerOptions) -> Described:
    """Ask the server; HarnessError where it does not answer or has not the model."""
    assert options.url is not None
    headers = headers_of(options)
    root = options.url.removesuffix("/v1")
    models, said = _models(options.url, headers, options)
    metrics_url = root + "/metrics" if options.metrics_url is None else options.metrics_url
    metrics = "" if metrics_url == "none" else _optional(metrics_url, metrics_headers(options))
    kind = options.server or identify(models, said, metrics)
    if (
        options.server is None
        and kind == "openai"
        and _object(_optional(f"{root}/info", headers)).get("model_id")
    ):
        kind = "tgi"  # which puts the model's name where others say who they are
    listed = [each for each in cards(models) if each.get("id")]
    model = options.url_model or _only(listed, options.url)
    card: dict[str, Any] = next((each for each in listed if each["id"] == model), {})
    meta = found if isinstance(found := card.get("meta"), dict) else {}
    page, name = SERVERS[kind].version_at
    version = _object(_optional(f"{root}/{page}", headers)).get(name)
    return Described(
        kind=kind,
        kind_stated=options.server is not None,
        model=model,
        max_len=_whole(card.get("max_model_len") or meta.get("n_ctx_train")),
        vocab_size=_whole(card.get("vocab_size") or meta.get("n_vocab")),
        version=str(version)[:64] if version else None,
        metrics_url=None if metrics_url == "none" else metrics_url,
    )


def _models(
    url: str, headers: Mapping[str, str], options: ServerOptions
) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The page of models and the response's headers; empty where there is none and the model is named."""
    request = urllib.request.Request(f"{url}/models", headers=dict(headers))
    try:
        with OPENER.open(request, timeout=min(WAIT_S, options.connect_timeout_s)) as response:
            return _object(response.read(LONGEST_PAGE)), _named(response.headers)
    except urllib.error.HTTPError as error:
        if options.url_model is not None and error.code in (404, 405):
            return {}, _named(error.headers)
        said = message_of(_object(error.read(4096)) or error.reason)
        raise HarnessError(
            f"{url}/models answers {error.code} ({said}); see --url and --api-key-env."
        ) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        words = " ".join(str(why).split())[:80]
        raise HarnessError(f"No server answers at {url} ({words}); start it, or mend --url.") from None


def _named(headers: Message) -> dict[str, str]:
    """Headers under their names as usually written, whatever case the server wrote them in."""
    return {name.title(): value for name, value in headers.items()}


def _only(listed: list[dict[str, Any]], url: str) -> str:
    names = [str(each["id"]) for each in listed]
    if len(names) == 1:
        return names[0]
    if not names:
        raise HarnessError(f"{url}/models lists no model; give its name by --url-model.")
    raise HarnessError(f"The server has {len(names)} models; choose by --url-model: {shown(names, 120)}.")


def _optional(url: str, headers: Mapping[str, str]) -> str:
    """A page that not every server has; "" where it is missing."""
    try:
        return fetch_page(url, headers)
    except (OSError, ValueError):
        return ""


def _object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; {} where the text is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else None
