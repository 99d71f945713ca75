"""An engine over several devices: what the first rank tells the others, and what those do.

A message is a byte that says what to do, and what that needs; a step itself lies on the board. Where ranks
divide every layer, each samples all tokens from the same logits with the same noise; where they divide the
layers among them, the first one samples. So no token comes back, and none is sent.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from backbench.backends.interface import Device
from backbench.engine.execution.device_queue import DeviceQueue, Mark, Stretch, Timed
from backbench.engine.execution.runner import Runner
from backbench.engine.execution.step_buffers import Staging, StepInputs
from backbench.engine.parallel.board import SLOTS, Board
from backbench.engine.parallel.part import Job, Part, open_part
from backbench.engine.parallel.team import Member, Team
from backbench.errors import EngineError

CLOSING_S = 30.0
"""What ranks have to give everything back."""
STEP, CAPTURE, RESET, MEMORY, CLOSE = range(5)
"""First byte of a message: a step in the slot that follows; capture graphs of the kinds that follow; forget
the peaks of memory; say what memory was taken; the engine is closed."""


def serve(member: Member, job: Job) -> None:
    """Be one of an engine's other ranks until it is closed."""
    assert member.connection is not None
    part = open_part(job, member.peers)
    runner = Runner(
        part.decoder, part.selection.operations, part.limits, graphs=job.config.graphs, pipe=part.pipe
    )
    board = Board(member.memory, part.limits, runner.largest_step)
    member.connection.send("opened")
    gc.collect()
    gc.freeze()
    while (message := member.connection.recv_bytes())[0] != CLOSE:
        if message[0] == STEP:
            step = board.read(message[1])
            runner.follow(step.integers, step.floats, step.inputs, step.captured)
        elif message[0] == CAPTURE:
            sampled, filtered, logprobs = map(bool, message[1:4])
            candidates = int.from_bytes(message[4:])
            runner.capture(sampled=sampled, filtered=filtered, logprobs=logprobs, candidates=candidates)
        elif message[0] == RESET:
            reset_peaks(member.peers.torch_device)
        else:
            member.connection.send(memory_of(part, runner))
    gc.unfreeze()
    runner.release()
    part.communicator.close()


def memory_of(part: Part, runner: Runner) -> dict[str, Any]:
    """Bytes on one rank's device."""
    at, layers = part.decoder.device.torch_device, part.decoder.own_layers
    found = {
        "device": str(at),
        "layers": f"{layers[0]}-{layers[-1]}",
        "weights_bytes": part.weights.num_bytes,
        "kv_pool_bytes": part.decoder.cache_bytes_per_block() * part.limits.num_blocks,
        "graphs": runner.num_graphs,
    }
    if at.type == "cuda":
        found["torch_allocated_peak_bytes"] = torch.cuda.max_memory_allocated(at)
        found["torch_reserved_peak_bytes"] = torch.cuda.max_memory_reserved(at)
    return found


def reset_peaks(at: torch.device) -> None:
    """Forget torch's peaks of memory on a GPU."""
    if at.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(at)


