"""An asyncio front of the engine: requests join a running batch, tokens arrive as they are made."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from backbench.engine.engine import Engine
from backbench.engine.request import SamplingParams, Token, TokenIds
from backbench.errors import EngineError


class AsyncEngine:
    """Drives an `Engine` from one worker thread; all engine calls happen there, between steps.

    async with AsyncEngine(engine) as front:
        async for token in front.stream(prompt, SamplingParams(max_tokens=32)):
            ...
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._commands: deque[Callable[[], None]] = deque()
        self._queues: dict[str, asyncio.Queue[Token | Exception]] = {}
        self._wake = asyncio.Event()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._loop_task: asyncio.Task[None] | None = None
        self._ids = itertools.count()
        self._closed = False
        """No stream begins any more."""
        self._aborting = False
        """No step begins any more."""

    async def __aenter__(self) -> AsyncEngine:
        self._loop_task = asyncio.create_task(self._drive())
        return self

    async def __aexit__(self, failure: type[BaseException] | None, *rest: object) -> None:
        """Serve what was asked for to its end; where an exception leaves the context, abort it instead.

        Streams without their last token then raise EngineError.
        """
        self._closed = True
        self._aborting = failure is not None
        self._wake.set()
        if self._loop_task is not None:
            await self._loop_task
            await self._loop.run_in_executor(self._worker, self._abort_all)
        self._worker.shutdown()
        self._deliver_to_all(EngineError("AsyncEngine was left before this stream had all its tokens."))

    async def stream(self, prompt: TokenIds, params: SamplingParams) -> AsyncIterator[Token]:
        """Yield the request's tokens, those of its n sequences interleaved, until all have finished.

        Leaving the loop early aborts the request. Raises EngineError where it cannot be served.
        """
        if self._loop_task is None or self._closed:
            raise EngineError("AsyncEngine is not running; use it as `async with AsyncEngine(engine)`.")
        request_id = f"stream-{next(self._ids)}"
        queue: asyncio.Queue[Token | Exception] = asyncio.Queue()
        self._queues[request_id] = queue
        self._command(lambda: self._add(request_id, prompt, params))
        unfinished = params.n
        try:
            while unfinished:
                item = await queue.get()
                if isinstance(item, Exception):
                    unfinished = 0
                    raise item
                unfinished -= item.finish_reason is not None
                yield item
        finally:
            self._queues.pop(request_id, None)
            if unfinished:
                self._command(lambda: self.engine.abort(request_id))

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake.set()

    def _add(self, request_id: str, prompt: TokenIds, params: SamplingParams) -> None:
        """Runs in the worker. Whatever is wrong with a request, only its own stream hears of it."""
        try:
            self.engine.add_request(request_id, prompt, params)
        except Exception as error:
            self._loop.call_soon_threadsafe(self._deliver, request_id, error)

    def _abort_all(self) -> None:
        """Runs in the worker, once no step is under way."""
        self._run_commands()
        for request_id in list(self._queues):
            self.engine.abort(request_id)

    async def _drive(self) -> None:
        self._loop = asyncio.get_running_loop()
        while not self._aborting:
            if not self._commands and not self.engine.has_work:
                if self._closed:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                tokens = await self._loop.run_in_executor(self._worker, self._advance)
            except Exception as error:
                # Nothing can go on after a failed step: every stream raises it.
                self._closed = True
                self._deliver_to_all(error)
                return
            for token in tokens:
                self._deliver(token.request_id, token)

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _advance(self) -> list[Token]:
        self._run_commands()
        return self.engine.step() if self.engine.has_work else []

    def _deliver(self, request_id: str, item: Token | Exception) -> None:
        queue = self._queues.get(request_id)
        if queue is not None:
            queue.put_nowait(item)

    def _deliver_to_all(self, error: Exception) -> None:
        for request_id in list(self._queues):
            self._deliver(request_id, error)
