"""Data sheet peaks are found by the name the driver reports."""

from __future__ import annotations

import pytest

from backbench.harness import peaks


@pytest.mark.parametrize(
    ("name", "sheet"),
    [
        ("NVIDIA H200", (4.8e12, 0.989e15)),
        ("NVIDIA H100 PCIe", (2.0e12, 0.756e15)),
        ("AMD Instinct MI300X OAM", (5.3e12, 1.307e15)),
    ],
)
def test_the_longest_name_of_the_data_sheet_wins(name: str, sheet: tuple[float, float]) -> None:
    assert peaks.datasheet(name) == sheet


def test_a_name_that_goes_on_is_found() -> None:
    found = peaks.datasheet("NVIDIA H100 80GB HBM3")
    assert found is not None and found[0] == 3.35e12


def test_an_unknown_device_has_no_datasheet() -> None:
    assert peaks.datasheet("AMD EPYC") is None
