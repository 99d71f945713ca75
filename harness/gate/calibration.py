"""The noise floor of a machine: pairs of one arm against itself, and what a gate could see there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from typing import Any

from backbench.errors import INVALID, HarnessError
from backbench.harness.gate.arms import Arm
from backbench.harness.gate.decision import LOOKS, detectable_effect
from backbench.harness.gate.fingerprint import Fingerprint
from backbench.harness.gate.outcome import Pair
from backbench.harness.gate.policy import Policy, gated
from backbench.harness.gate.session import FEWEST_PAIRS, FIRST_VOID, MOST_VOID, Session, differences

CALIBRATION_FILE = "bench-calibration.json"
SCHEMA_VERSION = 1
MARGIN_STEP = 0.005
"""Proposed margins are multiples of it."""


@dataclass(frozen=True)
class Noise:
    """One metric of one cell on one machine, between runs of the same code."""

    pairs: int
    noise: float
    """Standard deviation of ln(second / first) over the pairs."""
    detectable: dict[str, float]
    """Pairs -> the relative loss that so many would find nine times of ten."""
    proposed_margin: float
    """The smallest that the last look could see, and no smaller than the metric's own."""


@dataclass(frozen=True)
class Calibration:
    """What is known of one (fingerprint, cell)."""

    cell: str
    """What was run, as options of `bench run`."""
    fingerprint: Fingerprint
    utc: str
    metrics: dict[str, Noise]

    @property
    def key(self) -> tuple[str, str]:
        return self.fingerprint.digest, self.cell

    def blind(self, policy: Policy) -> str | None:
        """Which margins of the policy the last look could not see, in words."""
        found = []
        for name, noise in self.metrics.items():
            family = len(policy.margins) if policy.kernels is None else len(self.metrics)
            least = detectable_effect(noise.noise, LOOKS[-1], family)
            margin = policy.share(name)
            if margin is not None and gated(name).least == 0 and least > margin:
                found.append(f"{name} margin {margin:.1%}, could see >= {least:.1%}")
        if not found:
            return None
        return f"cannot see its margins here, by the calibration of {self.utc[:10]}: {'; '.join(found)}"


def cell_of(policy: Policy, arm: Arm) -> str:
    """What a calibration belongs to besides the fingerprint."""
    if policy.kernels is not None:
        return shlex.join(["kernels", *policy.kernels, *arm.options])
    return shlex.join(["--workload", policy.workload, *policy.options, *arm.options])


def calibrate(session: Session, pairs: int = LOOKS[1]) -> Calibration:
    """Run pairs of one arm against itself.

    Raises:
        HarnessError: too many pairs are void (exit code 4).
    """
    if pairs < FEWEST_PAIRS:
        raise HarnessError(f"A calibration takes at least {FEWEST_PAIRS} pairs, not {pairs}.")
    session.claim()
    done: list[Pair] = []
    while len(valid := [pair for pair in done if not pair.void]) < pairs:
        void = len(done) - len(valid)
        if session.differs is not None:
            raise HarnessError(f"The runs are not comparable: {session.differs}.", INVALID)
        if void >= (MOST_VOID if valid else FIRST_VOID):
            raise HarnessError(f"{void} pairs were void: {done[-1].void[0]}.", INVALID)
        done.append(session.next_pair(done))
    assert session.fingerprint is not None
    measured = [name for name in session.names(valid) if all(pair.compares(name) for pair in valid)]
    return Calibration(
        cell_of(session.policy, session.baseline),
        session.fingerprint,
        datetime.now(UTC).isoformat(timespec="seconds"),
        {name: noise_of(name, valid, len(session.names(valid))) for name in measured},
    )


def noise_of(metric: str, valid: list[Pair], family: int) -> Noise:
    """What these A/A pairs say of a metric."""
    found = differences(valid, metric)
    noise = float(found.std(ddof=1))
    least = {str(look): detectable_effect(noise, look, family) for look in LOOKS}
    seen = ceil(round(least[str(LOOKS[-1])] / MARGIN_STEP, 6)) * MARGIN_STEP
    return Noise(len(valid), noise, least, round(max(seen, gated(metric).margin), 6))


def store(found: Calibration, file: Path) -> None:
    """Put the calibration into the file, in place of an older one of its fingerprint and cell."""
    kept = {each.key: each for each in read_calibrations(file)} if file.exists() else {}
    kept[found.key] = found
    content = {"schema_version": SCHEMA_VERSION, "cells": [asdict(kept[key]) for key in sorted(kept)]}
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def read_calibrations(file: Path) -> list[Calibration]:
    """All of a file; HarnessError in one line where it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION:
            raise HarnessError(f"{file} has schema_version {content['schema_version']!r}; calibrate again.")
        return [_calibration(each) for each in content["cells"]]
    except OSError as error:
        raise HarnessError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise HarnessError(f"{file} is no calibration ({why}); bench calibrate writes one.") from None


def _calibration(data: Mapping[str, Any]) -> Calibration:
    known = Fingerprint(**data["fingerprint"])
    metrics = {str(name): Noise(**each) for name, each in data["metrics"].items()}
    return Calibration(str(data["cell"]), known, str(data["utc"]), metrics)


def find(calibrations: list[Calibration], known: Fingerprint, cell: str) -> Calibration | None:
    """The one of this machine and cell."""
    return next((each for each in calibrations if each.key == (known.digest, cell)), None)
