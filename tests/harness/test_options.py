"""Every option is on the command line, in a configuration file and in Python, with one help text."""

from __future__ import annotations

import ast
import math
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from backbench.engine.config import EngineConfig
from backbench.errors import BackbenchError, HarnessError
from backbench.harness.commands.flags import help_of
from backbench.harness.commands.run import _options, run
from backbench.harness.objectives import parse_slo
from backbench.harness.options import (
    GROUPS,
    RunOptions,
    option_names,
    over_file,
    parse_label,
    parse_tags,
    read_file,
    run_options,
)
from backbench.harness.subjects.url.options import ServerOptions
from backbench.options import Option, options_of
from backbench.workloads.arrivals import PROFILE_FORMS, RATE_KINDS
from backbench.workloads.options import WorkloadOptions

FOLLOWS = {
    WorkloadOptions: {
        "seed",
        "vocab_size",
        "max_len",
        "tokenize",
        "tokenize_chat",
    },  # from the run, its model and its engine
    EngineConfig: {"quantize"},  # one of the schemes that the run takes in turns
    ServerOptions: set(),
    RunOptions: {"load", "engine", "server", "command"},  # hold those above, and what was typed
}
"""Fields that are nowhere typed because others decide them."""
NEEDED = {"workload": "sharegpt", "backend": "torch"}
URL = "http://localhost:8000/v1"
NEEDED_BY = {ServerOptions: {"workload": "sharegpt", "url": URL}}
"""An option of a server needs its address, and no backend."""
ENTRIES = list(option_names().values())
NAMES = list(option_names())


def example(option: Option) -> Any:
    """A value other than the default, as TOML and JSON hold it."""
    if option.choices is not None:
        return next(value for value in option.choices.values() if value != option.default)
    if option.kind is bool:
        return not option.default
    if option.kind is int:
        return int(option.minimum or 0) + 3
    if option.kind is float:
        return 0.75
    if option.kind is dict:
        return {"ttft": 0.5, "tpot": 0.05} if option.name == "slo" else {"commit": "a1", "card": "left"}
    names = {"quantize": "none,int8", "sparsity": "2:4", "url": URL, "metrics_url": URL}
    names |= {"speculate": "ngram:4"}
    written = names.get(option.name, "some-thing")
    return [1.5, 20.0] if option.kind == (float, float) else written


def typed(option: Option, value: Any) -> list[str]:
    """The same on the command line."""
    if option.kind is bool:
        return [option.flag if value else option.flag.replace("--", "--no-")]
    if option.kind is dict:
        return [option.flag, ",".join(f"{name}={limit}" for name, limit in value.items())]
    return [option.flag, *map(str, value if isinstance(value, list) else [value])]


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name} = {toml(each)}' for name, each in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def from_command_line(*arguments: str) -> RunOptions:
    given = run.make_context("run", list(arguments)).params
    for name in ("as_json", "no_report", "quiet", "verbose"):
        given.pop(name)
    options = _options(given, given.pop("config"))
    return RunOptions(
        **{each.name: getattr(options, each.name) for each in fields(options)} | {"command": ""}
    )


@pytest.mark.parametrize("declared", FOLLOWS)
def test_every_field_is_an_option_or_follows_from_others(declared: type) -> None:
    reachable = {each.field for each in options_of(declared) if each.group}
    assert reachable | FOLLOWS[declared] == {each.name for each in fields(declared)}
    assert not reachable & FOLLOWS[declared]
    assert {each.name for each in options_of(declared) if each.group} <= option_names().keys()


def test_names_are_used_once() -> None:
    names = [name for _, each in ENTRIES for name in (each.name, *each.also)]
    assert len(names) == len(set(names))
    assert len(NAMES) == sum(len([o for o in options_of(each) if o.group]) for each in FOLLOWS)


@pytest.mark.parametrize(("declared", "option"), ENTRIES, ids=NAMES)
def test_an_option_means_the_same_in_all_three(declared: type, option: Option, tmp_path: Path) -> None:
    value = example(option)
    file = tmp_path / "run.toml"
    needed = {name: each for name, each in NEEDED_BY.get(declared, NEEDED).items() if name != option.name}
    file.write_text(f"[{option.group}]\n{option.name} = {toml(value)}\n")
    arguments = [part for name, each in needed.items() for part in (f"--{name}", each)]
    python = run_options(needed | {option.name: value})
    assert python == from_command_line(*arguments, *typed(option, value))
    assert python == from_command_line(*arguments, "--config", str(file))
    held: Mapping[str, Any] = {
        RunOptions: vars(python),
        WorkloadOptions: python.load,
        ServerOptions: python.server,
    }.get(declared, python.engine)
    assert held[option.field] == option.accept(value)
    asked = {option.name: list(found) if isinstance(found := python.asked()[option.name], tuple) else found}
    assert asked == {option.name: value}


