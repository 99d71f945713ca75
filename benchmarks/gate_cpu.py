"""Does the gate hold what it says, with real runs on this CPU: equal code, planted faults, a busy machine.

    python benchmarks/gate_cpu.py [--out runs/gate-cpu] [--cases equal slower wrong busy] [--times 1]

    equal   this checkout against itself: must not fail; its runs are compared, too, and nothing is coloured
    slower  a copy whose engine sleeps a tenth of each step: must fail (exit code 1)
    wrong   a copy whose sdpa attention scales its scores wrongly: must end with exit code 5
    busy    as equal, beside one spinning process a core: must not fail, and every run is marked disturbed

Prints a line a gate, then a table, which stands in OUT/table.json as well. What is in it is not run again; a
gate that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("backbench", "backends", "engine", "harness", "reports", "workloads")
POLICY = """\
workload = "synthetic"
options = ["--num-requests", "12", "--warmup", "2", "--backend", "sdpa"]
check = "first"
seed = {seed}
"""
STEP = "    def step(self) -> list[Token]:\n"
SLOWER_STEP = (
    STEP
    + """\
        started = time.perf_counter()
        visible = self._step_itself()
        time.sleep({loss} * (time.perf_counter() - started))
        return visible

    def _step_itself(self) -> list[Token]:
"""
)
SCALE, WRONG_SCALE = "scale=self.spec.scale", "scale=2 * self.spec.scale"
COLOURED = ("better", "worse")
EXPECTED = {"equal": (0, 3), "slower": (1,), "wrong": (5,), "busy": (0, 3, 4)}
"""Exit codes that hold the promise: equal code may not be told apart, and is never failed."""


def copy_with(folder: Path, file: str, before: str, after: str) -> Path:
    """A copy of this checkout's rooms in which one text of one file is another."""
    if not folder.exists():
        for room in ROOMS:
            shutil.copytree(ROOT / room, folder / room, symlinks=True)
    text = (ROOT / file).read_text()
    assert before in text, f"{file} has changed: {before!r} is gone"
    (folder / file).write_text(text.replace(before, after))
    return folder


@contextlib.contextmanager
def spinning(processes: int) -> Iterator[None]:
    """So many processes that do nothing but take a core's time."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for each in started:
            each.kill()
            each.wait()


def gate(case: str, candidate: Path, out: Path, seed: int, minutes: float | None) -> dict[str, Any]:
    """One gate: its row of the table."""
    out.mkdir(parents=True, exist_ok=True)
    policy = out / "bench-gate.toml"
    policy.write_text(POLICY.format(seed=seed))
    command = ["gate", "--policy", str(policy), "--out", str(out / "gate")]
    command += ["--baseline", str(ROOT), "--candidate", str(candidate)]
    command += [] if minutes is None else ["--max-minutes", str(minutes)]
    started, before_s = time.monotonic(), cpu_s()
    code = bench(*command).returncode
    if code not in range(6) or code == 2:
        sys.exit(f"{case}: the gate gave no answer (exit code {code})")
    found = json.loads((out / "gate" / "gate.json").read_text())
    about = marked(out / "gate")
    return {
        "case": case,
        "gate": out.name,
        "exit": code,
        "held": code in EXPECTED[case] and (case != "busy" or about["disturbed"] == about["runs"]),
        "pairs": len(found["pairs"]),
        "void": sum(bool(pair["void"]) for pair in found["pairs"]),
        "wall_s": round(time.monotonic() - started),
        "cpu_s": round(cpu_s() - before_s, 1),
        "reason": found["reason"],
        "findings": found["findings"],
    } | about


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """This checkout's command; its progress is shown."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "backbench", *arguments]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)


def cpu_s() -> float:
    """CPU seconds of all processes that were started and ended, theirs included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def marked(folder: Path) -> dict[str, Any]:
    """How many of a gate's runs say that the machine was not theirs, and what the first says."""
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("pairs/*/*/run.json"))]
    said = [[each for each in record["validity"] if each.startswith("disturbed: ")] for record in records]
    told = next((each[0] for each in said if each), "")
    return {"runs": len(records), "disturbed": sum(map(bool, said)), "disturbance": told}


