"""How far a run is, on stderr: a moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from backbench.harness.commands.output import echo, silence
from backbench.harness.experiment import Observer
from backbench.harness.options import Talk
from backbench.harness.replay import Progress

if TYPE_CHECKING:
    from backbench.harness.subjects.subject import ObservedTarget

REFRESH_S = 0.2
RATE_SPAN_S = 5.0
"""Output tokens/s are shown over the last few seconds."""
LINE_EVERY_S = 10.0
VERBOSE_LINE_EVERY_S = 1.0


class Pace:
    """Output tokens a second over the last few seconds."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque()

    def note(self, now_s: float, tokens: int) -> None:
        self._recent.append((now_s, tokens))
        while self._recent[0][0] < now_s - RATE_SPAN_S and len(self._recent) > 2:
            self._recent.popleft()

    def clear(self) -> None:
        self._recent.clear()

    @property
    def empty(self) -> bool:
        return not self._recent

    @property
    def tokens_per_s(self) -> float:
        (first_s, first), (last_s, last) = self._recent[0], self._recent[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0


class Watcher(Observer):
    """An observer that a run is told to from its start to its end; this one says nothing."""

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.idle()


class Lines(Watcher):
    """Plain lines: each stage, and in the replay at most every `every_s` how far it is.

    Lines wait until the replay begins or as long as between two of them: what is wrong with what was asked
    mostly shows before, and is told in one line then. A series has its replays elsewhere, and none waits.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
        wait: bool = True,
    ) -> None:
        self._write = write
        self.every_s = every_s
        self._clock = clock
        self._start_s = self._last_s = clock()
        self._pace = Pace()
        self._held: list[str] | None = [] if wait else None
        """Lines that wait; None = none does any more."""

    def stage(self, text: str) -> None:
        self._last_s = self._clock()
        if self._last_s >= self._start_s + self.every_s:
            self._release()
        self._say(text)

    def progress(self, progress: Progress, target: ObservedTarget) -> None:
        now_s = self._clock()
        if self._pace.empty:
            self._release()
            self._pace.note(now_s, progress.output_tokens)
        if now_s < self._last_s + self.every_s:
            return
        self._last_s = now_s
        self._pace.note(now_s, progress.output_tokens)
        self._say(
            f"{progress.done} of {progress.total} requests, {self._pace.tokens_per_s:,.0f} output tok/s, "
            f"{target.running} running, {target.waiting} waiting, {eta(progress)} left"
        )

    def idle(self) -> None:
        self._pace.clear()

    def _say(self, text: str) -> None:
        line = f"[{self._clock() - self._start_s:6.1f} s] {text}"
        if self._held is None:
            self._write(line)
        else:
            self._held.append(line)

    def _release(self) -> None:
        for line in self._held or ():
            self._write(line)
        self._held = None


class Display(Watcher):
    """One line: requests done, output tokens/s, running and waiting, time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._next = 0.0
        self._pace = Pace()

    def stage(self, text: str) -> None:
        self._console.print(f"[dim]{text} ...[/dim]")

    def progress(self, progress: Progress, target: ObservedTarget) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REFRESH_S
        self._pace.note(now, progress.output_tokens)
        if self._live is None:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        self._live.update(self._line(progress, target), refresh=True)

    def idle(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._pace.clear()

    def _line(self, progress: Progress, target: ObservedTarget) -> Any:
        line = Table.grid(padding=(0, 1))
        for _ in range(5):
            line.add_column(no_wrap=True)
        line.add_row(
            ProgressBar(total=progress.total, completed=progress.done, width=10),
            f"{progress.done}/{progress.total} requests,",
            f"{self._pace.tokens_per_s:,.0f} output tok/s,",
            f"{target.running} running, {target.waiting} waiting,",
            f"ETA {eta(progress)}",
        )
        return line


def eta(progress: Progress) -> str:
    """Time left at the pace so far, "m:ss"; dashes before the first request is done."""
    if not progress.done or progress.elapsed_s <= 0:
        return "-:--"
    left_s = progress.elapsed_s / progress.done * (progress.total - progress.done)
    return f"{int(left_s) // 60}:{int(left_s) % 60:02d}"


def open_observer(talk: Talk, series: bool = False) -> Watcher:
    """What watches a run, or a series of them, and says on stderr how far it is, as `talk` asks."""
    if talk.quiet:
        return Watcher()
    console = Console(stderr=True)
    if console.is_terminal and not talk.verbose:
        return Display(console)
    return Lines(_to_stderr, line_every_s(talk), wait=not series)


def line_every_s(talk: Talk) -> float:
    """How often a line says how far it is."""
    return VERBOSE_LINE_EVERY_S if talk.verbose else LINE_EVERY_S


def _to_stderr(line: str) -> None:
    try:
        echo(line, err=True)
    except OSError:
        silence(2)  # nobody takes the lines; that must not end the run
