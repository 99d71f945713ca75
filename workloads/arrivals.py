"""Arrival processes: when an open loop sends its requests. The first is sent at 0.

    constant, poisson            at --rate
    gamma, weibull               at --rate, gaps with coefficient of variation --cv
    ramp:FROM:TO:SECONDS         Poisson, the rate rising (or falling) linearly, then staying at TO
    steps:RATE@SECONDS,...       Poisson, one rate after the other; the last one stays
    bursts:RATE:ON_S:OFF_S       Poisson at RATE for ON_S seconds, silence for OFF_S, and again
    sine:MEAN:AMPLITUDE:PERIOD_S Poisson at MEAN * (1 + AMPLITUDE * sin(2 pi t / PERIOD_S)), AMPLITUDE 0..1

Changing rates are Poisson processes by time rescaling (unit-rate arrivals mapped through the inverse of the
integrated rate; Cinlar 1975), so the count in a window is random as it should be, never rescaled to fit.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backbench.errors import WorkloadError, shown
from backbench.workloads.trace import LATEST_NS

RATE_KINDS = ("constant", "poisson", "gamma", "weibull")
"""Processes that take `rate`; the others carry their rates in their spec."""
PROFILE_FORMS = {
    "ramp": "ramp:FROM:TO:SECONDS",
    "steps": "steps:RATE@SECONDS,RATE@SECONDS,...",
    "bursts": "bursts:RATE:ON_S:OFF_S",
    "sine": "sine:MEAN:AMPLITUDE:PERIOD_S",
}
Integral = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Expected arrivals in [0, t], t in seconds."""


@dataclass(frozen=True)
class Arrivals:
    """A validated process: `kind` one of RATE_KINDS with a rate, or a profile spec without."""

    spec: str
    rate: float | None = None
    """Requests per second."""
    cv: float | None = None
    """Coefficient of variation of the gaps, for gamma and weibull."""

    def __post_init__(self) -> None:
        kind = self.spec.partition(":")[0]
        if self.spec in RATE_KINDS:
            if self.rate is None:
                raise WorkloadError(
                    f"arrival {shown(self.spec)} needs a rate; give --rate REQUESTS_PER_SECOND."
                )
            check_rate(self.rate)
            self._check_cv()
        elif kind in PROFILE_FORMS:
            if self.rate is not None or self.cv is not None:
                raise WorkloadError(
                    f"arrival {shown(self.spec)} has its own rates; leave out --rate and --cv."
                )
            _profile(self.spec)
        else:
            valid = [*RATE_KINDS, *PROFILE_FORMS]
            near = difflib.get_close_matches(kind, valid, n=2) or valid
            raise WorkloadError(
                f"unknown arrival process {shown(self.spec)}; did you mean {' or '.join(near)}?"
            )

    def _check_cv(self) -> None:
        needed = self.spec in ("gamma", "weibull")
        if needed and (self.cv is None or not 0.05 <= self.cv <= 20):
            raise WorkloadError(f"arrival '{self.spec}' needs --cv between 0.05 and 20, not {self.cv}.")
        if not needed and self.cv is not None:
            raise WorkloadError(f"arrival '{self.spec}' takes no --cv; use gamma or weibull.")

    def times_ns(self, generator: np.random.Generator, count: int) -> list[int]:
        """`count` arrival times in ns, from 0, in order. Prefix-stable in `count`.

        WorkloadError where the last one would lie beyond LATEST_NS.
        """
        if self.spec in RATE_KINDS:
            assert self.rate is not None
            with np.errstate(over="ignore", invalid="ignore"):
                gaps = np.rint(self.gaps(generator, max(count - 1, 0)) * (1e9 / self.rate))
            self._require_in_time(bool(gaps.sum() < LATEST_NS), count)
            # Whole ns are summed, so a last-bit difference between two machines' log() stays in one gap.
            return [0, *np.cumsum(gaps.astype(np.int64)).tolist()][:count]
        unit = np.concatenate([[0.0], np.cumsum(generator.standard_exponential(max(count - 1, 0)))])[:count]
        integral = _profile(self.spec)
        with np.errstate(all="ignore"):
            expected = integral(np.array([LATEST_NS / 1e9]))[0]
        self._require_in_time(count == 0 or bool(expected >= unit[-1]), count)
        seconds = _invert(integral, unit)
        return (np.rint(seconds * 1e6).astype(np.int64) * 1000).tolist()

    def _require_in_time(self, in_time: bool, count: int) -> None:
        # NaN compares as False: numbers too small or too large to compute with are refused, too.
        if not in_time:
            raise WorkloadError(
                f"arrival {shown(self.spec)} would take more than 146 years to send {count} requests, or has "
                "numbers too extreme to compute with; raise its rate."
            )

    def gaps(self, generator: np.random.Generator, count: int) -> NDArray[np.float64]:
        """`count` gaps between arrivals of a process with a rate, in units of their mean."""
        if self.spec == "constant":
            return np.ones(count)
        if self.spec == "poisson":
            return generator.standard_exponential(count)
        assert self.cv is not None
        if self.spec == "gamma":
            shape = self.cv**-2
            return generator.standard_gamma(shape, count) / shape
        shape = _weibull_shape(self.cv)
        return generator.standard_exponential(count) ** (1 / shape) / math.gamma(1 + 1 / shape)


