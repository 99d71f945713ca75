"""The progress display of a run, on stderr and only where that is a terminal."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from backbench.harness.experiment import Observer
from backbench.harness.replay import Progress

if TYPE_CHECKING:
    from backbench.harness.subjects.subject import ObservedTarget

REFRESH_S = 0.2
RATE_SPAN_S = 5.0
"""Output tokens/s are shown over the last few seconds."""


class Display(Observer):
    """One line: requests done, output tokens/s, running and waiting, time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._next = 0.0
        self._recent: deque[tuple[float, int]] = deque()

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.idle()

    def stage(self, text: str) -> None:
        if self._console.is_terminal:
            self._console.print(f"[dim]{text} ...[/dim]")

    def progress(self, progress: Progress, target: ObservedTarget) -> None:
        now = time.monotonic()
        if not self._console.is_terminal or now < self._next:
            return
        self._next = now + REFRESH_S
        self._recent.append((now, progress.output_tokens))
        while self._recent[0][0] < now - RATE_SPAN_S and len(self._recent) > 2:
            self._recent.popleft()
        if self._live is None:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        self._live.update(self._line(progress, target), refresh=True)

    def idle(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._recent.clear()

    def _line(self, progress: Progress, target: ObservedTarget) -> Any:
        (first_s, first_tokens), (last_s, last_tokens) = self._recent[0], self._recent[-1]
        rate = (last_tokens - first_tokens) / (last_s - first_s) if last_s > first_s else 0.0
        line = Table.grid(padding=(0, 1))
        for _ in range(5):
            line.add_column(no_wrap=True)
        line.add_row(
            ProgressBar(total=progress.total, completed=progress.done, width=10),
            f"{progress.done}/{progress.total} requests,",
            f"{rate:,.0f} output tok/s,",
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


def open_observer() -> Display:
    """A display on stderr; it stays silent where stderr is no terminal."""
    return Display(Console(stderr=True))
