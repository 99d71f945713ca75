"""Does the gate hold what it says, with real runs on this CPU: equal code, planted faults, a busy machine.

    python benchmarks/gate_cpu.py [--out runs/gate-cpu] [--cases equal slower wrong busy] [--times 1]

    equal   this checkout against itself: must not fail
    slower  a copy whose engine sleeps a tenth of each step: must fail (exit code 1)
    wrong   a copy whose sdpa attention scales its scores wrongly: must end with exit code 5
    busy    as equal, beside one spinning process a core: must not fail; its runs are marked

Prints one line a gate. A case that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("backbench", "backends", "engine", "harness", "reports", "workloads")
POLICY = """\
workload = "synthetic"
options = ["--num-requests", "12", "--backend", "sdpa"]
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


def gate(case: str, candidate: Path, out: Path, seed: int, minutes: float | None) -> int:
    """One gate; its exit code. Prints its line."""
    out.mkdir(parents=True, exist_ok=True)
    policy = out / "bench-gate.toml"
    policy.write_text(POLICY.format(seed=seed))
    command = [sys.executable, "-m", "backbench", "gate", "--policy", str(policy), "--out", str(out / "gate")]
    command += ["--baseline", str(ROOT), "--candidate", str(candidate)]
    command += [] if minutes is None else ["--max-minutes", str(minutes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode
    if code not in range(6) or code == 2:
        sys.exit(f"{case}: the gate gave no answer (exit code {code})")
    found = json.loads((out / "gate" / "gate.json").read_text())
    void = sum(bool(pair["void"]) for pair in found["pairs"])
    said = "; ".join(
        f"{each['metric']} {each['loss']:+.1%} ({each['low']:+.1%} to {each['high']:+.1%}), "
        f"could see {each['detectable']:.1%}"
        for each in found["findings"]
    )
    held = "as promised" if code in EXPECTED[case] else "NOT AS PROMISED"
    pairs = f"{len(found['pairs'])} pairs, {void} void"
    seconds = time.monotonic() - started
    print(f"{case}: exit {code}, {held}, {pairs}, {seconds:.0f} s: {said or found['reason']}", flush=True)
    return code


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
    broken = 0
    for case in asked.cases:
        for index in range(asked.times):
            with spinning((os.cpu_count() or 1) if case == "busy" else 0):
                out = asked.out / f"{case}-{index + 1}"
                code = gate(case, trees[case], out, 1000 * index, asked.max_minutes)
            broken += code not in EXPECTED[case]
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
