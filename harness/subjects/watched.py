"""A target that fails rather than stay silent for ever."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from backbench.errors import HarnessError
from backbench.harness.subjects.subject import ObservedTarget
from backbench.harness.subjects.target import TokenEvent
from backbench.workloads.request import Request

SOON_S = 1e-3
"""An alarm that was due meanwhile rings then: 0 would be none."""


class Watched:
    """`target`, which has `limit_s` to give a token or finish a step while it has requests.

    Raises HarnessError after that: from a poll that finds nothing; and between `with` and its end, in the
    main thread of a system with alarms, out of a call that does not return, where Python can interrupt it.
    """

    def __init__(self, target: ObservedTarget, limit_s: float, clock: Callable[[], int]) -> None:
        """clock: the target's own (ns)."""
        self._target = target
        self._limit_s = limit_s
        self._clock = clock
        self._flying = 0
        self._heard_ns = clock()
        self._steps = len(target.steps)
        self._before: Any = None
        self._due_s: float | None = None
        self._alarms = False

    def __enter__(self) -> Watched:
        self._alarms = hasattr(signal, "setitimer") and (
            threading.current_thread() is threading.main_thread()
        )
        if self._alarms:
            left_s = signal.setitimer(signal.ITIMER_REAL, 0)[0]
            self._due_s = time.monotonic() + left_s if left_s else None
            self._before = signal.signal(signal.SIGALRM, self._ring)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._alarms:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)
            if self._due_s is not None:  # somebody else's alarm goes on
                signal.setitimer(signal.ITIMER_REAL, max(self._due_s - time.monotonic(), SOON_S))

    def submit(self, request: Request) -> int:
        if not self._flying:
            self._heard_ns = self._clock()
        self._flying += 1
        self._set_alarm()
        return self._target.submit(request)

    def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
        self._set_alarm()
        events = self._target.poll(deadline_ns)
        now_ns, steps = self._clock(), len(self._target.steps)
        if events or steps > self._steps or not self._flying:
            self._heard_ns, self._steps = now_ns, steps
        elif now_ns - self._heard_ns > self._limit_s * 1e9:
            raise self._stalled()
        self._flying -= sum(event.finished or event.error is not None for event in events)
        return events

    def abort(self) -> None:
        self._target.abort()

    def _set_alarm(self) -> None:
        """By the system's clock, whatever the target's is; none where it has nothing to answer."""
        if self._alarms:
            signal.setitimer(signal.ITIMER_REAL, self._limit_s if self._flying else 0)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        raise self._stalled()

    def _stalled(self) -> HarnessError:
        return HarnessError(
            f"The target stalled: {self._flying} requests in flight and no token for {self._limit_s:g} s; "
            "raise --stall-timeout where it is only slow."
        )