@pytest.mark.parametrize("option", [option for _, option in ENTRIES], ids=NAMES)
def test_help_is_the_declarations(option: Option) -> None:
    (parameter,) = (each for each in run.params if each.name == option.name)
    assert parameter.help == help_of(option)  # type: ignore[attr-defined]
    assert option.help and option.help in parameter.help  # type: ignore[attr-defined]
    assert parameter.heading == GROUPS[option.group]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "option", [option for _, option in ENTRIES if option.kind in (int, float)], ids=lambda each: each.name
)
def test_every_number_is_bounded_on_both_sides(option: Option, tmp_path: Path) -> None:
    least = option.minimum if option.minimum is not None else option.above
    assert least is not None and option.maximum is not None
    beyond: list[Any] = [option.maximum + 1, least - 1, 10**30, -(10**30)]
    if option.kind is float:
        beyond += [math.nan, math.inf, 1e308]
    file = tmp_path / "run.toml"
    for value in beyond:
        with pytest.raises(BackbenchError, match=option.flag) as caught:
            run_options(NEEDED | {option.name: value})
        assert len(str(caught.value)) < 280
        with pytest.raises(BackbenchError, match=option.flag):
            from_command_line("-w", "sharegpt", "-b", "torch", f"{option.flag}={value}")
        file.write_text(f"{option.name} = {value}\n")
        with pytest.raises(BackbenchError, match=option.flag):
            from_command_line("-w", "sharegpt", "-b", "torch", "--config", str(file))


def test_the_arrivals_help_names_every_kind() -> None:
    text = option_names()["arrival"][1].help
    assert all(kind in text for kind in [*RATE_KINDS, *PROFILE_FORMS.values()])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rte": 3}, "did you mean rate?"),
        ({"max_batched_tokens": 3}, "did you mean max_num_batched_tokens?"),
        ({"max_step_tokens": 3, "max-num-batched-tokens": 4}, "another name of max_step_tokens"),
        ({"backend": None}, "A run needs --backend"),
        ({"vocab_size": 3}, "no option 'vocab_size'"),
    ],
)
def test_wrong_names(given: dict[str, Any], words: str) -> None:
    with pytest.raises(HarnessError) as caught:
        run_options(NEEDED | given)
    assert words in str(caught.value)


def test_an_alias_is_the_option() -> None:
    assert run_options(NEEDED | {"max_num_batched_tokens": 99}).engine == {"max_step_tokens": 99}
    assert from_command_line("-w", "a", "-b", "b", "--max-num-batched-tokens", "99").engine == {
        "max_step_tokens": 99
    }


def test_operations_served_by_others() -> None:
    options = run_options(NEEDED | {"attention": "sdpa", "ops": "triton"})
    assert options.overrides == {"attention": "sdpa", "operations": "triton"}


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('workload = "synthetic"\nseed = 3\n[engine]\ngraphs = false\nmax-seqs = 8\n')
    options = from_command_line("-b", "torch", "--config", str(file), "--graphs", "--seed", "0")
    assert options == run_options(
        {"workload": "synthetic", "backend": "torch", "graphs": True, "max_seqs": 8}
    )


