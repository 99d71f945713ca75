"""What `bench serve` may be asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from backbench.engine.config import EngineConfig
from backbench.errors import HarnessError
from backbench.harness.options import OVERRIDES, RunOptions, option_names
from backbench.options import Option, option, options_of, settle

SUBJECT = ("backend", "dtype", "quantize", "device", "attention", "linear", "ops", "collectives", "interpret")
"""Options of `bench run` that mean the same here."""


@dataclass(frozen=True)
class ServeOptions:
    """One server."""

    host: str = option(
        "127.0.0.1", "Address to listen at; 0.0.0.0 is every one of this machine.", group="server"
    )
    port: int = option(8000, "0 = any free one.", group="server", minimum=0, maximum=65535)
    served_model_name: str | None = option(
        None,
        "What the model is called in requests and answers; or several names, by commas.",
        group="server",
        unset="the model",
        metavar="NAME",
    )
    api_key_env: str | None = option(
        None,
        "Environment variable with a key that every request has to send (Authorization: Bearer KEY).",
        group="server",
        unset="no key is asked for",
        metavar="VARIABLE",
    )
    max_queue: int = option(
        256,
        "Sequences that may wait besides the --max-seqs that run; a request beyond them is answered 429.",
        group="server",
        minimum=0,
        maximum=2**20,
    )
    max_body_bytes: int = option(
        8 * 2**20, "Longer requests are answered 413.", group="server", minimum=1024, maximum=2**30
    )
    grace_s: int = option(
        30,
        "Seconds that requests are given to finish after SIGTERM or SIGINT.",
        name="grace",
        group="server",
        metavar="S",
        minimum=0,
        maximum=86400,
    )
    vllm_metrics: bool = option(False, "/metrics has every metric under vLLM's name, too.", group="server")
    model: str = "tiny"
    backend: str = "auto"
    dtype: str | None = None
    device: str | None = None
    interpret: bool = False
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Operation -> backend that serves it instead."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `engine.config.EngineConfig` that were set."""

    def __post_init__(self) -> None:
        settle(self, HarnessError)
        if not all(self.names()):
            raise HarnessError("--served-model-name takes names by commas, none of them empty.")

    def names(self) -> list[str]:
        """What the model is called, the first in answers."""
        if self.served_model_name is None:
            return [self.model]
        return [name.strip() for name in self.served_model_name.split(",")]

    def api_key(self) -> str | None:
        """The key; HarnessError where the variable holds none."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise HarnessError(f"--api-key-env: the variable {self.api_key_env} is not set, or empty.")
        return key


def subject_options() -> list[Option]:
    """Options of `bench run` that mean the same here: what serves, and the engine's."""
    return [
        each
        for declared, each in option_names().values()
        if declared is EngineConfig or (declared is RunOptions and each.name in SUBJECT)
    ]


def serve_options(model: str, given: Mapping[str, Any]) -> ServeOptions:
    """The options of a server from their names as typed, with underscores; None = not given."""
    held = {name: value for name, value in given.items() if value is not None}
    own = {each.field: held.pop(each.name) for each in options_of(ServeOptions) if each.name in held}
    engine_names = {each.name: each.field for each in options_of(EngineConfig)}
    engine = {engine_names[name]: held.pop(name) for name in list(held) if name in engine_names}
    overrides = {operation: held.pop(name) for operation, name in OVERRIDES.items() if name in held}
    return ServeOptions(**own, model=model, overrides=overrides, engine=engine, **held)