class Ranks:
    """The first rank's hold on the others, and its own part."""

    def __init__(
        self,
        job: Job,
        world: int,
        device: Device,
        team: Team | None = None,
        *,
        drafting_bytes_per_block: int = 0,
    ) -> None:
        """Starts the other ranks, unless there is a team, and opens every part.

        drafting_bytes_per_block: of a model that drafts, which the first rank alone has; see `open_part`.
        Raises EngineError or BackendError where a device is missing or a part cannot be opened.
        """
        require_devices(world, device, "--tp" if job.config.pp == 1 else "--pp")
        job.selection(device)  # what cannot be served is refused before a process starts
        self._own_team = team is None
        self._closed = False
        self.team = team or Team(world, device)
        self._slot = 0
        try:
            self.team.begin(serve, job)
            try:
                self.part = open_part(
                    job, self.team.member.peers, drafting_bytes_per_block=drafting_bytes_per_block
                )
            except RuntimeError:
                self.team.require_still()
                raise
            self.team.results()
        except BaseException:
            self.team.close()
            raise
        self.team.when_lost.append(self.part.communicator.abort)
        deferred = job.config.pp > 1 and device.torch_device.type == "cpu"
        self.queue = (DeferredQueue if deferred else WatchedQueue)(device.torch_device, self.team)

    def lead(self, runner: Runner) -> None:
        """Have the others follow this runner."""
        self._board = Board(self.team.member.memory, self.part.limits, runner.largest_step)

    def step(self, filled: Staging, inputs: StepInputs, captured: bool) -> None:
        """See `Followers`."""
        self.team.require()
        self._slot = (self._slot + 1) % SLOTS
        self._board.write(self._slot, inputs, captured, filled.integers.numpy(), filled.floats.numpy())
        self.team.tell(bytes((STEP, self._slot)))

    def capture(self, sampled: bool, filtered: bool, logprobs: bool, candidates: int) -> None:
        """See `Followers`."""
        self.team.tell(bytes((CAPTURE, sampled, filtered, logprobs)) + candidates.to_bytes(4))

    def reset_peaks(self) -> None:
        """Have every other rank forget its peaks of memory."""
        self.team.tell(bytes((RESET,)))

    def memory(self, runner: Runner) -> list[dict[str, Any]]:
        """Bytes on each device, by rank; after the steps launched so far."""
        self.queue.mark().synchronize()
        self.team.tell(bytes((MEMORY,)))
        return [memory_of(self.part, runner), *self.team.results()]

    def close(self, runner: Runner) -> None:
        """Give back this rank's graphs and caches, and end the others; harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        try:
            if self.team.fault is None:
                self.queue.mark().synchronize()
                self.team.tell(bytes((CLOSE,)))
                runner.release()
                self.part.communicator.close()
                self.team.results(CLOSING_S)
        finally:
            self.team.when_lost.clear()
            if self._own_team or self.team.fault is not None:
                self.team.close()


def require_devices(world: int, device: Device, flag: str = "--tp") -> None:
    """EngineError where there are not as many devices; `flag` asked for them."""
    if device.torch_device.type == "cpu":
        return
    there = torch.cuda.device_count() - (device.torch_device.index or 0)
    if there < world:
        raise EngineError(
            f"{flag} {world} needs {world} GPUs from {device.torch_device} on, and torch sees {there}; use a "
            f"lower {flag}."
        )


class WatchedQueue(DeviceQueue):
    """A device's queue in which work may wait for other ranks: a lost one ends the wait with its name."""

    def __init__(self, device: torch.device, team: Team) -> None:
        super().__init__(device)
        self._team = team

    def submit(self, work: Callable[[], None]) -> None:
        self._team.require()
        self._team.waiting(not self._asynchronous)
        try:
            work()
        except RuntimeError:
            self._team.require_still()
            raise
        finally:
            self._team.waiting(False)

    def mark(self) -> Mark:
        found = super().mark()
        return WatchedMark(found, self._team) if self._asynchronous else found

    def stretch(self) -> Stretch:
        return WatchedStretch(self._events, self._team) if self._asynchronous else super().stretch()


class DeferredQueue(WatchedQueue):
    """The last stage's queue on a CPU, which works when it is waited for: until then it has only been given
    steps, and the stages before it are at work on those that come next."""

    def __init__(self, device: torch.device, team: Team) -> None:
        super().__init__(device, team)
        self._pending: deque[Callable[[], None]] = deque()
        self._submitted = 0

    def submit(self, work: Callable[[], None]) -> None:
        self._pending.append(work)
        self._submitted += 1

    def mark(self) -> Mark:
        return Place(self, self._submitted)

    @torch.inference_mode()
    def run_until(self, place: int) -> None:
        """Do what was submitted up to that many works, in order."""
        while self._submitted - len(self._pending) < place:
            super().submit(self._pending.popleft())


@dataclass(frozen=True)
class Place:
    """A mark in a `DeferredQueue`."""

    queue: DeferredQueue
    submitted: int
    """Works up to here."""

    def synchronize(self) -> None:
        """As `Mark`; raises EngineError where a rank is lost."""
        self.queue.run_until(self.submitted)


class WatchedStretch(Timed):
    """A timed stretch whose end is waited for as long as no rank is lost."""

    def __init__(self, pool: list[torch.cuda.Event], team: Team) -> None:
        super().__init__(pool)
        self._team = team

    def synchronize(self) -> None:
        """As `Stretch`; raises EngineError where a rank is lost."""
        WatchedMark(self._end, self._team).synchronize()


class WatchedMark:
    """A mark that does not wait for ranks that are lost."""

    def __init__(self, event: Any, team: Team) -> None:
        self._event = event
        self._team = team

    def synchronize(self) -> None:
        """As `Mark`; raises EngineError where a rank is lost."""
        if self._event.query():
            return
        self._team.waiting(True)
        try:
            while not self._event.query():
                self._team.require()
                time.sleep(0)
        finally:
            self._team.waiting(False)
