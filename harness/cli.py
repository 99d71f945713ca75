"""The command `bench`. Every command lives in its own file and is imported only when it is run."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any

import click

from backbench.errors import INTERRUPTED, BackbenchError

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run", "Replay a workload on the engine with one backend, and write a run directory."),
    "show": ("show", "Print a run's summary."),
    "compare": ("compare", "Put two or more runs side by side."),
    "report": ("report", "Write one self-contained HTML report of one or more runs."),
    "verify": ("verify", "Recompute every number of a run from its tables."),
    "gate": ("gate", "Say whether a candidate is worse than a baseline: pairs, statistics, an exit code."),
    "workloads": ("catalogues", "List the workloads."),
    "models": ("catalogues", "List the models."),
    "perplexity": ("perplexity", "Measure how well a model predicts text, under any backend."),
    "kernels": ("kernels", "Time single operations on each backend, against the roofline."),
    "portability": ("portability", "Compile every Triton kernel for every GPU, against the best seen."),
    "tune": ("tune", "Measure which kernel launches are fastest for a model on this GPU, and keep them."),
    "backends": ("catalogues", "List the backends, and why one is unavailable here."),
    "env": ("env", "Describe this machine and the software on it."),
}
"""Command -> (its module in harness.commands, its one-line help)."""


class BenchGroup(click.Group):
    """Imports a command's module when it is needed, and turns user errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"backbench.harness.commands.{COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS) or list(COMMANDS)
            raise click.UsageError(f"No command {args[0]!r}; did you mean {' or '.join(near)}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as fault:
            from backbench.harness.faults import explained

            error = fault if isinstance(fault, BackbenchError) else explained(fault)
            if not isinstance(error, BackbenchError):
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(error.exit_code)


@click.group(
    cls=BenchGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.option("--debug", is_flag=True, help="Show the stack trace of an error.")
@click.version_option(package_name="backbench", prog_name="bench")
def bench(debug: bool) -> None:
    """Compare LLM inference kernels under real traffic: one engine, every backend, measured fairly."""


def main(arguments: list[str] | None = None) -> None:
    """The entry point: click's usage errors too become one line and exit code 2."""
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: list[str]) -> int:
    """Run `bench` with these arguments and return its exit code."""
    try:
        result = bench.main(arguments, prog_name="bench", standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"error: {' '.join(error.format_message().split())}", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return result if isinstance(result, int) else 0
