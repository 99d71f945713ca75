"""The command `bench`. Every command lives in its own file and is imported only when it is run."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import click

from backbench.errors import INTERRUPTED, USAGE, BackbenchError
from backbench.harness.commands.output import echo, error_line, flush, open_streams, silence

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run", "Replay a workload on the engine or against a server, and write a run directory."),
    "show": ("show", "Print a run's summary."),
    "list": ("listing", "List the runs and experiments below a directory."),
    "compare": ("compare", "Put two or more runs side by side."),
    "report": ("report", "Write one self-contained HTML report of one or more runs."),
    "verify": ("verify", "Recompute every number of a run from its tables."),
    "pack": ("pack", "Pack runs into one redacted file that others can read and verify."),
    "export": ("export", "Write runs in a format that other tools read."),
    "import": ("importing", "Make runs of what vLLM, AIPerf or GuideLLM measured, marked as foreign."),
    "schema": ("schema", "Print the JSON Schema of a run's record."),
    "recover": ("recover", "Make the record of a run that was killed, from what had finished."),
    "sweep": ("sweep", "Run a campaign of many runs, and go on where it was stopped or killed."),
    "gate": ("gate", "Say whether a candidate is worse than a baseline: pairs, statistics, an exit code."),
    "calibrate": ("gate", "Measure how much runs of the same code differ on this machine."),
    "trend": ("gate", "Show the history of gates."),
    "workloads": ("catalogues", "List the workloads."),
    "models": ("catalogues", "List the models."),
    "perplexity": ("perplexity", "Measure how well a model predicts text, under any backend."),
    "accuracy": ("accuracy", "Compare a model under quantized weights with the same one unquantized."),
    "quantize": ("quantize", "Write a quantized or sparse checkpoint that other engines load, too."),
    "serve": ("serve", "Serve a model over HTTP as OpenAI's API words it."),
    "kernels": ("kernels", "Time single operations on each backend, against the roofline."),
    "portability": ("portability", "Compile every kernel for every GPU, without one, against the best seen."),
    "tune": ("tune", "Measure which kernel launches are fastest for a model on this GPU, and keep them."),
    "null-server": ("null_server", "Serve scripted answers, to measure what a client itself costs."),
    "backends": ("catalogues", "List the backends, and why one is unavailable here."),
    "env": ("env", "Describe this machine and the software on it."),
}
"""Command -> (its module in harness.commands, its one-line help)."""
FUNCTIONS = {"list": "list_runs", "import": "import_runs"}
"""Command -> its function, where the command's name is Python's own."""


class BenchGroup(click.Group):
    """Imports a command's module when it is needed, and turns user errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"backbench.harness.commands.{COMMANDS[cmd_name][0]}")
        command = getattr(module, FUNCTIONS.get(cmd_name, cmd_name.replace("-", "_")))
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
        except BrokenPipeError:  # whoever reads has seen enough
            silence(1)
            ctx.exit(0)
        except KeyboardInterrupt:
            _tell("interrupted")
            ctx.exit(INTERRUPTED)
        except Exception as fault:
            error = _for_user(fault)
            if not isinstance(error, BackbenchError):
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            _tell(error_line(str(error)))
            ctx.exit(error.exit_code)


@click.group(
    cls=BenchGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.option("--debug", is_flag=True, help="Show the stack trace of an error.")
@click.version_option(package_name="backbench", prog_name="bench")
def bench(debug: bool) -> None:
    """Compare LLM inference kernels under real traffic: one engine, every backend, measured fairly."""


def main(arguments: list[str] | None = None) -> None:
    """The entry point: every way a command can end becomes at most one line and an exit code."""
    open_streams()
    _end_like_ctrl_c()
    try:
        Path.cwd()
    except FileNotFoundError:  # MKL, for one, ends a process that has none
        _tell(error_line("The working directory no longer exists; change to another one."))
        sys.exit(USAGE)
    code = run_command(sys.argv[1:] if arguments is None else arguments)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    sys.exit(code)


def run_command(arguments: list[str]) -> int:
    """Run `bench` with these arguments and return its exit code; click's usage errors are one line, too."""
    code = _invoke(arguments)
    try:
        flush()
    except OSError as error:
        silence(1)
        if code == 0 and not isinstance(error, BrokenPipeError):
            _tell(error_line(f"stdout cannot be written: {error.strerror}."))
            return USAGE
    return code


def _invoke(arguments: list[str]) -> int:
    try:
        result = bench.main(arguments, prog_name="bench", standalone_mode=False)
    except click.ClickException as error:
        _tell(error_line(error.format_message()))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _tell("interrupted")
        return INTERRUPTED
    except SystemExit as stop:  # a command's own exit code
        return stop.code if isinstance(stop.code, int) else 0
    return result if isinstance(result, int) else 0


def _for_user(fault: Exception) -> Exception:
    """The fault as one line where the user or the machine caused it; a defect stays what it is."""
    from backbench.harness.faults import explained

    if isinstance(fault, BackbenchError):
        return fault
    if isinstance(fault, OSError) and fault.errno is not None:
        names = " and ".join(str(name) for name in (fault.filename, fault.filename2) if name is not None)
        return BackbenchError(f"{names}: {fault.strerror}." if names else f"{fault.strerror}.")
    return explained(fault)


def _tell(line: str) -> None:
    """A line on stderr; where that is full or gone, there is nobody to tell."""
    try:
        echo(line, err=True)
    except OSError:
        silence(2)


def _end_like_ctrl_c() -> None:
    """SIGTERM and SIGHUP interrupt as Ctrl-C does, so that a run writes what it has measured."""
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def hang_up(number: int, frame: FrameType | None) -> None:
        for descriptor in terminals:  # the terminal is gone, and writing to it would fail
            silence(descriptor)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # nohup ignores SIGHUP, and Windows has none.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, hang_up)
