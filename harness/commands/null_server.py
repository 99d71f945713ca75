"""`bench null-server`: an OpenAI-compatible server with scripted times."""

from __future__ import annotations

import asyncio

import click


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    default=0,
    show_default="a free one",
    type=click.IntRange(0, 65535),
    metavar="N",
    help="Its port.",
)
@click.option(
    "--ttft",
    default=0.05,
    show_default=True,
    type=click.FloatRange(0, 3600),
    metavar="S",
    help="Seconds from reading a request to its first token.",
)
@click.option(
    "--itl",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 3600),
    metavar="S",
    help="Seconds from each token to the next.",
)
@click.option(
    "--tokens",
    default=None,
    type=click.IntRange(1, 2**20),
    metavar="N",
    help="Tokens of every answer.  [default: as many as asked for]",
)
def null_server(host: str, port: int, ttft: float, itl: float, tokens: int | None) -> None:
    """Serve completions and chat completions that compute nothing, at scripted times, until Ctrl-C.

    The first line on stdout is the address. Clients are calibrated against it: what they measure beyond the
    script is their own cost, and /stats says how late the server itself was. See docs/targets.md.
    """
    from backbench.harness.subjects.url.null_server import Script, serve

    asyncio.run(serve(Script(ttft, itl, tokens), host, port))
