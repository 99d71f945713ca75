"""Options as they stand on the command line, made from their one declaration (backbench/options.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Any

import click

from backbench.harness.options import option_names
from backbench.options import Option
from backbench.options import flag as typed

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class GroupedFlag(click.Option):
    """A click option that knows the heading it stands under in help."""

    heading: str = "Options"


class GroupedCommand(click.Command):
    """A command whose help lists its options under headings, in the order they are declared."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            line = parameter.get_help_record(ctx)
            if line is not None:
                sections.setdefault(getattr(parameter, "heading", "Options"), []).append(line)
        for heading, lines in sections.items():
            with formatter.section(heading):
                formatter.write_dl(lines)


def flag(
    option: Option,
    heading: str = "Options",
    *,
    parameter: str | None = None,
    default: Any = None,
    help: str | None = None,
    unset: str | None = None,
    required: bool = False,
) -> Decorator:
    """The click option of a declared one, checked as soon as it is typed; None = not given.

    A boolean has a switch for either side. `parameter` names the command's argument; `default`,
    `help` and `unset` are a command's own.
    """
    names = [option.short] if option.short else []
    for name in (option.name, *option.also):
        names.append(f"{typed(name)}/{typed('no_' + name)}" if option.kind is bool else typed(name))
    settings: dict[str, Any] = {"type": _CLICK.get(option.kind, click.STRING)}
    settings |= {"default": default, "required": required}
    text = replace(option, help=help or option.help, unset=unset or str(default or option.unset))
    settings["help"] = help_of(replace(text, default=None) if required else text)
    if option.kind == (float, float):
        settings["nargs"] = 2
    if option.metavar or option.kind is int:
        settings["metavar"] = option.metavar or "N"
    if option.choices is not None:
        offered = list(option.choices)
        settings["shell_complete"] = lambda ctx, param, start: [x for x in offered if x.startswith(start)]
    if option.kind is dict:  # NAME=VALUE pairs, however often it is given
        settings |= {"multiple": True, "callback": lambda ctx, param, given: _joined(option, given)}
    else:
        settings["callback"] = lambda ctx, param, given: None if given is None else option.accept(given)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        made = click.option(*names, parameter or option.name, cls=GroupedFlag, **settings)(function)
        made.__click_params__[-1].heading = heading  # type: ignore[attr-defined]
        return made

    return decorate


def subject_flag(name: str, **own: Any) -> Decorator:
    """An option of `bench run` in another command, where it means the same; `own` as for `flag`."""
    option = option_names()[name][1]
    stands = not (own.get("required") or option.default is MISSING)
    settings: dict[str, Any] = {"default": option.default if stands else None} | own
    return flag(option, **settings)


def help_of(option: Option) -> str:
    """The one help text: what it is, and what holds where it is not given."""
    default = option.unset
    if not default and option.default not in (MISSING, None, False, {}):
        default = "on" if option.default is True else str(option.default)
    return option.help + (f" [{default}]" if default else "")


_CLICK: dict[Any, Any] = {
    bool: None,
    int: click.INT,
    float: click.FLOAT,
    Path: click.Path(path_type=Path),
    (float, float): click.FLOAT,
}


def _joined(option: Option, given: tuple[str, ...]) -> Any:
    return option.accept(",".join(given)) if given else None
