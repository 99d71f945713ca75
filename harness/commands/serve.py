"""`bench serve`: the reference engine behind an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from backbench.engine.config import SCHEMES
from backbench.errors import HarnessError
from backbench.harness.commands.flags import GroupedCommand, flag
from backbench.harness.commands.output import echo, flush
from backbench.harness.serving.options import ServeOptions, serve_options, subject_options
from backbench.options import options_of

SERVING_MODULES = ("starlette", "uvicorn")
"""What the extra `serve` installs, as it is imported."""
HEADINGS = {"subject": "What is served", "engine": "The engine"}
HELP = {
    "backend": "See `bench backends`; or auto.",
    "quantize": f"A dense model's weights, rounded to {', '.join(SCHEMES[1:])}; or none.",
}
"""Where `bench run` takes several, a server takes one."""


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(subject_options()):
        unset = "auto" if option.name == "backend" else None
        function = flag(option, HEADINGS[option.group], help=HELP.get(option.name), unset=unset)(function)
    for option in reversed(options_of(ServeOptions)):
        function = flag(option, "The server")(function)
    return function


@click.command(cls=GroupedCommand)
@click.argument("model")
@_with_options
def serve(model: str, **given: Any) -> None:
    """Serve MODEL over HTTP as OpenAI's API words it, until SIGTERM or Ctrl-C.

    Completions and chat, streamed or whole, with vLLM's additions that load generators use; /v1/models,
    /tokenize, /detokenize, /health and /metrics (Prometheus). docs/serving.md says what is served and what
    is not.
    """
    options = serve_options(model, given)
    try:
        from backbench.harness.serving.server import serve as run_server
    except ModuleNotFoundError as error:
        if error.name not in SERVING_MODULES:
            raise
        raise HarnessError(
            f"bench serve needs {error.name}, which is not installed: python -m pip install "
            "'backbench[serve]' (in a checkout: -e '.[serve]')."
        ) from None
    run_server(options, _tell)


def _tell(line: str) -> None:
    echo(line)
    flush()
