"""The noise floor: what A/A pairs say, where it is kept, and when a gate refuses because of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gate.conftest import RECORD, FakeRunner, changed
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import HarnessError
from backbench.harness.gate.arms import Arm
from backbench.harness.gate.calibration import calibrate, cell_of, find, noise_of, read_calibrations, store
from backbench.harness.gate.decision import detectable_effect
from backbench.harness.gate.fingerprint import fingerprint
from backbench.harness.gate.outcome import Pair
from backbench.harness.gate.policy import Policy
from backbench.harness.gate.session import Session

Gate = Callable[..., Session]


def test_the_noise_of_a_pair_is_found(gate: Gate) -> None:
    """A pair's difference has sqrt(2) times a run's noise; 64 pairs know it to 9 %."""
    found = calibrate(gate(FakeRunner(noise=0.01)), pairs=64)
    assert found.cell == "--workload sharegpt"
    each = found.metrics["throughput"]
    assert each.pairs == 64 and each.noise == pytest.approx(2**0.5 * 0.01, rel=0.27)
    assert each.detectable["16"] == pytest.approx(detectable_effect(each.noise, 16, 3))
    assert each.detectable["8"] > each.detectable["12"] > each.detectable["16"]
    assert each.proposed_margin == 0.03


def test_a_noisy_machine_gets_a_margin_that_it_can_see(gate: Gate) -> None:
    each = calibrate(gate(FakeRunner(noise=0.05)), pairs=12).metrics["throughput"]
    assert each.detectable["16"] <= each.proposed_margin < each.detectable["16"] + 0.005
    assert each.proposed_margin / 0.005 == pytest.approx(round(each.proposed_margin / 0.005))


@given(noise=st.floats(0.001, 0.5))
def test_a_proposed_margin_is_the_next_that_can_be_seen(noise: float) -> None:
    spread = [1 / np.exp(noise * step) for step in np.linspace(-1, 1, 8)]
    pairs = [
        Pair(i, i, ("baseline", "candidate"), {"throughput": (1.0, each)}) for i, each in enumerate(spread)
    ]
    found = noise_of("throughput", pairs, family=2)
    least = found.detectable["16"]
    assert found.proposed_margin >= 0.03
    assert least - 1e-6 <= found.proposed_margin < max(0.03 + 1e-6, least + 0.005)


def test_more_gated_metrics_see_less(gate: Gate) -> None:
    """A margin between what one and what three metrics can see is refused to three alone."""
    found = calibrate(gate(FakeRunner(noise=0.05)), pairs=6)
    noise = found.metrics["throughput"].noise
    between = (detectable_effect(noise, 16, 1) + detectable_effect(noise, 16, 3)) / 2
    assert found.blind(Policy(margins={"throughput": between})) is None
    others = {"tpot_p50": 0.9, "ttft_p50": 0.9}
    assert "throughput" in (found.blind(Policy(margins={"throughput": between} | others)) or "")


def test_a_gate_is_refused_where_its_margins_cannot_be_seen(gate: Gate) -> None:
    noisy = calibrate(gate(FakeRunner(noise=0.05)), pairs=12)
    why = noisy.blind(Policy()) or ""
    assert "throughput margin 3.0%, could see >=" in why and noisy.utc[:10] in why
    assert noisy.blind(Policy(margins={"throughput": 0.5})) is None
    outcome = gate(FakeRunner(noise=0.05), blind=lambda _: noisy.blind(Policy())).run()
    assert (outcome.exit_code, outcome.reason) == (4, why)


def test_void_pairs_are_made_up_for_and_too_many_end_it(gate: Gate) -> None:
    def change(record, arm, seed):  # type: ignore[no-untyped-def]
        return replace(record, validity=["throttled"]) if seed == 1 else record

    assert calibrate(gate(FakeRunner(change=change)), pairs=6).metrics["throughput"].pairs == 6


def test_a_machine_that_voids_every_pair_is_not_calibrated(gate: Gate) -> None:
    runner = FakeRunner(change=lambda record, arm, seed: replace(record, validity=["throttled"]))
    with pytest.raises(HarnessError, match="3 pairs were void: baseline: throttled") as caught:
        calibrate(gate(runner), pairs=6)
    assert caught.value.exit_code == 4


def test_too_few_pairs_are_one_line(gate: Gate) -> None:
    with pytest.raises(HarnessError, match="at least 6 pairs, not 5"):
        calibrate(gate(FakeRunner()), pairs=5)


def test_calibrations_are_kept_by_machine_and_cell(gate: Gate, tmp_path: Path) -> None:
    first = calibrate(gate(FakeRunner()), pairs=6)
    other = replace(first, fingerprint=fingerprint(changed(RECORD, "system.device.name", "another")))
    longer = replace(first, cell=cell_of(Policy(), Arm("baseline", ("--backend", "sdpa"))))
    newer = replace(first, utc="2031-01-01T00:00:00+00:00")
    file = tmp_path / "bench-calibration.json"
    for each in (first, other, longer, newer):
        store(each, file)
    kept = read_calibrations(file)
    assert len(kept) == 3 and newer in kept and first not in kept
    assert find(kept, first.fingerprint, first.cell) == newer
    assert find(kept, other.fingerprint, first.cell) == other
    assert find(kept, other.fingerprint, longer.cell) is None
    before = file.read_bytes()
    store(newer, file)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema_version": 9, "cells": []}', '{"schema_version": 1, "cells": [{}]}', "null"],
)
def test_a_file_that_is_no_calibration_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bench-calibration.json"
    file.write_text(text)
    with pytest.raises(HarnessError) as caught:
        read_calibrations(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
