"""A campaign: a file that says which runs there are to be, a matrix of `bench run`'s options."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from backbench.errors import BackbenchError, HarnessError, shown
from backbench.harness.options import (
    RunOptions,
    canonical,
    flattened,
    option_names,
    over_file,
    read_toml,
    run_options,
)
from backbench.reports.record.sweep import point_name

KEYS = {"name": str, "repeats": int, "base": dict, "matrix": dict, "exclude": list, "include": list}
SET_BY_THE_SWEEP = {
    "out": "cells have directories of their own",
    "repeat": "say repeats = N at the top",
    "find_load": "a cell is one run; put the loads into the matrix",
}
MOST_REPEATS = 1000
MOST_POINTS = 10_000
DEFINES_A_CONDITION = ("workload", "model", "dtype")
"""Runs that differ in one of these do not compare; nor do those offered other requests, or otherwise."""


@dataclass(frozen=True)
class Point:
    """One combination of options, to be run `repeats` times."""

    arm: str
    condition: str
    options: RunOptions

    @property
    def name(self) -> str:
        """As its cells are called."""
        return point_name(self.arm, self.condition)


@dataclass(frozen=True)
class Campaign:
    """What a campaign file asks for."""

    name: str
    repeats: int
    points: tuple[Point, ...]
    """Those of one condition next to each other."""


def read_campaign(path: Path) -> Campaign:
    """The campaign in a TOML file.

    Raises:
        BackbenchError: the file is none, or an option has an unknown name or a wrong value.
    """
    tables = read_toml(path, "The campaign")
    for key, value in tables.items():
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0)[0]
            raise HarnessError(f"{path}: unknown key {shown(key)}; did you mean {near}?")
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            words = {str: "a text", int: "a whole number", dict: "a table", list: "a list of tables"}
            raise HarnessError(f"{path}: {key} must be {words[KEYS[key]]}, not {shown(value)}.")
    repeats = tables.get("repeats", 1)
    if not 1 <= repeats <= MOST_REPEATS:
        raise HarnessError(f"{path}: repeats must be at least 1 and at most {MOST_REPEATS}, not {repeats}.")
    name = tables.get("name", path.stem)
    if not name or not name.isprintable() or "/" in name or name.startswith("."):
        raise HarnessError(f"{path}: name names a directory; {shown(name)} cannot.")
    base = _options(flattened(tables.get("base", {}), path), f"{path}, [base]")
    combinations = list(_combinations(tables, path))
    if not 1 <= len(combinations) <= MOST_POINTS:
        raise HarnessError(f"{path} asks for {len(combinations)} points; at least 1, at most {MOST_POINTS}.")
    asked = [_run(base, each, path) for each in combinations]
    for place, options in enumerate(asked):
        if options in asked[:place]:
            what = _said(combinations[place])
            raise HarnessError(f"{path} asks twice for the point of {what}; leave one out.")
    return Campaign(name, repeats, tuple(_points(asked)))


def _combinations(tables: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """The matrix without what is excluded, then what is included."""
    axes = _options(tables.get("matrix", {}), f"{path}, [matrix]")
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise HarnessError(f"{path}: [matrix] {name} must be a list of values, not {shown(values)}.")
    excluded = [_options(each, f"{path}, [[exclude]]") for each in _tables(tables, "exclude", path)]
    for each in excluded:
        if odd := next((name for name, value in each.items() if value not in axes.get(name, [])), None):
            raise HarnessError(f"{path}: [[exclude]] {odd} = {shown(each[odd])} is not in the matrix.")
    included = [_options(each, f"{path}, [[include]]") for each in _tables(tables, "include", path)]
    if axes or not included:
        for values in product(*axes.values()):
            found = dict(zip(axes, values, strict=True))
            if not any(each.items() <= found.items() for each in excluded):
                yield found
    yield from included


def _tables(tables: Mapping[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tables.get(key, [])
    if not all(isinstance(each, dict) and each for each in found):
        raise HarnessError(f"{path}: [[{key}]] must hold options.")
    return found


def _options(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """By the options' own names; HarnessError where one is unknown or the sweep's to set."""
    try:
        found = canonical(given)
    except BackbenchError as error:
        raise HarnessError(f"{where}: {error}") from None
    if taken := next((name for name in found if name in SET_BY_THE_SWEEP), None):
        raise HarnessError(f"{where}: {taken} is set by the sweep; {SET_BY_THE_SWEEP[taken]}.")
    return found


def _run(base: Mapping[str, Any], combination: Mapping[str, Any], path: Path) -> RunOptions:
    try:
        options = run_options(over_file(base, combination))
    except BackbenchError as error:
        at = f" ({_said(combination)})" if combination else ""
        raise HarnessError(f"{path}{at}: {error}") from None
    if "," in options.backend and "=" not in options.backend:
        raise HarnessError(f'{path}: a point has one backend; write backend = ["torch", ...] in [matrix].')
    return options


def _said(combination: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in combination.items())[:100]


def _points(asked: Sequence[RunOptions]) -> Iterator[Point]:
    """Each with its names, which leave out defaults; the points of a condition follow each other, so that
    their runs are neighbours.
    """
    flat = [options.asked() for options in asked]
    names = [name for name in option_names() if any(each.get(name) != flat[0].get(name) for each in flat)]
    conditions = [name for name in names if defines_condition(name)]
    arms = ["backend", *(name for name in names if not defines_condition(name) and name != "backend")]
    grouped: dict[str, list[Point]] = {}
    for options, each in zip(asked, flat, strict=True):
        arm, condition = (
            " · ".join(_text(name, each[name]) for name in group if name in each)
            for group in (arms, conditions)
        )
        grouped.setdefault(condition, []).append(Point(arm, condition, options))
    for points in grouped.values():
        yield from points


def defines_condition(name: str) -> bool:
    """Whether runs that differ in this option answer different questions, and are not arms of one."""
    return name in DEFINES_A_CONDITION or option_names()[name][1].group in ("load", "requests", "record")


def _text(name: str, value: Any) -> str:
    """An option as a label says it: "sdpa", "rate 4", "no graphs"."""
    if name in ("backend", "workload", "model"):
        return str(value)
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if isinstance(value, dict):
        value = ",".join(f"{key}={each}" for key, each in value.items())
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
