"""Whether load generators as people have them and our own URL target see the same server alike.

    python benchmarks/clients.py --venvs DIR [--install] [--clients vllm,guidellm,aiperf,bench] [--rounds 3]

First against a server whose tokens come at scripted times and which knows when it wrote them, then
against `bench serve tiny`. Each client lives in a virtual environment of its own below DIR; --install makes
those that are missing (PyPI; torch for the CPU). Prints a table for each server: what each client counted and
measured, by the definitions of docs/metrics.md whatever it calls them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tokenizers import Tokenizer

import backbench
from backbench.harness.serving import metrics

MODEL = "tiny"
TTFT_S, TPOT_S = 0.030, 0.008
"""The script: far from what a client's own cost could hide, and shorter than a delayed acknowledgement."""
INPUT_TOKENS, OUTPUT_TOKENS = 48, 32
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
VLLM_NEEDS = [
    "aiohttp",
    "blake3",
    "cachetools",
    "cbor2",
    "cloudpickle",
    "compressed-tensors",
    "datasets",
    "depyf",
    "diskcache",
    "einops",
    "fastapi[standard]",
    "filelock",
    "gguf",
    "huggingface-hub",
    "ijson",
    "lark",
    "llguidance",
    "lm-format-enforcer",
    "mistral_common[image]",
    "model-hosting-container-standards",
    "msgspec",
    "ninja",
    "numba",
    "numpy",
    "openai",
    "openai-harmony",
    "opencv-python-headless",
    "orjson",
    "outlines_core",
    "partial-json-parser",
    "pillow",
    "prometheus-fastapi-instrumentator",
    "prometheus_client",
    "protobuf",
    "psutil",
    "py-cpuinfo",
    "pybase64",
    "pydantic",
    "python-json-logger",
    "pyyaml",
    "pyzmq",
    "regex",
    "requests",
    "sentencepiece",
    "setproctitle",
    "setuptools",
    "six",
    "tiktoken",
    "tokenizers",
    "tqdm",
    "transformers",
    "typing_extensions",
    "uvloop",
    "watchfiles",
    "xgrammar",
    "pandas",
]
"""What `vllm bench serve` imports; vLLM itself is installed without its dependencies, CUDA's among them."""


@dataclass(frozen=True)
class Load:
    """What every client is asked to send."""

    url: str
    """http://HOST:PORT"""
    requests: int
    concurrency: int
    tokenizer: Path
    """A folder."""
    bench: tuple[str, ...]
    """The command `bench`, whose client is ours."""


@dataclass(frozen=True)
class Seen:
    """What a client, or the server, says of one load."""

    requests: int
    input_tokens: int
    output_tokens: int
    ttft_ms: float
    """The median over requests, from sending a request to its first token."""
    tpot_ms: float
    """Over requests, of (last token - first token) / (tokens - 1)."""
    mean_ttft_ms: float
    mean_tpot_ms: float


def seen(inputs: list[int], outputs: list[int], ttft_ms: list[float], tpot_ms: list[float]) -> Seen:
    """What rows say, one a request."""
    return Seen(
        len(inputs),
        sum(inputs),
        sum(outputs),
        statistics.median(ttft_ms),
        statistics.median(tpot_ms),
        statistics.fmean(ttft_ms),
        statistics.fmean(tpot_ms),
    )


