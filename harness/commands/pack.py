"""`bench pack`: runs in one file, for others."""

from __future__ import annotations

from pathlib import Path

import click

from backbench.harness.commands.stored import RUN


@click.command()
@click.argument("runs", nargs=-1, required=True, type=RUN)
@click.option(
    "--out",
    "-o",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE.zip",
    help="The bundle: a new file.",
)
@click.option(
    "--redact",
    "words",
    multiple=True,
    metavar="WORD",
    help="Take this word out of every text too: a name that only you know. May be repeated.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print {bundle, bytes, entries: {name: fields}} as JSON."
)
def pack(runs: tuple[Path, ...], out: Path, words: tuple[str, ...], as_json: bool) -> None:
    """Pack RUNS, run and experiment directories, into one bundle that every reading command takes.

    Absolute paths, host and user names, addresses, UUIDs and serial numbers leave every text; no measured
    number changes. What was redacted is named here and in the record. Only runs that verify are packed.
    """
    from backbench.harness.commands.output import print_json
    from backbench.harness.commands.stored import reading, say
    from backbench.reports.pack import pack as pack_runs

    with reading(*runs):
        packed = pack_runs(runs, out, words)
    size = out.stat().st_size
    if as_json:
        print_json({"bundle": str(out), "bytes": size, "entries": packed.entries})
        return
    for name, fields in packed.entries.items():
        say(f"{name}: redacted {', '.join(fields) or 'nothing'}", err=False)
    say(f"Bundle: {out} ({size:,} bytes)", err=False)
