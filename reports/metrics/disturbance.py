"""Was the machine this run's own: what other processes, a hypervisor, a quota and the clocks took from it.

Shares of CPU time are of all CPUs the process may use, whether or not the run needed them: load on a CPU that
the run leaves idle still takes cache, memory bandwidth, the sibling hardware thread and the turbo clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from backbench.reports.metrics.metric import Metric, Missing, Part
from backbench.reports.metrics.run import RunTables

if TYPE_CHECKING:
    import pandas as pd

MOST_OTHERS = 0.10
"""Other processes' share of the CPUs above which a run is disturbed. Policy: a system's own services stay
well below it, and on two CPUs one spinning process takes half."""
MOST_STEAL = 0.02
"""A hypervisor's share. Policy: unlike other processes' it is always taken while somebody here had work."""
MOST_THROTTLED = 0.02
"""A quota's share; for the same reason."""
CLOCK_DROP = 0.10
"""A clock this far below its own median is low. Boost steps under a steady load are smaller."""
MOST_LOW_CLOCK = 0.05
"""The share of the busy samples with a low clock above which a run is disturbed."""
SHORTEST_S = 1.0
"""The system counts CPU time in steps of 10 ms a CPU: at both ends together at most 2 % of this."""
FEWEST_CLOCKS = 20
"""Samples of a clock: MOST_LOW_CLOCK of fewer is not even one."""

NOT_AT_HAND = Missing("the telemetry is not at hand")
NOT_COUNTED = Missing("this system does not count it, or nothing was sampled")
TOO_SHORT = Missing(f"under {SHORTEST_S:g} s were sampled, and the system counts CPU time in steps of 10 ms")
ON_CPU = Missing("the engine ran on no GPU")

Number = float | int | Missing


def growth(
    samples: pd.DataFrame, column: str, start_ns: float, end_ns: float
) -> tuple[float, float] | Missing:
    """By how much a counter grew inside the stretch, and the seconds of it that the samples cover.

    Between two samples it is taken to grow evenly.
    """
    known = samples[["time_ns", column]].dropna()
    if len(known) < 2:
        return NOT_COUNTED
    times = known["time_ns"].to_numpy(dtype=np.float64)
    start_ns, end_ns = max(start_ns, times[0]), min(end_ns, times[-1])
    seconds = (end_ns - start_ns) / 1e9
    if seconds < SHORTEST_S:
        return TOO_SHORT
    first, last = np.interp((start_ns, end_ns), times, known[column].to_numpy(dtype=np.float64))
    return float(last - first), seconds


def _host(run: RunTables) -> pd.DataFrame | None:
    return None if run.telemetry is None else run.telemetry[run.telemetry["device"] < 0]


def _grown(run: RunTables, column: str) -> tuple[float, float] | Missing:
    host = _host(run)
    return NOT_AT_HAND if host is None else growth(host, column, run.whole.start_ns, run.whole.end_ns)


def _per_second(run: RunTables, column: str) -> Number:
    found = _grown(run, column)
    return found if isinstance(found, Missing) else found[0] / found[1]


def _cpus(run: RunTables) -> Number:
    host = _host(run)
    if host is None:
        return NOT_AT_HAND
    known = host["usable_cpus"].dropna()
    return NOT_COUNTED if known.empty else int(known.max())


def _share(run: RunTables, column: str) -> Number:
    """CPU seconds a second and usable CPU."""
    rate, cpus = _per_second(run, column), _cpus(run)
    if isinstance(rate, Missing) or isinstance(cpus, Missing):
        return rate if isinstance(rate, Missing) else cpus
    return rate / cpus


def _others(run: RunTables) -> Number:
    everyone, own = _share(run, "machine_cpu_s"), _share(run, "process_cpu_s")
    if isinstance(everyone, Missing) or isinstance(own, Missing):
        return everyone if isinstance(everyone, Missing) else own
    if not everyone:
        return NOT_COUNTED
    return max(0.0, everyone - own)  # the two counters are not read at one instant


def _gpu(run: RunTables, column: str) -> pd.DataFrame | Missing:
    """The samples of the run that know the column, on whichever GPU."""
    if run.telemetry is None:
        return NOT_AT_HAND
    if not run.context.gpus:
        return ON_CPU
    rows = run.telemetry[run.telemetry["device"] >= 0]
    inside = rows["time_ns"].between(run.whole.start_ns, run.whole.end_ns)
    rows = rows[inside & rows[column].notna()]
    return NOT_COUNTED if rows.empty else rows