@dataclass(frozen=True)
class Client:
    """A load generator."""

    name: str
    packages: tuple[tuple[str, ...], ...]
    """Arguments of `pip install`, one call each, after torch's."""
    command: Callable[[Load, Path], list[str]]
    """Its program and arguments; the program is looked for in its own environment. Writes below the path."""
    read: Callable[[Path], Seen]
    environment: dict[str, str] = field(default_factory=dict)
    torch: bool = False
    codes: tuple[int, ...] = (0,)
    """Exit codes after which there is something to read."""
    own: bool = False
    """Ours: it runs in this environment."""

    def program(self, venvs: Path, name: str) -> str:
        return name if self.own else str(venvs / self.name / "bin" / name)

    def install(self, venvs: Path, torch_index: str) -> None:
        """Make its environment, unless it is there."""
        if self.own or (venvs / self.name / "installed").exists():
            return
        subprocess.run([sys.executable, "-m", "venv", str(venvs / self.name)], check=True)
        torch = ("torch==2.13.0", *(("--index-url", torch_index) if torch_index else ()))
        for arguments in ((torch,) if self.torch else ()) + self.packages:
            pip = [self.program(venvs, "python"), "-m", "pip", "install", "-q"]
            subprocess.run([*pip, *arguments], check=True)
        (venvs / self.name / "installed").touch()

    def run(self, load: Load, venvs: Path, timeout_s: float) -> Seen:
        """What it saw; CalledProcessError where it failed, with its output printed."""
        with tempfile.TemporaryDirectory() as directory:
            program, *arguments = self.command(load, Path(directory))
            done = subprocess.run(
                [self.program(venvs, program), *arguments],
                env=os.environ | self.environment,
                cwd=directory,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
            if done.returncode not in self.codes:
                print(done.stdout[-3000:], done.stderr[-3000:], sep="\n", file=sys.stderr)
                done.check_returncode()
            return self.read(Path(directory))


def vllm_command(load: Load, out: Path) -> list[str]:
    return [
        *("vllm", "bench", "serve", "--backend", "openai", "--base-url", load.url),
        *("--endpoint", "/v1/completions", "--model", MODEL, "--tokenizer", str(load.tokenizer)),
        *("--dataset-name", "random", "--ignore-eos"),
        *("--random-input-len", str(INPUT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS)),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
        *("--save-result", "--save-detailed", "--result-dir", str(out), "--result-filename", "vllm.json"),
        "--disable-tqdm",
    ]


def vllm_seen(out: Path) -> Seen:
    found = json.loads((out / "vllm.json").read_text())
    return Seen(
        found["completed"],
        found["total_input_tokens"],
        found["total_output_tokens"],
        found["median_ttft_ms"],
        found["median_tpot_ms"],
        found["mean_ttft_ms"],
        found["mean_tpot_ms"],
    )


def guidellm_command(load: Load, out: Path) -> list[str]:
    backend = f"kind=openai_http,target={load.url},model={MODEL},request_format=/v1/completions"
    data = f"kind=synthetic_text,prompt_tokens={INPUT_TOKENS},output_tokens={OUTPUT_TOKENS}"
    return [
        *("guidellm", "run", "--backend", backend),
        *("--tokenizer", f"kind=hf_auto,model={load.tokenizer}", "--data", data),
        *("--profile", f"kind=concurrent,streams={load.concurrency}"),
        *("--constraint", f"kind=max_requests,count={load.requests}"),
        *("--output", f"kind=json,path={out / 'guidellm.json'}"),
    ]


def guidellm_seen(out: Path) -> Seen:
    """Its inter-token latency of a request is our TPOT; its time per output token has TTFT in it."""
    (benchmark,) = json.loads((out / "guidellm.json").read_text())["benchmarks"]
    rows = benchmark["requests"]["successful"]
    names = ("prompt_tokens", "output_tokens", "time_to_first_token_ms", "inter_token_latency_ms")
    return seen(*([row[name] for row in rows] for name in names))


def aiperf_command(load: Load, out: Path) -> list[str]:
    return [
        *(
            "aiperf",
            "profile",
            "--model",
            MODEL,
            "--url",
            load.url,
            "--endpoint-type",
            "completions",
            "--streaming",
        ),
        *("--tokenizer", str(load.tokenizer), "--use-server-token-count"),
        *("--isl", str(INPUT_TOKENS), "--isl-stddev", "0", "--osl", str(OUTPUT_TOKENS), "--osl-stddev", "0"),
        *("--extra-inputs", "ignore_eos:true", "--ui", "none", "--artifact-dir", str(out)),
        *("--concurrency", str(load.concurrency), "--request-count", str(load.requests)),
    ]


def aiperf_seen(out: Path) -> Seen:
    """Its inter-token latency of a request is our TPOT."""
    (file,) = out.rglob("profile_export.jsonl")
    rows = [json.loads(line)["metrics"] for line in file.read_text().splitlines()]
    names = ("input_sequence_length", "output_sequence_length", "time_to_first_token", "inter_token_latency")
    return seen(*([row[name]["value"] for row in rows] for name in names))


def bench_command(load: Load, out: Path) -> list[str]:
    return [
        *(*load.bench, "run", "--url", f"{load.url}/v1", "--url-model", MODEL),
        *("--workload", "synthetic", "--input-lengths", f"fixed:{INPUT_TOKENS}"),
        *("--output-lengths", f"fixed:{OUTPUT_TOKENS}", "--num-requests", str(load.requests)),
        *("--concurrency", str(load.concurrency), "--no-report", "--quiet", "-o", str(out / "run")),
    ]


def bench_seen(out: Path) -> Seen:
    rows = pd.read_parquet(out / "run" / "requests.parquet")
    rows = rows[~rows["warmup"]]
    ttft_ms = (rows["first_ns"] - rows["sent_ns"]) / 1e6
    tpot_ms = (rows["last_ns"] - rows["first_ns"]) / (rows["output_tokens"] - 1) / 1e6
    columns = (rows["prompt_tokens"], rows["output_tokens"], ttft_ms, tpot_ms)
    return seen(*(column.tolist() for column in columns))


CLIENTS = (
    Client("vllm", (("--no-deps", "vllm==0.33.0"), tuple(VLLM_NEEDS)), vllm_command, vllm_seen, torch=True),
    Client("guidellm", (("guidellm==0.8.1",),), guidellm_command, guidellm_seen, torch=True),
    Client("aiperf", (("aiperf==0.13.0",),), aiperf_command, aiperf_seen),
    Client("bench", (), bench_command, bench_seen, codes=(0, 4), own=True),
)


class Scripted:
    """A server whose tokens come at scripted times, each written by itself, and which remembers when it did.

    asyncio sets TCP_NODELAY on its sockets. GET /seen gives what was written since the last GET /seen.
    """

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self._rows: list[dict[str, float]] = []

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                length = 0
                while (header := await reader.readline()) not in (b"\r\n", b""):
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                body = await reader.readexactly(length)
                await self._answer(line.split()[1].decode(), body, writer)
        writer.close()

    async def _answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path.endswith("/completions"):
            await self._stream(json.loads(body), "chat" in path, writer)
            return
        answers: dict[str, Any] = {
            "/health": {},
            "/v1/models": {
                "object": "list",
                "data": [{"id": MODEL, "object": "model", "max_model_len": 4096}],
            },
            "/seen": self._rows,
        }
        status = "200 OK" if path in answers else "404 Not Found"
        text = json.dumps(answers.get(path, {}))
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
        writer.write((head + text).encode())
        if path == "/seen":
            self._rows = []

    async def _stream(self, asked: dict[str, Any], chat: bool, writer: asyncio.StreamWriter) -> None:
        began = time.perf_counter()
        prompt = asked["messages"][-1]["content"] if chat else asked["prompt"]
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            prompt = "".join(part["text"] for part in prompt)
        texts = [prompt] if isinstance(prompt, str) else prompt
        input_tokens = sum(
            len(self._tokenizer.encode(each).ids) if isinstance(each, str) else 1 for each in texts
        )
        total = asked.get("max_completion_tokens") or asked.get("max_tokens")
        options = asked.get("stream_options") or {}
        head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        stamps = []
        for i in range(total):
            await asyncio.sleep(max(0.0, began + TTFT_S + i * TPOT_S - time.perf_counter()))
            shown = {"delta": {"role": "assistant", "content": " a"}} if chat else {"text": " a"}
            choice = {"index": 0, **shown, "finish_reason": "length" if i == total - 1 else None}
            usage = {
                "prompt_tokens": input_tokens,
                "completion_tokens": i + 1,
                "total_tokens": input_tokens + i + 1,
            }
            continuous = {"usage": usage} if options.get("continuous_usage_stats") else {}
            stamps.append(time.perf_counter())
            self._write(writer, {"choices": [choice]} | continuous, chat, head if i == 0 else "")
        if options.get("include_usage"):
            self._write(writer, {"choices": [], "usage": usage}, chat)
        done = "data: [DONE]\n\n"
        writer.write(f"{len(done):x}\r\n{done}\r\n0\r\n\r\n".encode())
        self._rows.append(
            {
                "input_tokens": input_tokens,
                "output_tokens": total,
                "ttft_s": stamps[0] - began,
                "tpot_s": (stamps[-1] - stamps[0]) / (total - 1) if total > 1 else float("nan"),
            }
        )

    def _write(self, writer: asyncio.StreamWriter, value: dict[str, Any], chat: bool, head: str = "") -> None:
        kind = "chat.completion.chunk" if chat else "text_completion"
        text = (
            "data: " + json.dumps({"id": "x", "object": kind, "created": 0, "model": MODEL} | value) + "\n\n"
        )
        writer.write(f"{head}{len(text):x}\r\n{text}\r\n".encode())


def serve_scripted(tokenizer: Path) -> None:
    """Serve on a free port, which is printed, until the process is ended."""

    async def main() -> None:
        server = await asyncio.start_server(Scripted(tokenizer).connected, "127.0.0.1", 0)
        print(f"Serving {MODEL} at http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
        await server.serve_forever()

    asyncio.run(main())


@contextmanager
def server(command: list[str]) -> Iterator[str]:
    """The address of a server that says in a line where it is; ended at the end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if found := re.search(r"at (http://\S+)/v1", line):
                    yield found[1]
                    break
        finally:
            process.terminate()


class Kept(metrics.Histogram):
    """A histogram whose values can be read one by one: buckets hold no medians."""

    def __init__(self, name: str, help: str, bounds: Sequence[float] = metrics.SECONDS) -> None:
        super().__init__(name, help, bounds)
        self._values: list[float] = []

    def observe(self, value: float) -> None:
        super().observe(value)
        self._values.append(value)

    def samples(self) -> Iterator[tuple[str, dict[str, str], float]]:
        yield from super().samples()
        for place, value in enumerate(self._values):
            yield "_value", {"place": str(place)}, value


def serve_kept() -> None:
    """`bench serve` as it is, but for its histograms."""
    from backbench.harness.cli import main

    metrics.Histogram = Kept  # type: ignore[misc]
    main(["serve", MODEL, "--port", "0", "--backend", "torch"])


class Scraped:
    """What `bench serve` did since this was made, by its /metrics."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/metrics"
        self._before = self._read()

    def _read(self) -> dict[str, list[float]]:
        with urllib.request.urlopen(self._url, timeout=10) as answer:
            lines = re.findall(r"^backbench:(\w+)\{[^}]*\} (\S+)$", answer.read().decode(), re.MULTILINE)
        found: dict[str, list[float]] = {}
        for name, value in lines:
            found.setdefault(name, []).append(float(value))
        return found

    def seen(self) -> Seen:
        """The requests since then."""
        before, now = self._before, self._read()
        times_ms = (
            [1e3 * value for value in now[name][len(before.get(name, [])) :]]
            for name in ("time_to_first_token_seconds_value", "request_time_per_output_token_seconds_value")
        )
        totals = (
            int(now[name][0] - before[name][0])
            for name in (
                "time_to_first_token_seconds_count",
                "prompt_tokens_total",
                "generation_tokens_total",
            )
        )
        ttft_ms, tpot_ms = times_ms
        medians = (statistics.median(each) for each in (ttft_ms, tpot_ms))
        return Seen(*totals, *medians, statistics.fmean(ttft_ms), statistics.fmean(tpot_ms))


class Remembered:
    """What the scripted server did since this was made."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/seen"
        self._read()

    def _read(self) -> list[dict[str, float]]:
        with urllib.request.urlopen(self._url, timeout=10) as answer:
            rows: list[dict[str, float]] = json.load(answer)
        return rows

    def seen(self) -> Seen:
        """The requests of the load's length: a null server's calibration is none of them."""
        rows = [row for row in self._read() if row["output_tokens"] == OUTPUT_TOKENS]
        counts = ([int(row[name]) for row in rows] for name in ("input_tokens", "output_tokens"))
        times = ([row[name] * 1e3 for row in rows] for name in ("ttft_s", "tpot_s"))
        return seen(*counts, *times)


def middle(rounds: list[Seen]) -> Seen:
    """The middle of several rounds, of every number apart."""
    return Seen(*(statistics.median(values) for values in zip(*map(astuple, rounds), strict=True)))


def agree(measured: float, reference: float) -> bool:
    """Within 5 % or 2 ms."""
    return abs(measured - reference) <= max(0.05 * reference, 2.0)


def compare(title: str, load: Load, clients: list[Client], arguments: argparse.Namespace) -> None:
    """Every client in turn, round by round, and the table of what they and the server saw."""
    told = Remembered if title == "scripted" else Scraped
    found: dict[str, list[Seen]] = {client.name: [] for client in clients}
    truths: dict[str, list[Seen]] = {client.name: [] for client in clients}
    for _ in range(arguments.rounds):
        for client in clients:
            server_side = told(load.url)
            found[client.name].append(client.run(load, arguments.venvs, arguments.timeout_s))
            truths[client.name].append(server_side.seen())
    print(f"\n{title}: {load.requests} requests, {load.concurrency} at once, {OUTPUT_TOKENS} tokens each\n")
    print("| client | requests | input tokens | output tokens ", end="")
    print("| TTFT p50 ms | the server's | TPOT p50 ms | the server's | agrees |")
    print("|---" * 9 + "|")
    for name, rounds in found.items():
        own, truth = middle(rounds), middle(truths[name])
        counted = all(
            (each.requests, each.output_tokens) == (load.requests, load.requests * OUTPUT_TOKENS)
            for each in rounds
        )
        alike = agree(own.ttft_ms, truth.ttft_ms) and agree(own.tpot_ms, truth.tpot_ms)
        print(
            f"| {name} | {own.requests:,.0f} | {own.input_tokens:,.0f} | {own.output_tokens:,.0f} "
            f"| {own.ttft_ms:.2f} | {truth.ttft_ms:.2f} | {own.tpot_ms:.2f} | {truth.tpot_ms:.2f} "
            f"| {'yes' if counted and alike else 'no'} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venvs", type=Path, required=True, help="where the clients' environments are")
    parser.add_argument("--install", action="store_true", help="make those that are missing")
    parser.add_argument(
        "--torch-index", default=CPU_TORCH, help='where torch comes from; "" = where pip looks'
    )
    parser.add_argument("--clients", default=",".join(client.name for client in CLIENTS))
    parser.add_argument("--servers", default="scripted,serve")
    parser.add_argument("--bench", default=f"{sys.executable} -m backbench", help="the command `bench`")
    parser.add_argument("--before-server", default="", help='such as "nice -n -10", where cores are few')
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout-s", type=float, default=600)
    parser.add_argument("--serve-scripted", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve-kept", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tokenizer = Path(backbench.__file__).parent / "engine" / "checkpoints" / MODEL
    if arguments.serve_scripted:
        serve_scripted(tokenizer)
        return
    if arguments.serve_kept:
        serve_kept()
        return
    bench = tuple(shlex.split(arguments.bench))
    asked = arguments.clients.split(",")
    clients = [client for client in CLIENTS if client.name in asked]
    if arguments.install:
        for client in clients:
            client.install(arguments.venvs, arguments.torch_index)
    commands = {
        "scripted": [sys.executable, __file__, "--venvs", str(arguments.venvs), "--serve-scripted"],
        "serve": [sys.executable, __file__, "--venvs", str(arguments.venvs), "--serve-kept"],
    }
    for name in arguments.servers.split(","):
        with server([*shlex.split(arguments.before_server), *commands[name]]) as url:
            load = Load(url, arguments.requests, arguments.concurrency, tokenizer, bench)
            compare(name, load, clients, arguments)


if __name__ == "__main__":
    main()