def check_rate(rate: float) -> None:
    """WorkloadError unless the rate is a positive, finite number of requests per second."""
    if not (math.isfinite(rate) and 0 < rate <= 1e6):
        raise WorkloadError(f"--rate must be above 0 and at most 1e6 requests/s, not {rate:g}.")


def _weibull_shape(cv: float) -> float:
    """The shape k whose CV is `cv`: CV^2 = Gamma(1 + 2/k) / Gamma(1 + 1/k)^2 - 1, by bisection."""
    low, high = 0.1, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        squared = math.exp(math.lgamma(1 + 2 / middle) - 2 * math.lgamma(1 + 1 / middle)) - 1
        low, high = (middle, high) if squared > cv * cv else (low, middle)
    return (low + high) / 2


def _profile(spec: str) -> Integral:
    kind, _, rest = spec.partition(":")
    separators = {"steps": ",@"}.get(kind, ":")
    text = rest
    for separator in separators:
        text = text.replace(separator, ":")
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if not numbers or not all(math.isfinite(number) and 0 <= number <= 1e9 for number in numbers):
        raise WorkloadError(f"arrival {shown(spec)} is malformed; write it as {PROFILE_FORMS[kind]}.")
    built = {"ramp": _ramp, "steps": _steps, "bursts": _bursts, "sine": _sine}[kind](numbers)
    if built is None:
        raise WorkloadError(
            f"arrival {shown(spec)} has the wrong numbers or never sends; write it as {PROFILE_FORMS[kind]}."
        )
    return built


def _ramp(numbers: list[float]) -> Integral | None:
    if len(numbers) != 3 or numbers[1] <= 0 or numbers[2] <= 0:
        return None
    start, end, seconds = numbers

    def integral(t: NDArray[np.float64]) -> NDArray[np.float64]:
        inside = np.minimum(t, seconds)
        return start * inside + (end - start) * inside**2 / (2 * seconds) + end * np.maximum(t - seconds, 0)

    return integral


def _steps(numbers: list[float]) -> Integral | None:
    rates, durations = numbers[::2], numbers[1::2]
    if len(rates) != len(durations) or rates[-1] <= 0 or min(durations) <= 0:
        return None
    edges = np.concatenate([[0.0], np.cumsum(durations[:-1])])

    def integral(t: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.zeros_like(t)
        for rate, start, end in zip(rates, edges, [*edges[1:], np.inf], strict=True):
            total += rate * np.clip(t - start, 0, end - start)
        return total

    return integral


def _bursts(numbers: list[float]) -> Integral | None:
    if len(numbers) != 3 or numbers[0] <= 0 or numbers[1] <= 0:
        return None
    rate, on_s, off_s = numbers

    def integral(t: NDArray[np.float64]) -> NDArray[np.float64]:
        cycles, inside = np.divmod(t, on_s + off_s)
        return rate * (cycles * on_s + np.minimum(inside, on_s))

    return integral


def _sine(numbers: list[float]) -> Integral | None:
    if len(numbers) != 3 or numbers[0] <= 0 or numbers[1] > 1 or numbers[2] <= 0:
        return None
    mean, amplitude, period_s = numbers
    angular = 2 * math.pi / period_s
    return lambda t: mean * (t + amplitude / angular * (1 - np.cos(angular * t)))


def _invert(integral: Integral, expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """The times at which the (non-decreasing) integral first reaches `expected`, by bisection."""
    low = np.zeros_like(expected)
    high = np.ones_like(expected)
    while (short := integral(high) < expected).any():
        high[short] *= 2
    for _ in range(80):
        middle = (low + high) / 2
        reached = integral(middle) >= expected
        high = np.where(reached, middle, high)
        low = np.where(reached, low, middle)
    return high
