"""The parts of a run's memory add up to what the process took, by one counter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch

from backbench.backends.interface.device import cpu
from backbench.harness import memory
from backbench.harness.memory import Readings

HOST = Readings(weights_bytes=100, kv_pool_bytes=300, kv_used_peak_bytes=50, capacity_bytes=5000)
CARD = replace(
    HOST,
    on_device=True,
    device_idle_bytes=70,
    torch_allocated_peak_bytes=410,
    torch_reserved_peak_bytes=450,
)
GPU = replace(cpu(), vendor="nvidia", arch="sm90", torch_device=torch.device("cuda", 0))


def section(
    readings: Readings, rss: list[float | None] | None = None, used: list[float | None] | None = None
) -> dict[str, Any]:
    rss, used = rss or [], used or []
    rss, used = rss or [None] * len(used), used or [None] * len(rss)
    return memory.section(readings, pd.DataFrame({"host_rss_bytes": rss, "memory_used_bytes": used}))


def test_on_a_cpu_the_total_is_the_peak_resident_set() -> None:
    found = section(HOST, rss=[900.0, 1000.0, None])
    assert found["total_bytes"] == found["host_rss_peak_bytes"] == 1000
    assert found["other_bytes"] == 1000 - 100 - 300
    assert found["device_used_peak_minus_idle_bytes"] is None


def test_untouched_pool_pages_leave_no_negative_rest() -> None:
    assert section(HOST, rss=[350.0])["other_bytes"] is None


def test_nothing_sampled_is_unknown_not_zero() -> None:
    found = section(HOST)
    assert found["total_bytes"] is None
    assert found["other_bytes"] is None


def test_on_a_gpu_the_peak_and_idle_are_of_one_counter() -> None:
    """The samples are the driver's, as idle is; CUDA's own counter is another and does not mix in."""
    found = section(replace(CARD, device_used_bytes=9999), used=[500.0, 570.0, 560.0])
    assert found["total_bytes"] == found["device_used_peak_minus_idle_bytes"] == 570 - 70
    assert found["other_bytes"] == 500 - 100 - 300
    assert found["torch_reserved_peak_bytes"] <= found["device_used_peak_minus_idle_bytes"]


def test_without_samples_cudas_counter_serves_for_both() -> None:
    found = section(replace(CARD, device_used_bytes=600))
    assert found["device_used_peak_minus_idle_bytes"] == 600 - 70
    assert section(CARD)["total_bytes"] is None, "after a fault nothing may be asked"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A card with 1000 bytes, 250 of them in use once it is asked: a context was made for that."""
    asked: list[str] = []

    def answer(name: str, value: Any) -> None:
        def tell(*_: Any) -> Any:
            asked.append(name)
            return value

        monkeypatch.setattr(torch.cuda, name, tell)

    answer("mem_get_info", (750, 1000))
    answer("max_memory_allocated", 410)
    answer("max_memory_reserved", 450)
    answer("empty_cache", None)
    answer("reset_peak_memory_stats", None)
    return asked


def test_idle_is_read_without_a_context_of_our_own(card: list[str]) -> None:
    assert memory.idle_device_bytes(GPU, {"idle_memory_bytes": 70}) == 70
    assert card == [], "torch would make one"
    assert memory.idle_device_bytes(GPU, {}) == 250
    assert memory.idle_device_bytes(cpu(), {}) is None


def test_readings_at_the_end_ask_what_idle_was_read_from(card: list[str]) -> None:
    found = memory.with_device(CARD, GPU, sampled=True)
    assert (found.device_used_bytes, found.torch_reserved_peak_bytes) == (None, 450)
    assert memory.with_device(CARD, GPU, sampled=False).device_used_bytes == 250


def test_peaks_are_reset_on_a_gpu_only(card: list[str]) -> None:
    memory.reset_peaks(cpu())
    assert card == []
    memory.reset_peaks(GPU)
    assert card == ["empty_cache", "reset_peak_memory_stats"]
