"""Energy of a stretch of a run, from telemetry: the counter where it can be trusted, else sampled power.

A counter that no power reading can be held against (a CPU's packages) is used, and the record says that too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from backbench.reports.metrics.metric import Metric, Missing, Part, resolved
from backbench.reports.metrics.run import RunTables
from backbench.reports.metrics.throughput import tokens_inside
from backbench.reports.metrics.window import Window

if TYPE_CHECKING:
    import pandas as pd

    from backbench.reports.metrics.statistics import Floats

BOARD = "board"
SCOPES = {"nvidia": BOARD, "amd": "socket", "cpu": "CPU packages"}
"""Vendor -> what its readings of power and energy are of."""
AGREEMENT = 0.05
"""Counter and integrated power must agree this well ..."""
MIN_COUNTER_S = 10.0
"""... over at least this long, or the counter (which steps about every 100 ms) is not used."""


def section(
    telemetry: pd.DataFrame,
    steady: Window | None,
    whole: Window,
    tokens: dict[str, float | None],
    sensor_reasons: list[str],
    idle_power_w: float | None = None,
    scope: str = BOARD,
) -> dict[str, Any]:
    """The record's `energy` section. Idle power is reported, never subtracted; absent is null, never 0.

    `tokens` are the output tokens seen inside each stretch, None where a chunk's count is unknown;
    `sensor_reasons` say why a sensor is missing; `idle_power_w` was read before the engine took the device;
    `scope` is what the readings are of.
    """
    gpu = telemetry[telemetry["device"] >= 0]
    if gpu.empty:  # the host's own energy, where no card was sampled
        gpu = telemetry[telemetry["energy_j"].notna()]
    stretches = {"whole_run": whole} | ({"steady_state": steady} if steady is not None else {})
    measured = {name: _stretch(gpu, window) for name, window in stretches.items()}
    best = measured.get("steady_state") or measured["whole_run"]
    label = "steady_state" if measured.get("steady_state") else "whole_run"
    count = tokens.get(label)
    unsampled = Missing("no power was sampled over this stretch")
    result: dict[str, Any] = {
        "joules_per_output_token": None,
        "stretch": None,
        "idle_power_w": Missing("it was not read before the run") if idle_power_w is None else idle_power_w,
        "scope": scope if len(gpu) else Missing("no device was sampled"),
        "measured": {name: each or unsampled for name, each in measured.items()},
        "sensor_reasons": list(sensor_reasons),
        "reasons": list(sensor_reasons),
    }
    if (share := _sampler_share(gpu)) is not None:
        result["sampler_cpu_share"] = share
    if best is None:
        result["reasons"] = result["reasons"] or ["no power was sampled"]
    elif not count:
        result["reasons"].append("no output tokens were counted in that stretch")
    else:
        return resolved(result | {"joules_per_output_token": best["energy_j"] / count, "stretch": label})
    why = Missing(result["reasons"][-1])
    return resolved(result | {"joules_per_output_token": why, "stretch": why})


def _of(run: RunTables) -> dict[str, Any]:
    """The section from the tables; what comes from before the run is taken from the record."""
    assert run.telemetry is not None
    tokens = {
        name: None if window is None else _counted(tokens_inside(run.everyone, window))
        for name, window in (("whole_run", run.whole), ("steady_state", run.steady))
    }
    known = run.given.get("energy") or {}
    reasons = known.get("sensor_reasons") or []
    scope = known.get("scope") or BOARD
    return section(run.telemetry, run.steady, run.whole, tokens, reasons, known.get("idle_power_w"), scope)


def _counted(tokens: float) -> float | None:
    return None if np.isnan(tokens) else tokens


METRICS: tuple[Metric, ...] = (
    Metric(
        ("energy",),
        "Energy per output token",
        "J/token",
        False,
        "Joules of all boards in the steady state (else the whole run) over the output tokens made there.",
        _of,
        "Energy",
        parts=(Part("joules_per_output_token", headline=True, summary=True),),
    ),
)


def _stretch(gpu: pd.DataFrame, window: Window) -> dict[str, Any] | None:
    """Energy of all devices inside one window, with its source; None where a device has no samples."""
    devices = [_device(rows, window) for _, rows in gpu.groupby("device")]
    if not devices or any(each is None for each in devices):
        return None
    known = [each for each in devices if each is not None]
    return {
        "energy_j": sum(each["energy_j"] for each in known),
        "mean_power_w": sum(each["energy_j"] for each in known) / window.seconds,
        "source": sorted({each["source"] for each in known}),
        "reasons": sorted({reason for each in known for reason in each["reasons"]}),
        "sampling_period_s": max(each["period_s"] for each in known),
        "largest_gap_s": max(each["gap_s"] for each in known),
        "counter_over_power": [each["ratio"] for each in known],
    }


def _device(rows: pd.DataFrame, window: Window) -> dict[str, Any] | None:
    power = rows.dropna(subset=["power_w"])
    if power.empty:
        return _counted_alone(rows, window)
    times = power["time_ns"].to_numpy(dtype=np.float64)
    if window.seconds <= 0 or len(times) < 2 or times[0] > window.start_ns or times[-1] < window.end_ns:
        return None
    watts = power["power_w"].to_numpy(dtype=np.float64)
    integrated = integrate(times, watts, window)
    counter = _counter(rows, window)
    ratio = counter / integrated if counter is not None and integrated > 0 else None
    reasons = []
    if counter is None:
        reasons.append("no energy counter")
    elif window.seconds < MIN_COUNTER_S:
        reasons.append(f"the stretch is shorter than {MIN_COUNTER_S:.0f} s")
    elif ratio is None or abs(ratio - 1) > AGREEMENT:
        reasons.append(f"counter and integrated power differ by more than {AGREEMENT:.0%}")
    trusted = not reasons and counter is not None
    return {
        "energy_j": counter if trusted else integrated,
        "source": "hardware counter" if trusted else "trapezoid of sampled power",
        "reasons": reasons,
        "ratio": ratio,
        **_sampling(times, window),
    }


def _counted_alone(rows: pd.DataFrame, window: Window) -> dict[str, Any] | None:
    """By a counter beside which nothing says the power; None where its samples do not span the window."""
    times = rows.dropna(subset=["energy_j"])["time_ns"].to_numpy(dtype=np.float64)
    if window.seconds <= 0 or len(times) < 2 or times[0] > window.start_ns or times[-1] < window.end_ns:
        return None
    return {
        "energy_j": _counter(rows, window),
        "source": "hardware counter",
        "reasons": ["no power reading to hold the counter against"],
        "ratio": None,
        **_sampling(times, window),
    }


def _sampling(times_ns: Floats, window: Window) -> dict[str, float]:
    near = np.diff(times_ns[max(0, np.searchsorted(times_ns, window.start_ns) - 1) :])
    gaps_s = (near if len(near) else np.diff(times_ns)) / 1e9
    return {"period_s": float(np.median(gaps_s)), "gap_s": float(gaps_s.max())}


def _sampler_share(rows: pd.DataFrame) -> float | None:
    """CPU seconds a second of the process that sampled; None where none is known."""
    known = rows[["time_ns", "sampler_cpu_s"]].dropna()
    if len(known) < 2:
        return None
    first, last = known.iloc[0], known.iloc[-1]
    seconds = (last["time_ns"] - first["time_ns"]) / 1e9
    return float((last["sampler_cpu_s"] - first["sampler_cpu_s"]) / seconds) if seconds > 0 else None


def integrate(times_ns: Floats, watts: Floats, window: Window) -> float:
    """Joules inside the window: trapezoids, with the power at its edges interpolated."""
    inside = window.holds(times_ns) & (times_ns < window.end_ns)
    edges = np.interp([window.start_ns, window.end_ns], times_ns, watts)
    t = np.concatenate(([window.start_ns], times_ns[inside], [window.end_ns])) / 1e9
    w = np.concatenate((edges[:1], watts[inside], edges[1:]))
    return float(np.sum(np.diff(t) * (w[1:] + w[:-1]) / 2))


def _counter(rows: pd.DataFrame, window: Window) -> float | None:
    """Joules the hardware counter advanced inside the window, interpolated between samples."""
    known = rows.dropna(subset=["energy_j"])
    if len(known) < 2:
        return None
    times = known["time_ns"].to_numpy(dtype=np.float64)
    joules = known["energy_j"].to_numpy(dtype=np.float64)
    ends = np.interp([window.start_ns, window.end_ns], times, joules)
    return float(ends[1] - ends[0])
