"""Gating kernels: the arms take turns, A B B A, on kernels that are set up anew for every pair.

Arms of the same code share one process; arms of two trees have one each, and fresh ones every pair, since
what a process draws once (where its memory lies) would otherwise stay with its arm.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backbench.errors import HarnessError
from backbench.harness.gate.arms import BASELINE, CANDIDATE, Arm, command_of, tree_of
from backbench.harness.gate.fingerprint import Fingerprint
from backbench.harness.gate.outcome import Pair
from backbench.harness.gate.session import Session

TURNS = 8
"""Of each arm in a pair; the median of their rounds is its value."""
WORKER = "from backbench.harness.kernels.turns import main; main()"
HARD = ("system.device.name", "system.cpu.name", "system.cpu.cores_usable", "dtype")
SOFT = ("system.os", "software.python", "software.packages.torch", "software.packages.triton")
Options = Mapping[str, Any]
"""Of `bench kernels`, by parameter; fields of `harness.kernels.plan.Asked`."""


@dataclass(frozen=True)
class Taken:
    """What one pair's turns gave."""

    facts: Mapping[str, Mapping[str, Any]]
    """Arm -> what it says of itself (`harness.kernels.turns.Side.describe`)."""
    seconds: Mapping[str, Mapping[str, Sequence[float]]]
    """Arm -> kernel -> the time of a call, one a turn."""


class TakeTurns(Protocol):
    """Sets both arms up anew and lets them take turns."""

    def __call__(self, order: Sequence[str]) -> Taken: ...


class Worker:
    """A process of `harness.kernels.turns`."""

    def __init__(self, arm: Arm) -> None:
        self.name = arm.name
        command, environment = command_of(arm.python or sys.executable, tree_of(arm), WORKER)
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                env=environment,
            )
        except OSError as error:
            self._said.close()
            raise HarnessError(f"The {arm.name} cannot start {command[0]}: {error.strerror}.") from None

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer; HarnessError with what the process said last where there is none."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            last = (self._said.read().strip() or f"it ended with code {code}").splitlines()[-1]
            raise HarnessError(f"The {self.name}'s kernels could not run: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise HarnessError(f"The {self.name}'s kernels could not run: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._said.close()


class InProcesses:
    """Turns in one process for arms of the same code, else in one each, new ones every pair."""

    def __init__(self, arms: Sequence[Arm], options: Mapping[str, Options]) -> None:
        self.arms, self.options = arms, options
        self.shared = len({(arm.tree, arm.python) for arm in arms}) == 1
        self._workers: list[Worker] = []

    def __enter__(self) -> InProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        while self._workers:
            self._workers.pop().close()

    def __call__(self, order: Sequence[str]) -> Taken:
        if not self.shared:
            self.__exit__()
        for arm in self.arms[len(self._workers) : 1 if self.shared else None]:
            self._workers.append(Worker(arm))
        workers = {arm.name: self._workers[min(i, len(self._workers) - 1)] for i, arm in enumerate(self.arms)}
        facts: dict[str, Any] = {}
        for worker in self._workers:
            mine = {name: self.options[name] for name, each in workers.items() if each is worker}
            facts |= worker.ask({"begin": mine})
        seconds: dict[str, dict[str, list[float]]] = {arm.name: {} for arm in self.arms}
        for name in order:
            for kernel, found in workers[name].ask({"turn": name}).items():
                seconds[name].setdefault(kernel, []).append(found)
        return Taken(facts, seconds)


@dataclass
class KernelSession(Session):
    """A gate of kernels in its directory."""

    take_turns: TakeTurns = field(kw_only=True)

    def names(self, valid: Sequence[Pair]) -> Sequence[str]:
        return sorted({name for pair in valid for name in pair.values})

    def next_pair(self, pairs: Sequence[Pair]) -> Pair:
        """Let the arms take turns on fresh kernels, or take the pair from the disk."""
        index = len(pairs)
        file = self.out / "pairs" / f"{index:02d}.json"
        stored = _stored(file)
        if stored is None:
            first, second = (arm.name for arm in self._order(pairs))
            taken = self.take_turns((first, second, second, first) * (TURNS // 2))
            found = {arm: kernel_fingerprint(facts) for arm, facts in taken.facts.items()}
            stored = kernel_pair(index, (first, second), taken), found
            _write(file, *stored)
        pair, found = stored
        self.fingerprint = self.fingerprint or found[BASELINE]
        for arm, each in found.items():
            self.soft[arm] = each.soft
            difference = self.fingerprint.against(each)
            self.differs = self.differs or (f"{arm}: {difference}" if difference else None)
        self.tell(f"pair {index + 1}: {f'void: {pair.void[0]}' if pair.void else 'valid'}")
        return pair


def kernel_pair(index: int, order: tuple[str, str], taken: Taken) -> Pair:
    """The pair of these turns: of a kernel captured in a graph the graph's time, the host left out."""
    medians = {
        arm: {kernel: float(np.median(rounds)) for kernel, rounds in kernels.items()}
        for arm, kernels in taken.seconds.items()
    }
    both = medians[BASELINE].keys() & medians[CANDIDATE].keys()
    kept = {name for name in both if name.endswith(", graph") or f"{_kernel(name)}, graph" not in both}
    values = {_kernel(name): (medians[BASELINE][name], medians[CANDIDATE][name]) for name in sorted(kept)}
    wrong = {arm: facts["wrong"] for arm, facts in taken.facts.items()}
    refused = [
        f"{arm} refuses {kernel}: {why}"
        for arm, facts in taken.facts.items()
        for kernel, why in facts["refused"].items()
    ]
    void = [f"baseline: wrong results: {each}" for each in wrong[BASELINE]] + refused
    return Pair(
        index, index, order, values, tuple(void), "; ".join(wrong[CANDIDATE]) or None, not any(wrong.values())
    )


def _kernel(name: str) -> str:
    """Its name without the mode."""
    return name.rpartition(", ")[0]


def kernel_fingerprint(facts: Mapping[str, Any]) -> Fingerprint:
    """Of what an arm says of itself."""

    def at(dotted: str) -> Any:
        value: Any = facts
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return Fingerprint({key: at(key) for key in HARD}, {key: at(key) for key in SOFT})


def _write(file: Path, pair: Pair, found: Mapping[str, Fingerprint]) -> None:
    content = {"pair": asdict(pair), "fingerprints": {arm: asdict(each) for arm, each in found.items()}}
    file.parent.mkdir(exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def _stored(file: Path) -> tuple[Pair, dict[str, Fingerprint]] | None:
    """A pair that was finished before; None = run it."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        kept = content["pair"]
        values = {str(name): (float(a), float(b)) for name, (a, b) in kept.pop("values").items()}
        first, second = kept.pop("order")
        pair = Pair(values=values, order=(first, second), void=tuple(kept.pop("void")), **kept)
        return pair, {arm: Fingerprint(**each) for arm, each in content["fingerprints"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise HarnessError(f"{file} is no pair of kernels ({error}); remove it to run it again.") from None