def _foreign(run: RunTables) -> Number:
    rows = _gpu(run, "processes")
    return rows if isinstance(rows, Missing) else max(0, int(rows["processes"].max()) - 1)


def _low_clock(run: RunTables) -> Number:
    rows = _gpu(run, "sm_clock_mhz")
    if isinstance(rows, Missing):
        return rows
    shares = []
    for _, card in rows.groupby("device"):
        busy = card[card["utilization"].isna() | (card["utilization"] > 0)]
        clocks = busy["sm_clock_mhz"].to_numpy(dtype=np.float64)
        if len(clocks) >= FEWEST_CLOCKS:
            shares.append(float((clocks < (1 - CLOCK_DROP) * np.median(clocks)).mean()))
    return max(shares) if shares else Missing(f"fewer than {FEWEST_CLOCKS} samples of a busy GPU's clock")


def reasons(found: dict[str, Any]) -> list[str]:
    """Each limit that the figures of a record's `metrics.disturbance` are over, with the figure.

    Waiting (pressure) and switches are not judged: this process's own threads wait for one another, too.
    """
    cpus = found.get("usable_cpus")
    limits = (
        ("others_cpu_share", MOST_OTHERS, f"other processes took {{}} of the {cpus} usable CPUs"),
        ("steal_share", MOST_STEAL, f"the hypervisor took {{}} of the {cpus} usable CPUs"),
        ("throttled_share", MOST_THROTTLED, f"a CPU quota held back {{}} of the {cpus} usable CPUs"),
        (
            "low_clock_share",
            MOST_LOW_CLOCK,
            f"the GPU's clock was over {CLOCK_DROP:.0%} below its median for {{}} of the time",
        ),
    )
    over = []
    for key, limit, words in limits:
        if (share := found.get(key)) is not None and share > limit:
            over.append(f"{words.format(f'{share:.1%}')} (limit {limit:.0%})")
    if foreign := found.get("foreign_gpu_processes"):
        over.append(f"{foreign} other process{'es' if foreign > 1 else ''} used the GPU during the run")
    return over


def _figure(
    key: str,
    label: str,
    unit: str,
    definition: str,
    compute: Callable[[RunTables], Number],
    shown: bool = True,
) -> Metric:
    path, parts = ("metrics", "disturbance", key), (Part(),) if shown else ()
    return Metric(path, label, unit, None, definition, compute, "Machine", parts=parts, since=2)


def _over(limit: float) -> str:
    return f"disturbed above {limit:.0%}."


METRICS: tuple[Metric, ...] = (
    _figure("usable_cpus", "Usable CPUs", "", "CPUs that the process may run on.", _cpus, shown=False),
    _figure(
        "own_cpu_share",
        "CPU, this process",
        "ratio",
        "CPU time of this process and its threads over wall time and usable CPUs.",
        lambda run: _share(run, "process_cpu_s"),
    ),
    _figure(
        "others_cpu_share",
        "CPU, other processes",
        "ratio",
        f"All others' CPU time over wall time and usable CPUs; {_over(MOST_OTHERS)}",
        _others,
    ),
    _figure(
        "steal_share",
        "CPU, stolen",
        "ratio",
        f"Time the hypervisor gave to others over wall time and usable CPUs; {_over(MOST_STEAL)}",
        lambda run: _share(run, "steal_s"),
    ),
    _figure(
        "throttled_share",
        "CPU, throttled",
        "ratio",
        f"Time a CPU quota held back over wall time and usable CPUs; {_over(MOST_THROTTLED)}",
        lambda run: _share(run, "throttled_s"),
    ),
    _figure(
        "pressure_share",
        "CPU pressure",
        "ratio",
        "Share of the time in which some task of the machine waited for a CPU, this process's own too.",
        lambda run: _per_second(run, "cpu_pressure_s"),
    ),
    _figure(
        "involuntary_switches_per_s",
        "Involuntary switches/s",
        "1/s",
        "How often a second a thread of this process was taken off a CPU.",
        lambda run: _per_second(run, "involuntary_switches"),
    ),
    _figure(
        "foreign_gpu_processes",
        "Other GPU processes",
        "",
        "Most processes seen on the GPU at once in the run, less this one; disturbed above none.",
        _foreign,
    ),
    _figure(
        "low_clock_share",
        "Low GPU clock",
        "ratio",
        f"Share of the busy samples with a clock {CLOCK_DROP:.0%} below its median; {_over(MOST_LOW_CLOCK)}",
        _low_clock,
    ),
)
