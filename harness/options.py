"""What one `bench run` was asked for, from the command line, a configuration file or Python.

    run_options({"workload": "sharegpt", "backend": "torch", "rate": 8, "max_seqs": 64})

Every name is an option of RunOptions, of the workload's options or of the engine's configuration.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from backbench.engine.config import SCHEMES, EngineConfig
from backbench.errors import HarnessError, shown
from backbench.harness.objectives import parse_slo
from backbench.harness.subjects.url.options import ServerOptions
from backbench.options import DTYPES, Option, option, options_of, settle
from backbench.workloads.options import OFFERS, WorkloadOptions

GROUPS = {
    "subject": "What is measured",
    "load": "How requests are offered",
    "requests": "What is requested",
    "engine": "The engine",
    "server": "A server instead of the engine",
    "record": "What is judged and kept",
}
"""Group of options -> its heading in `bench run --help`; in a configuration file a group is a table."""
OF_A_SERVER = "url"
"""The backend of a run that measures a server: its own, which is not seen from outside."""
ENGINE_ONLY = (
    "model",
    "dtype",
    "quantize",
    "device",
    "attention",
    "linear",
    "ops",
    "collectives",
    "interpret",
    "beams",
    "length_penalty",
    "accuracy",
    "against",
)
"""Options of RunOptions that say nothing to a server; nor do those of the engine, but for `max_len`."""
OVERRIDES = {"attention": "attention", "linear": "linear", "operations": "ops", "collectives": "collectives"}
"""Operation -> the option of RunOptions that names the backend that serves it instead."""
LONGEST_FILE = 2**20
"""Bytes of a configuration file."""
LONGEST_NAME = 64
"""Characters of a label and of a tag's value."""
TAG = re.compile(r"[A-Za-z0-9_.-]{1,32}")
"""A tag's key."""


def parse_label(given: Any) -> str:
    """A run's own name; raises HarnessError where it would not stand in a table."""
    if not isinstance(given, str) or not given.isprintable() or not 0 < len(given.strip()) <= LONGEST_NAME:
        raise HarnessError(f"--label takes 1 to {LONGEST_NAME} printable characters; not {shown(given)}.")
    return given.strip()


def parse_tags(given: str | Mapping[str, Any]) -> dict[str, str]:
    """Read "commit=a1,card=left" or {"commit": "a1"}; raises HarnessError where it is malformed."""
    if isinstance(given, str):
        pairs = [tuple(part.split("=", 1)) for part in given.split(",")]
    elif isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        pairs = [()]
    tags: dict[str, str] = {}
    for pair in pairs:
        key, value = pair if len(pair) == 2 else ("", "")
        fits = isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST_NAME
        if not fits or not isinstance(key, str) or not TAG.fullmatch(key) or "," in value:
            raise HarnessError(f"--tag takes KEY=VALUE, such as commit=a1b2; not {shown(given)}.")
        if key in tags:
            raise HarnessError(f"--tag names {key} twice; give it one value.")
        tags[key] = value
    return tags


def parse_quantize(given: Any) -> str:
    """Read "int8" or "none,int8"; raises HarnessError where a name is none of `engine.config.SCHEMES`."""
    names = [name.strip() for name in str(given).split(",")]
    for name in names:
        if name not in SCHEMES:
            raise HarnessError(f"--quantize takes {', '.join(SCHEMES)}, or several by commas; not {name!r}.")
    return ",".join(names)