def compare(folder: Path) -> dict[str, Any]:
    """What `bench compare` says of the two arms' valid runs, which are of the same code."""
    if not (folder / "experiment.json").is_file():
        return {"compared": 0, "coloured": [], "conclusion": "no valid pair"}
    done = bench("compare", str(folder), "--json")
    if done.returncode:
        sys.exit(f"bench compare {folder} ended with exit code {done.returncode}")
    found = json.loads(done.stdout)
    verdicts = {
        row["metric"]: next(value for key, value in row.items() if key.endswith(" verdict"))
        for row in found["metrics"]
    }
    coloured = [f"{metric} {verdict}" for metric, verdict in verdicts.items() if verdict in COLOURED]
    judged = sum(bool(verdict) for verdict in verdicts.values())
    return {"compared": judged, "coloured": coloured, "conclusion": found["conclusion"]}


def line(row: dict[str, Any]) -> str:
    """A gate in one line."""
    said = "; ".join(
        f"{each['metric']} {each['loss']:+.1%} ({each['low']:+.1%} to {each['high']:+.1%}), "
        f"could see {each['detectable']:.1%}"
        for each in row["findings"]
    )
    held = "as promised" if row["held"] else "NOT AS PROMISED"
    told = f"{row['gate']}: exit {row['exit']}, {held}, {row['pairs']} pairs, {row['void']} void, "
    told += (
        f"{row['disturbed']} of {row['runs']} runs disturbed, {row['wall_s']} s, {row['cpu_s']} CPU s: "
        f"{said or row['reason']}"
    )
    if row["disturbance"]:
        told += f"; {row['disturbance']}"
    if "compare" in row:
        found = row["compare"]
        what = ", ".join(found["coloured"]) or "none"
        told += f"; compare: {what} of {found['compared']} coloured ({found['conclusion']})"
    return told


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a case."""
    heads = ["case", "gates", "as promised", "exit codes", "compares with a colour", "coloured quantities"]
    heads += ["runs disturbed", "CPU s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        codes = [row["exit"] for row in mine]
        compared = [row["compare"] for row in mine if "compare" in row]
        coloured = sum(len(each["coloured"]) for each in compared)
        cells = [
            case,
            len(mine),
            sum(row["held"] for row in mine),
            ", ".join(f"{codes.count(code)} x {code}" for code in sorted(set(codes))),
            f"{sum(bool(each['coloured']) for each in compared)} of {len(compared)}",
            f"{coloured} of {sum(each['compared'] for each in compared)}",
            f"{sum(row['disturbed'] for row in mine)} of {sum(row['runs'] for row in mine)}",
            round(sum(row["cpu_s"] for row in mine)),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gate-cpu"))
    parser.add_argument("--cases", nargs="+", choices=list(EXPECTED), default=list(EXPECTED))
    parser.add_argument("--times", type=int, default=1, help="gates a case, each with its own seeds")
    parser.add_argument(
        "--loss", type=float, default=0.10, help="share of a step that the slower copy sleeps"
    )
    parser.add_argument("--max-minutes", type=float, help="of each gate")
    asked = parser.parse_args()
    trees = {"equal": ROOT, "busy": ROOT}
    copies = asked.out / "copies"
    slower = SLOWER_STEP.format(loss=asked.loss)
    trees["slower"] = copy_with(copies / "slower", "engine/engine.py", STEP, slower)
    trees["wrong"] = copy_with(copies / "wrong", "backends/sdpa/attention.py", SCALE, WRONG_SCALE)
    file = asked.out / "table.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    for index in range(asked.times):
        for case in asked.cases:
            out = asked.out / f"{case}-{index + 1}"
            row = next((each for each in rows if each["gate"] == out.name), None)
            if row is None:
                with spinning((os.cpu_count() or 1) if case == "busy" else 0):
                    row = gate(case, trees[case], out, 1000 * index, asked.max_minutes)
                if case == "equal":
                    row["compare"] = compare(out / "gate")
                rows.append(row)
                partial = file.with_suffix(".partial")
                partial.write_text(json.dumps(rows, indent=1) + "\n")
                partial.replace(file)
            print(line(row), flush=True)
    print(f"\n{table(rows)}")
    return int(not all(row["held"] and not row.get("compare", {}).get("coloured") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
