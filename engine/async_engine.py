"""An asyncio front of the engine: requests join a running batch, tokens arrive as they are made."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from backbench.engine.engine import Engine
from backbench.engine.request import SamplingParams, StepStats, Token, TokenIds
from backbench.errors import EngineError


@dataclass(frozen=True)
class StepReport:
    """What one call of `Engine.step` brought, for an observer."""

    seen_ns: int
    """When its tokens were visible to the host, by `time.perf_counter_ns`."""
    tokens: list[Token]
    stats: list[StepStats]
    """Of the steps that landed."""
    started: list[str]
    """Requests that had been waiting, and of which something is computed for the first time."""


def _unobserved(report: StepReport) -> None:
    pass


class Tokens:
    """The tokens of requests that are being served, as they come, until all have finished."""

    def __init__(self, queue: asyncio.Queue[Token | Exception], unfinished: dict[str, int]) -> None:
        """unfinished: sequences by request; those that finish are taken out."""
        self._queue = queue
        self._unfinished = unfinished

    def __aiter__(self) -> Tokens:
        return self

    async def __anext__(self) -> Token:
        if not self._unfinished:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        if item.finish_reason is not None:
            self._unfinished[item.request_id] -= 1
            if not self._unfinished[item.request_id]:
                del self._unfinished[item.request_id]
        return item


class AsyncEngine:
    """Drives an `Engine` from one thread; all engine calls happen there, between steps.

    async with AsyncEngine(engine) as front:
        async for token in front.stream(prompt, SamplingParams(max_tokens=32)):
            ...

    One step follows another without waiting for the event loop: however busy that is, no step is held.
    """

    def __init__(self, engine: Engine, observe: Callable[[StepReport], None] = _unobserved) -> None:
        """`observe` is called in the event loop after each step."""
        self.engine = engine
        self.failure: Exception | None = None
        """What ended the engine's thread before its time; nothing is served any more."""
        self._observe = observe
        self._commands: deque[Callable[[], None]] = deque()
        self._queues: dict[str, asyncio.Queue[Token | Exception]] = {}
        self._unstarted: dict[str, None] = {}
        """Requests of which nothing was computed yet, in order. Only the engine's thread touches it."""
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._ids = itertools.count()
        self._closed = False
        """No stream begins any more."""
        self._aborting = False
        """No step begins any more."""

    async def __aenter__(self) -> AsyncEngine:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._drive, name="engine", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, failure: type[BaseException] | None, *rest: object) -> None:
        """Serve what was asked for to its end; where an exception leaves the context, abort it instead.

        Streams without their last token then raise EngineError.
        """
        self._closed = True
        self._aborting = failure is not None
        self._wake.set()
        assert self._thread is not None
        await asyncio.to_thread(self._thread.join)
        self._deliver_to_all(EngineError("AsyncEngine was left before this stream had all its tokens."))

    async def stream(self, prompt: TokenIds, params: SamplingParams) -> AsyncGenerator[Token, None]:
        """Yield the request's tokens, those of its n sequences interleaved, until all have finished.

        Leaving the loop early aborts the request. Raises EngineError where it cannot be served.
        """
        with self.serve({f"stream-{next(self._ids)}": prompt}, params) as tokens:
            async for token in tokens:
                yield token

    @contextmanager
    def serve(self, prompts: Mapping[str, TokenIds], params: SamplingParams) -> Iterator[Tokens]:
        """The tokens of several requests, by request id, which join the batch together as it is entered.

        Leaving it early aborts all of them, as does one that cannot be served: the tokens raise EngineError.
        """
        if self._thread is None or self._closed:
            raise EngineError("AsyncEngine is not running; use it as `async with AsyncEngine(engine)`.")
        if taken := self._queues.keys() & prompts.keys():
            raise EngineError(f"Request {min(taken)} is already being served; give each request its own id.")
        queue: asyncio.Queue[Token | Exception] = asyncio.Queue()
        self._queues |= dict.fromkeys(prompts, queue)
        self._command(lambda: self._add(prompts, params))
        unfinished = dict.fromkeys(prompts, params.n)
        try:
            yield Tokens(queue, unfinished)
        finally:
            for request_id in prompts:
                self._queues.pop(request_id, None)
            if unfinished:
                self._command(lambda: self._abort(unfinished))

    def _command(self, command: Callable[[], None]) -> None:
        """Have the engine's thread call this between two steps."""
        self._commands.append(command)
        self._wake.set()

    # What runs in the engine's thread:

    def _drive(self) -> None:
        try:
            while not self._aborting:
                self._wake.clear()
                self._run_commands()
                if self.engine.has_work:
                    self._step()
                elif self._closed:
                    break
                else:
                    self._wake.wait()
            self._run_commands()
            self._abort(list(self._queues))
        except Exception as error:  # nothing can go on after a failed step
            self._tell(self._fail, error)

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _add(self, prompts: Mapping[str, TokenIds], params: SamplingParams) -> None:
        """Whatever is wrong with a request, only its own stream hears of it."""
        for request_id, prompt in prompts.items():
            try:
                self.engine.add_request(request_id, prompt, params)
            except Exception as error:
                self._tell(self._deliver, request_id, error)
                return
            self._unstarted[request_id] = None

    def _abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._unstarted.pop(request_id, None)
            self.engine.abort(request_id)

    def _step(self) -> None:
        tokens = self.engine.step()
        seen_ns = time.perf_counter_ns()
        started = []
        if self._unstarted:
            waiting = {each.request_id for each in self.engine.scheduler.waiting if each.index == 0}
            started = [each for each in self._unstarted if each not in waiting]
            for request_id in started:
                del self._unstarted[request_id]
        stats = self.engine.take_step_stats()
        self._tell(self._landed, StepReport(seen_ns, tokens, stats, started))

    def _tell(self, hear: Callable[..., None], *heard: Any) -> None:
        """Have the event loop call `hear`."""
        self._loop.call_soon_threadsafe(hear, *heard)

    # What runs in the event loop:

    def _landed(self, report: StepReport) -> None:
        for token in report.tokens:
            self._deliver(token.request_id, token)
        self._observe(report)

    def _fail(self, error: Exception) -> None:
        """Every stream raises it."""
        self._closed = True
        self.failure = error
        self._deliver_to_all(error)

    def _deliver(self, request_id: str, item: Token | Exception) -> None:
        queue = self._queues.get(request_id)
        if queue is not None:
            queue.put_nowait(item)

    def _deliver_to_all(self, error: Exception) -> None:
        for request_id in list(self._queues):
            self._deliver(request_id, error)