@dataclass(frozen=True)
class RunOptions:
    """One experiment. None = decided from the workload, the model and the device, and then recorded."""

    workload: str = option(
        MISSING, "See `bench workloads`.", group="subject", short="-w", metavar="NAME|FILE"
    )
    backend: str = option(
        MISSING,
        "See `bench backends`; or auto; or several to take turns: torch,sdpa.",
        group="subject",
        short="-b",
        metavar="NAME",
    )
    model: str = option(
        "tiny", "See `bench models`.", group="subject", short="-m", metavar="NAME|PATH|shape:NAME"
    )
    dtype: str | None = option(
        None,
        "Of weights, activations and the KV cache.",
        group="subject",
        unset="fp32 on a CPU, else the model's",
        metavar="bf16|fp16|fp32",
        choices=DTYPES,
    )
    quantize: str | None = option(
        None,
        f"A dense model's weights, rounded to {', '.join(SCHEMES[1:])}; or none; or several to take turns: "
        "none,int8.",
        group="subject",
        metavar="SCHEME",
        read=parse_quantize,
    )
    device: str | None = option(
        None,
        "cpu, cuda or cuda:N; an AMD GPU is cuda, too.",
        group="subject",
        unset="the first GPU, else the CPU",
        metavar="DEVICE",
    )
    attention: str | None = option(
        None,
        "Backend for attention alone; or prefill=NAME,decode=NAME.",
        group="subject",
        metavar="NAME",
    )
    linear: str | None = option(
        None, "Backend for matrix multiplications alone.", group="subject", metavar="NAME"
    )
    ops: str | None = option(
        None, "Backend for elementwise operations alone.", group="subject", metavar="NAME"
    )
    collectives: str | None = option(
        None, "Backend for sums between devices alone, with --tp.", group="subject", metavar="NAME"
    )
    interpret: bool = option(
        False, "Triton's interpreter on the CPU (correctness only, slow).", group="subject"
    )
    beams: int = option(
        1,
        "Answer every request by beam search of this width; its tokens come all at once.",
        group="subject",
        unset="1: none",
        minimum=1,
        maximum=64,
    )
    length_penalty: float = option(
        1.0,
        "Beam search ranks sequences by log-probability / tokens ** P.",
        group="subject",
        metavar="P",
        minimum=-100,
        maximum=100,
    )
    seed: int = option(0, "Fixes everything that is drawn.", group="load", minimum=0, maximum=2**63 - 1)
    warmup: int | None = option(
        None,
        "Warm-up requests, none of them a measured prompt.",
        group="load",
        unset="the concurrency, or 16",
        minimum=0,
        maximum=2**16,
    )
    stall_timeout: float = option(
        600.0,
        "Seconds without a token or a step after which a target with requests in flight has failed.",
        group="load",
        above=0,
        maximum=1e6,
        metavar="S",
    )
    find_load: bool = option(
        False,
        "Search the highest --rate or --concurrency (from the one given on) at which every --slo holds.",
        group="load",
    )
    probe_seconds: float = option(
        20.0,
        "With --find-load: seconds of requests that each rate is offered at least.",
        group="load",
        above=0,
        maximum=86_400,
        metavar="S",
    )
    repeat: int = option(
        1, "Runs of each backend, each a new process.", group="load", minimum=1, maximum=1000
    )
    slo_s: dict[str, float] = option(
        {},
        "Limits in seconds (ttft, tpot, e2e) for goodput; with --find-load of percentiles: ttft_p95=0.5; "
        "may be repeated.",
        name="slo",
        group="record",
        metavar="ttft=S,tpot=S",
        read=parse_slo,
    )
    accuracy: str | None = option(
        None,
        "Text that quantized weights are judged on beside the unquantized ones: topics, sampled, a UTF-8 "
        "file; or none.",
        group="record",
        unset="topics (pydoc_data.topics), or sampled where the model has no tokenizer",
        metavar="TEXT|FILE",
    )
    against: str | None = option(
        None,
        "The same model unquantized, where the checkpoint is quantized already.",
        group="record",
        metavar="NAME|PATH",
    )
    label: str | None = option(
        None,
        "The run's name in tables and comparisons; see `bench list`.",
        group="record",
        metavar="NAME",
        read=parse_label,
    )
    tags: dict[str, str] = option(
        {},
        "Kept in the record, for `bench compare --group-by tag:KEY`; may be repeated.",
        name="tag",
        group="record",
        metavar="KEY=VALUE",
        read=parse_tags,
    )
    check: bool = option(
        True,
        "Check results against the torch backend, and measure accuracy; without it the run is not valid.",
        group="record",
    )
    out: Path | None = option(
        None,
        "A new or empty directory.",
        group="record",
        short="-o",
        unset="runs/TIME-WORKLOAD-BACKEND",
        metavar="DIR",
    )
    load: dict[str, Any] = field(default_factory=dict)
    """Fields of `workloads.options.WorkloadOptions` that were set: the rate, the concurrency, ..."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Fields of `engine.config.EngineConfig` that were set."""
    server: dict[str, Any] = field(default_factory=dict)
    """Fields of `subjects.url.options.ServerOptions` that were set."""
    command: str = ""
    """As typed, redacted."""

    def __post_init__(self) -> None:
        settle(self, HarnessError)
        if not self.find_load and (named := [each for each in self.slo_s if "_p" in each]):
            quantity = named[0].partition("_p")[0]
            raise HarnessError(
                f"--slo {named[0]} is a percentile, for --find-load; goodput takes {quantity}=SECONDS."
            )
        parts = {
            "load": WorkloadOptions(**self.load),
            "engine": EngineConfig(**self.engine),
            "server": ServerOptions(**self.server),
        }
        for name, part in parts.items():
            object.__setattr__(self, name, {each: getattr(part, each) for each in getattr(self, name)})

    @property
    def overrides(self) -> dict[str, str]:
        """Operation -> backend that serves it instead."""
        named = {operation: getattr(self, name) for operation, name in OVERRIDES.items()}
        return {operation: name for operation, name in named.items() if name is not None}

    def asked(self) -> dict[str, Any]:
        """What was set and is not a default, by option name, as JSON takes it."""
        found = {}
        for declared, each in option_names().values():
            held = self._holding(declared)
            value = held.get(each.field)
            if each.field in held and value not in (each.default, None):
                found[each.name] = str(value) if isinstance(value, Path) else value
        return found

    def _holding(self, declared: type) -> dict[str, Any]:
        parts = {WorkloadOptions: self.load, EngineConfig: self.engine, ServerOptions: self.server}
        return parts.get(declared, vars(self))


