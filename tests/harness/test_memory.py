"""The parts of a run's memory add up to what the process took."""

from __future__ import annotations

import pandas as pd

from backbench.backends.interface.device import detect
from backbench.harness import memory

ENGINE = {"weights_bytes": 100, "kv_pool_bytes": 300, "kv_used_peak_bytes": 50}


def section(rss: list[float | None]) -> dict[str, int | None]:
    telemetry = pd.DataFrame({"host_rss_bytes": rss, "memory_used_bytes": [None] * len(rss)})
    return memory.section(ENGINE, detect(prefer="cpu"), None, telemetry)


def test_on_a_cpu_the_total_is_the_peak_resident_set() -> None:
    found = section([900.0, 1000.0, None])
    assert found["total_bytes"] == found["host_rss_peak_bytes"] == 1000
    assert found["other_bytes"] == 1000 - 100 - 300
    assert found["device_used_peak_minus_idle_bytes"] is None


def test_untouched_pool_pages_leave_no_negative_rest() -> None:
    assert section([350.0])["other_bytes"] is None


def test_nothing_sampled_is_unknown_not_zero() -> None:
    found = section([])
    assert found["total_bytes"] is None
    assert found["other_bytes"] is None
