"""Steps launched before their inputs are known, so that launching them costs no time.

A step with drafts needs the tokens of the one before. So one is in flight at a time, and the device waits
while the host reads, accepts, schedules and drafts, and longest while it makes the calls that launch. Those
need no inputs: a captured step finds them in host memory that a copy reads. While the device computes a step,
the next one is *armed*: the copy, the graph and the results' way back are queued behind a closed gate
(`gate`). When the next step is known, its inputs are written to where the copy will read them, and the gate
is opened.

That takes a guess: that the next step will replay the graph of the last. An armed step has inert inputs from
the start: padding alone, which writes nothing anyone reads. A wrong guess is let pass like that, and the real
step follows it.

At a closed gate the device waits for the host. So the host must not wait for the device then, nor allocate
device or pinned memory, which may do so. A gate is closed and opened within one `Engine.step`: nobody else
meets it, and what comes between two steps does not make a guess wrong.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from backbench.engine.execution.gate import Gate
from backbench.engine.execution.results import Launched
from backbench.engine.execution.step_buffers import Staging, StepInputs

SURE = 0.82
"""A guess is made where more than this share of the last steps with drafts replayed the graph of the one
before. One in vain costs about four times what a right one saves (0.85 and 0.2 ms of 1.3 on an H100,
estimated for the smallest model): right in more than four of five it pays."""
MEMORY = 16
"""Steps with drafts over which that share is taken: the end of one answer does not make the next unlikely."""


@dataclass(frozen=True)
class Armed:
    """A step that is launched but for its inputs."""

    inputs: StepInputs
    """The inert ones."""
    staging: Staging
    """Where the step's inputs are read when the gate is open."""
    launched: Launched
    gate: Gate
    host_ns: int
    """The host's time of launching it."""


class Ahead:
    """The armed step of a runner, if there is one, and how well the last guesses would have done."""

    def __init__(self) -> None:
        self.sure = SURE
        self.armed: Armed | None = None
        self.used = 0
        """Armed steps that became real ones."""
        self.wasted = 0
        """Armed steps that were let pass."""
        self._last: Hashable | None = None
        self._share, self._seen = 0.5, 2
        """Steps of the graph of the one before, among those seen: at first as if one of two had been."""

    def saw(self, graph: Hashable | None) -> None:
        """Take note of the graph of a step with drafts that was launched; None = it had none."""
        if self._last is not None:
            self._note(graph == self._last)
        self._last = graph

    @property
    def likely(self) -> bool:
        """True where the next step with drafts will most likely replay the graph of the last."""
        return self._last is not None and self._share > self.sure

    def use(self) -> None:
        """Let the armed step go: its inputs are written."""
        self._open()
        self.used += 1

    def waste(self) -> None:
        """Let the armed step pass: its inputs are inert."""
        self._open()
        self.wasted += 1
        self._note(False)

    def reset_counts(self) -> None:
        """Forget how many there were."""
        self.used = self.wasted = 0

    def _note(self, alike: bool) -> None:
        self._seen = min(self._seen + 1, MEMORY)
        self._share += (alike - self._share) / self._seen

    def _open(self) -> None:
        assert self.armed is not None
        self.armed.gate.open()
        self.armed = None
