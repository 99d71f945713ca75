"""A sweep's worker whose runs are scripts: what they measure is known, and they take no time.

python scripted_worker.py work DIRECTORY SECONDS      # each run takes so long before it ends
python scripted_worker.py kill DIRECTORY SEED KILLS   # four workers, killed and replaced at random
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from backbench.harness import experiment
from backbench.harness.experiment import Observer
from backbench.harness.options import RunOptions
from backbench.harness.repeats import Ended
from backbench.harness.subjects.scripted import ScriptedSubject
from backbench.harness.sweep.worker import Worker

FIRST_MS = {"torch": 50.0, "sdpa": 40.0, "triton": 20.0}
WORKERS = 4
TEMPLATE = "template"
"""Beside the sweep's directory: a run that stands for all, where only their coming and going matters."""


def script(options: RunOptions) -> ScriptedSubject:
    """Slower with each sequence at once, and a little by the seed, so that repeats differ."""
    each_ms = 10.0 + options.load.get("concurrency", 1) + 0.1 * (options.seed % 7)
    return ScriptedSubject(FIRST_MS[options.backend], each_ms)


def measure_script(options: RunOptions, out: Path, beat: Callable[[], None]) -> Ended:
    """The script of these options, as a run directory."""
    beat()
    experiment.run(replace(options, out=out, warmup=0), Observer(), script)
    return Ended(0, "")


def wait(seconds: float, beat: Callable[[], None]) -> None:
    """Let time pass, alive."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        beat()
        time.sleep(0.005)


def work(directory: Path, seconds: float) -> None:
    """Run scripts until the sweep is done."""

    def measure(options: RunOptions, out: Path, beat: Callable[[], None]) -> Ended:
        wait(seconds, beat)
        return measure_script(options, out, beat)

    Worker(directory, lambda text: None, measure, poll_s=0.05).work()


def start_worker(directory: Path, seconds: float) -> subprocess.Popen[bytes]:
    """`work` in a process of its own."""
    return _start("work", str(directory), str(seconds))


def start_killing(directory: Path, seed: int, kills: int) -> subprocess.Popen[bytes]:
    """`kill` in a process of its own."""
    return _start("kill", str(directory), str(seed), str(kills))


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    paths = [str(Path(experiment.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, *arguments], env=environment)


def kill_at_random(directory: Path, seed: int, kills: int) -> None:
    """Four workers that copy the template slowly; now and then one is killed outright and replaced."""
    chance = random.Random(seed)

    def copy(options: RunOptions, out: Path, beat: Callable[[], None]) -> Ended:
        out.mkdir()
        for file in sorted((directory.parent / TEMPLATE).iterdir()):
            wait(0.02, beat)
            shutil.copy(file, out)
        return Ended(0, "")

    def start() -> int:
        if pid := os.fork():
            return pid
        try:
            Worker(directory, lambda text: None, copy, poll_s=0.05).work()
        finally:
            os._exit(int(sys.exc_info()[0] is not None))

    living = [start() for _ in range(WORKERS)]
    for _ in range(kills):
        time.sleep(chance.uniform(0.1, 0.6))
        place = chance.randrange(WORKERS)
        os.kill(living[place], signal.SIGKILL)
        _, status = os.waitpid(living[place], 0)
        if not os.WIFSIGNALED(status):
            sys.exit("a worker had ended before it was killed: give it more cells")
        living[place] = start()
    if any(os.waitpid(pid, 0)[1] for pid in living):
        sys.exit("a worker failed")


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        kill_at_random(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