@dataclass(frozen=True)
class Talk:
    """What is said on stderr while a run is going; the record does not depend on it."""

    quiet: bool = option(False, "Say nothing of how far the run is.", group="record", short="-q")
    verbose: bool = option(
        False, "Say each second in a line of its own how far the run is.", group="record", short="-v"
    )

    def __post_init__(self) -> None:
        settle(self, HarnessError)
        if self.quiet and self.verbose:
            raise HarnessError("--quiet and --verbose contradict each other; give one of them.")


@cache
def option_names() -> dict[str, tuple[type, Option]]:
    """Name as typed, with underscores -> (the class that declares it, the option), in order of help."""
    found = [
        (declared, each)
        for declared in (RunOptions, WorkloadOptions, EngineConfig, ServerOptions)
        for each in options_of(declared)
        if each.group
    ]
    found.sort(key=lambda entry: list(GROUPS).index(entry[1].group))
    return {each.name: (declared, each) for declared, each in found}


def run_options(given: Mapping[str, Any], *, command: str = "") -> RunOptions:
    """The options of a run from their flat names; None = not given.

    Raises:
        BackbenchError: an unknown name (the nearest is given), a missing or a wrong value.
    """
    held: dict[type, dict[str, Any]] = {
        each: {} for each in (RunOptions, WorkloadOptions, EngineConfig, ServerOptions)
    }
    for name, value in canonical(given).items():
        declared, each = option_names()[name]
        if value is not None:
            held[declared][each.field] = value
    if "url" in held[ServerOptions]:
        held[RunOptions].setdefault("backend", OF_A_SERVER)
    for each in options_of(RunOptions):
        if each.default is MISSING and each.field not in held[RunOptions]:
            raise HarnessError(f"A run needs {each.flag} {each.metavar}. {each.help}")
    found = RunOptions(
        **held[RunOptions],
        load=held[WorkloadOptions],
        engine=held[EngineConfig],
        server=held[ServerOptions],
        command=command,
    )
    _require_one_subject(found)
    return found


def _require_one_subject(options: RunOptions) -> None:
    """HarnessError where options of the engine and of a server are mixed."""
    asked, of_server = options.asked(), options.server
    if "url" not in of_server:
        if of_server:
            name = next(each.flag for each in options_of(ServerOptions) if each.field in of_server)
            raise HarnessError(f"{name} is about a server; give its address by --url.")
        return
    if options.backend != OF_A_SERVER:
        raise HarnessError("--url measures a server with the backend it has; leave --backend out.")
    for name in asked:
        declared, each = option_names()[name]
        if (declared is EngineConfig and each.field != "max_len") or name in ENGINE_ONLY:
            raise HarnessError(f"{each.flag} says nothing to the server at --url; leave it out.")


def canonical(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` by the options' own names; dashes may stand for underscores.

    Raises:
        HarnessError: an unknown name, or one option under two of its names.
    """
    other = {also: each.name for _, each in option_names().values() for also in each.also}
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        name = other.get(name, name)
        if name not in option_names():
            known = [*option_names(), *other]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise HarnessError(f"There is no option {key!r}; did you mean {near[0]}?")
        if name in found:
            raise HarnessError(f"{key!r} and another name of {name} are both given; give one of them.")
        found[name] = value
    return found


def read_file(path: Path) -> dict[str, Any]:
    """The options of a TOML file by name: flat, or in a table for each of GROUPS.

    Raises:
        HarnessError: not to be read, not TOML, or an unknown option or table.
    """
    return canonical(flattened(read_toml(path, "--config"), path))


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """What a TOML file holds; HarnessError, in which `what` names it, where it is none."""
    try:
        with path.open("rb") as stream:
            content = stream.read(LONGEST_FILE + 1)
        tables = tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise HarnessError(f"{what} {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise HarnessError(f"{what} {path} is no TOML file: {error}.") from None
    if len(content) > LONGEST_FILE:
        raise HarnessError(f"{what} {path} is longer than {LONGEST_FILE} bytes; it is no such file.")
    return tables


def flattened(tables: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The options of a file's tables by name as written; HarnessError where one stands wrong."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if key not in GROUPS or not isinstance(value, dict):
            entries = {key: value}
        else:
            entries = value
            for name in canonical(value):
                if (group := option_names()[name][1].group) != key:
                    raise HarnessError(f"In {path}, {name} belongs into [{group}], not into [{key}].")
        if twice := flat.keys() & entries.keys():
            raise HarnessError(f"{path} gives {min(twice)} twice.")
        flat |= entries
    for name, value in flat.items():
        if isinstance(value, dict) and name.replace("-", "_") not in option_names():
            raise HarnessError(f"{path} has an unknown table [{name}]; there are {', '.join(GROUPS)}.")
    return flat


def over_file(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The file's options under those given; a way to offer requests replaces the file's whole way."""
    given = {name: value for name, value in canonical(given).items() if value is not None}
    ways = [way for way in OFFERS if way & given.keys()]
    dropped = frozenset[str]().union(*(way for way in OFFERS if way not in ways)) if ways else frozenset()
    return {name: value for name, value in canonical(file).items() if name not in dropped} | given
