"""How a workload's requests are offered: the one mode that the options name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backbench.errors import WorkloadError
from backbench.workloads.arrivals import Arrivals
from backbench.workloads.options import DEFAULT_CONCURRENCY, WorkloadOptions


@dataclass(frozen=True)
class Offer:
    """How requests are offered; exactly one of four modes."""

    mode: str
    """closed_loop, open_loop (an arrival process), trace (recorded times) or all_at_once."""
    concurrency: int | None = None
    arrivals: Arrivals | None = None
    time_scale: float | None = None

    def parameters(self) -> dict[str, Any]:
        """For Workload.parameters."""
        found: dict[str, Any] = {"mode": self.mode}
        if self.concurrency is not None:
            found["concurrency"] = self.concurrency
        if self.arrivals is not None:
            found |= {"arrival": self.arrivals.spec, "rate": self.arrivals.rate, "cv": self.arrivals.cv}
        if self.time_scale is not None:
            found["time_scale"] = self.time_scale
        return found


def choose_offer(options: WorkloadOptions, *, has_times: bool, all_at_once: bool = False) -> Offer:
    """The one mode the options name, or the default.

    The default is all at once if `all_at_once`, recorded times if the workload has them (`has_times`), and
    otherwise a closed loop of DEFAULT_CONCURRENCY, which suits a machine of any speed.
    """
    given = {
        "--arrival" if options.rate is None else "--rate": options.rate is not None or options.arrival,
        "--concurrency": options.concurrency is not None,
        "--time-scale": options.time_scale is not None,
        "--all-at-once": options.all_at_once,
    }
    named = [name for name, present in given.items() if present]
    if len(named) > 1:
        raise WorkloadError(f"{' and '.join(named)} exclude each other; give one of them.")
    if options.rate is not None or options.arrival is not None:
        return Offer("open_loop", arrivals=Arrivals(options.arrival or "poisson", options.rate, options.cv))
    if options.cv is not None:
        raise WorkloadError("--cv needs --arrival gamma or weibull and a --rate.")
    if options.concurrency is not None:
        return Offer("closed_loop", concurrency=options.concurrency)
    if options.time_scale is not None:
        if not has_times:
            raise WorkloadError("--time-scale needs recorded times, and this workload has none; give --rate.")
        return Offer("trace", time_scale=options.time_scale)
    if options.all_at_once or all_at_once:
        return Offer("all_at_once")
    if has_times:
        return Offer("trace", time_scale=1.0)
    return Offer("closed_loop", concurrency=DEFAULT_CONCURRENCY)
