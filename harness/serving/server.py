"""`bench serve`: from options to a server that runs until it is told to stop."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette

from backbench.errors import HarnessError
from backbench.harness.serving.app import make_app
from backbench.harness.serving.front import Front
from backbench.harness.serving.options import ServeOptions
from backbench.harness.switching import switching_often

if TYPE_CHECKING:
    from backbench.engine.engine import Engine

KEEP_ALIVE_S = 75
"""An idle connection is kept as long: longer than clients keep theirs, which would race with the end."""


def serve(options: ServeOptions, tell: Callable[[str], None]) -> None:
    """Load the model and serve it until SIGINT or SIGTERM; `tell` is given lines for people.

    The address is taken before the model is loaded. Told to stop, the server takes no more requests, and
    finishes those it has for as long as the grace lasts; a second SIGINT cuts it short.

    Raises:
        BackbenchError: the address, the key or the model is not to be had, or the engine failed.
    """
    api_key = options.api_key()
    with listen(options.host, options.port) as listener:
        tell(f"Loading {options.model}")
        with open_engine(options) as engine:
            warm_up(engine)
            if engine.speculator is not None and not engine.speculator.proposer.accurate:
                tell("Whether drafts are accepted is drawn (--speculate synthetic): the text means nothing.")
            front = Front(engine, options.names(), max_queue=options.max_queue)
            app = make_app(
                front,
                max_body_bytes=options.max_body_bytes,
                api_key=api_key,
                vllm_metrics=options.vllm_metrics,
            )
            host, port = listener.getsockname()[:2]
            if api_key is None and not ipaddress.ip_address(host).is_loopback:
                tell("Anyone who reaches this address may use the server: it has no --api-key-env.")
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            ready = f"Serving {front.names[0]} at {url}/v1"
            server = Server(server_config(app, options.grace_s), front, lambda: tell(ready))
            try:
                with switching_often():  # the engine's thread would keep the first tokens from leaving
                    server.run(sockets=[listener])
            except KeyboardInterrupt:  # uvicorn raises the signal again that it has answered
                if not server.should_exit:
                    raise
    if front.failure is not None:
        raise front.failure


def server_config(app: Starlette, grace_s: int) -> uvicorn.Config:
    """How the application is served."""
    return uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=grace_s,
    )


class Server(uvicorn.Server):
    """Says when it is ready, and ends when its engine has failed."""

    def __init__(self, config: uvicorn.Config, front: Front, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._front = front
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._front.failure is not None


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; HarnessError where it is not to be had. Port 0 = any free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise HarnessError(f"--host {host} is no address of this machine: {error.strerror}.") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise HarnessError(
            f"Port {port} of {host} is not to be had: {error.strerror}; choose another --port."
        ) from None
    return listener


def open_engine(options: ServeOptions) -> Engine:
    """The engine, loaded; BackbenchError where there is none of that kind. Close it."""
    import torch

    from backbench.backends.interface.device import detect
    from backbench.engine.config import EngineConfig
    from backbench.engine.engine import Engine
    from backbench.engine.models.checkpoint import find_model
    from backbench.harness.subjects.engine import CPU_STEP_TOKENS

    if options.interpret:
        # Triton reads this when kernels are decorated, so it is set before any backend is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    device = detect(interpret=options.interpret, prefer=options.device)
    on_cpu = device.torch_device.type == "cpu"
    defaults: dict[str, Any] = {"max_step_tokens": CPU_STEP_TOKENS} if on_cpu else {}
    source = find_model(options.model)
    return Engine.open(
        source,
        backend=options.backend,
        device=device,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        config=EngineConfig(**defaults | dict(options.engine)),
        overrides=options.overrides,
        tokenizer=source.tokenizer(),
    )


def warm_up(engine: Engine) -> None:
    """Compile and capture what requests of every kind of sampling need."""
    from backbench.engine.request import SamplingParams

    for params in (SamplingParams(), SamplingParams(temperature=1), SamplingParams(temperature=1, top_p=0.9)):
        engine.warm_up(params)