@pytest.mark.parametrize(
    ("typed", "left"),
    [
        ({"rate": 8.0}, {"rate": 8.0, "arrival": "gamma", "cv": 2.0}),
        ({"concurrency": 4}, {"concurrency": 4}),
        ({"all_at_once": True}, {"all_at_once": True}),
        ({"seed": 1}, {"rate": 4.0, "arrival": "gamma", "cv": 2.0, "seed": 1}),
    ],
)
def test_a_typed_way_to_offer_replaces_the_files(typed: dict[str, Any], left: dict[str, Any]) -> None:
    assert over_file({"rate": 4.0, "arrival": "gamma", "cv": 2.0}, typed) == left


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rte = 3", "did you mean rate?"),
        ("[engine]\nrate = 3", "rate belongs into [load], not into [engine]"),
        ("[motor]\nmax_seqs = 3", "unknown table [motor]; there are subject, load"),
        ("rate = 3\n[load]\nrate = 4", "gives rate twice"),
        ("rate = ", "is no TOML file"),
        ("a = " + "[" * 5000, "is no TOML file"),
        ("load = 3", "no option 'load'"),
        ("#" * 2**21, "longer than"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(HarnessError) as caught:
        read_file(file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["absent.toml", ".", "latin.toml"])
def test_a_file_that_cannot_be_read(tmp_path: Path, file: str) -> None:
    (tmp_path / "latin.toml").write_bytes(b'model = "\xe9"')
    with pytest.raises(HarnessError, match="--config"):
        read_file(tmp_path / file)


def test_slo() -> None:
    assert parse_slo("ttft=0.5, tpot=0.05") == {"ttft": 0.5, "tpot": 0.05}
    assert parse_slo({"e2e": 3}) == {"e2e": 3.0}
    repeated = from_command_line("-w", "a", "-b", "b", "--slo", "ttft=1", "--slo", "tpot=2")
    assert repeated.slo_s == {"ttft": 1.0, "tpot": 2.0}


@pytest.mark.parametrize(
    "given",
    [
        *(
            "ttft",
            "p99=1",
            "ttft=fast",
            "ttft=0",
            "ttft=-1",
            "tpot=inf",
            "ttft=nan",
            "",
            "ttft=1,",
            "ttft=1,ttft=2",
        ),
        *({"ttft": None}, {"p99": 1}, 3, ["ttft=1"]),
    ],
)
def test_bad_slo(given: Any) -> None:
    with pytest.raises(HarnessError, match="--slo"):
        run_options(NEEDED | {"slo": given})


def test_slo_given_empty_or_twice_on_the_command_line() -> None:
    for arguments in (("--slo", ""), ("--slo", "ttft=1", "--slo", "ttft=2")):
        with pytest.raises(HarnessError, match="--slo"):
            from_command_line("-w", "a", "-b", "b", *arguments)


@pytest.mark.parametrize(("field", "value"), [("warmup", -1), ("repeat", 0), ("seed", -1)])
def test_bad_options(field: str, value: int) -> None:
    with pytest.raises(HarnessError, match=f"--{field}"):
        RunOptions(workload="sharegpt", backend="torch", **{field: value})  # type: ignore[arg-type]


def test_parts_are_checked_with_the_whole() -> None:
    with pytest.raises(BackbenchError, match="--max-seqs"):
        RunOptions(workload="sharegpt", backend="torch", engine={"max_seqs": 0})
    with pytest.raises(BackbenchError, match="--temperature"):
        RunOptions(workload="sharegpt", backend="torch", load={"temperature": 1e308})


def test_the_page_asks_for_one_run_in_three_ways(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    shell, file, python = (
        page.split(f"```{kind}\n", 1)[1].split("```", 1)[0] for kind in ("sh", "toml", "python")
    )
    (tmp_path / "run.toml").write_text(file)
    typed = from_command_line(*shlex.split(shell)[2:])
    assert from_command_line("--config", str(tmp_path / "run.toml")) == typed
    call = ast.parse(python.strip().splitlines()[-1]).body[0].value  # type: ignore[attr-defined]
    assert run_options({each.arg: ast.literal_eval(each.value) for each in call.keywords}) == typed
    assert all(f"`[{group}]`" in page for group in GROUPS)


def test_tags_add_up_on_the_command_line() -> None:
    found = from_command_line("-w", "x", "-b", "y", "--tag", "a=1", "--tag", "b=2=3", "--label", " night ")
    assert (found.tags, found.label) == ({"a": "1", "b": "2=3"}, "night")


@pytest.mark.parametrize(
    "tag", ["", "a", "a=", "=1", "a b=1", "a=1,a=2", "a=\x1b", "a=" + "x" * 65, {"a": 1}, 3]
)
def test_a_malformed_tag_is_one_line(tag: Any) -> None:
    with pytest.raises(HarnessError, match="--tag") as error:
        parse_tags(tag)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("label", ["", " ", "a\nb", "\u202eb", "x" * 65, 3])
def test_a_malformed_label_is_one_line(label: Any) -> None:
    with pytest.raises(HarnessError, match="--label") as error:
        parse_label(label)
    assert len(str(error.value)) < 200
