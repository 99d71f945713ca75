"""What this process and others take of the host: CPU time, memory, waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backbench.harness.sensors.telemetry import Row

PRESSURE = Path("/proc/pressure/cpu")
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
BUSY = ("user", "nice", "system", "irq", "softirq")
"""Fields of psutil's CPU times in which a CPU worked for a process of this machine, as far as the system has
them."""


class HostSensor:
    """CPU use and resident memory of this process, and what shows that others were at work: device -1."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call starts the interval and says 0
        self._cpus = usable_cpus()
        self._readers: dict[str, Callable[[], float | int]] = {}
        counters = {
            "involuntary_switches": involuntary_switches,
            "cpu_pressure_s": lambda: pressure_s(PRESSURE.read_text()),
            **({} if (quota := quota_file()) is None else {"throttled_s": lambda: throttled_s(quota)}),
        }
        for name, read in counters.items():
            try:
                read()
            except (ImportError, OSError, LookupError):
                continue  # this system has no such counter
            self._readers[name] = read

    def sample(self) -> list[Row]:
        busy_s, steal_s = machine_cpu_s(self._cpus)
        row: Row = {
            "device": -1,
            "host_cpu_percent": float(self._process.cpu_percent()),
            "host_rss_bytes": int(self._process.memory_info().rss),
            "usable_cpus": len(self._cpus),
            "process_cpu_s": time.process_time(),
            "machine_cpu_s": busy_s,
            "steal_s": steal_s,
        }
        return [row | {name: read() for name, read in self._readers.items()}]

    def close(self) -> None:
        pass


def usable_cpus() -> list[int]:
    """The numbers of the CPUs this process may run on."""
    import psutil

    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        return list(process.cpu_affinity())
    return list(range(psutil.cpu_count() or 1))


def machine_cpu_s(cpus: list[int]) -> tuple[float, float | None]:
    """Seconds in which these CPUs worked, for whichever process, and which a hypervisor gave to others.

    The system counts them in steps of about 10 ms a CPU. None where it does not know a hypervisor's.
    """
    import psutil

    if len(cpus) == psutil.cpu_count():
        times: list[Any] = [psutil.cpu_times()]  # one line to read instead of one a CPU
    else:
        each = psutil.cpu_times(percpu=True)
        times = [each[cpu] for cpu in cpus]
    busy_s = sum(getattr(one, name, 0.0) for one in times for name in BUSY)
    stolen = [one.steal for one in times if hasattr(one, "steal")]
    return float(busy_s), float(sum(stolen)) if stolen else None


def involuntary_switches() -> int:
    """How often a thread of this process was taken off a CPU while it could have gone on."""
    import resource  # not on every system; psutil knows the first thread's only

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def pressure_s(text: str) -> float:
    """Seconds in which some task of the machine waited for a CPU, from the text of /proc/pressure/cpu."""
    return int(text.split("total=", 1)[1].split()[0]) / 1e6


def quota_file(membership: Path = MEMBERSHIP, groups: Path = CGROUPS) -> Path | None:
    """Where the kernel counts what the CPU quota of this process's control group held back; or None."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)  # the second version's only line names no controller
        if controllers and "cpu" not in controllers.split(","):
            continue
        file = groups / controllers / path.lstrip("/") / "cpu.stat"
        if file.is_file() and "throttled_" in file.read_text():
            return file
    return None


def throttled_s(file: Path) -> float:
    """Seconds, summed over CPUs, in which the quota held the group back; LookupError where there is none."""
    counts = dict(line.split() for line in file.read_text().splitlines())
    if "throttled_usec" in counts:
        return int(counts["throttled_usec"]) / 1e6
    return int(counts["throttled_time"]) / 1e9
