"""Running a gate: pairs in the order A B B A, looked at after 8, 12 and 16, kept on disk as they end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backbench.errors import ReportError
from backbench.harness.gate.arms import Arm, MeasureRun
from backbench.harness.gate.decision import LOOKS, Finding, Verdict, judge, overall
from backbench.harness.gate.outcome import Outcome, Pair, conclude
from backbench.harness.gate.pairs import make_pair
from backbench.harness.gate.policy import METRICS, Policy
from backbench.reports.record import RunDirectory, RunRecord

FEWEST_PAIRS = 6
"""Fewer cannot reject anything at 95 %."""
MOST_VOID = 8
"""Void pairs after which the machine is not fit to gate on."""


@dataclass
class Session:
    """One gate in its directory; running it again goes on where it stopped."""

    policy: Policy
    baseline: Arm
    candidate: Arm
    out: Path
    measure: MeasureRun
    tell: Callable[[str], None] = print
    max_minutes: float | None = None
    looks: Sequence[int] = LOOKS

    def run(self) -> Outcome:
        """Pairs until a look decides, the budget ends, or too many pairs are void."""
        started = time.monotonic()
        longest_s = 0.0
        pairs: list[Pair] = []
        while True:
            valid = [pair for pair in pairs if not pair.void]
            if any(pair.wrong for pair in pairs):
                return self._outcome(pairs, Verdict.REGRESSED, "")
            if len(valid) in self.looks and not pairs[-1].void:
                findings = self.findings(valid)
                verdict = overall(findings) if findings else Verdict.INCONCLUSIVE
                if verdict is not Verdict.EXTEND or len(valid) == self.looks[-1]:
                    return self._outcome(pairs, verdict, "")
            if len(pairs) - len(valid) >= MOST_VOID:
                return self._outcome(pairs, Verdict.INCONCLUSIVE, f"{MOST_VOID} pairs were void")
            spent_s = time.monotonic() - started
            if self.max_minutes is not None and spent_s + longest_s > 60 * self.max_minutes:
                return self._outcome(pairs, Verdict.INCONCLUSIVE, f"{self.max_minutes:g} minutes were spent")
            before = time.monotonic()
            pairs.append(self._pair(len(pairs)))
            longest_s = max(longest_s, time.monotonic() - before)

    def findings(self, valid: Sequence[Pair]) -> list[Finding]:
        """What the valid pairs say of each gated metric that every one of them measured."""
        if len(valid) < FEWEST_PAIRS:
            return []
        measured = [name for name in self.policy.margins if all(name in pair.values for pair in valid)]
        differences = {
            name: np.array([METRICS[name].difference(*pair.values[name]) for pair in valid])
            for name in measured
        }
        return judge(differences, self.policy.margins) if measured else []

    def _pair(self, index: int) -> Pair:
        seed = self.policy.seed + index
        arms = (self.baseline, self.candidate)
        order = arms if index % 2 == 0 else arms[::-1]
        records = {arm.name: self._record(arm, index, seed) for arm in order}
        pair = make_pair(index, seed, (order[0].name, order[1].name), records, self.policy)
        state = f"void: {pair.void[0]}" if pair.void else "valid"
        self.tell(f"pair {index + 1}: {state}")
        return pair

    def _record(self, arm: Arm, index: int, seed: int) -> RunRecord:
        """The stored run where it was finished before, else a new one."""
        where = self.out / "pairs" / f"{index:02d}-{arm.name}"
        try:
            stored = RunDirectory.open(where).read_record()
            if stored.run["status"] == "complete" and stored.correctness.get("passed") is not None:
                return stored
        except ReportError:
            pass  # not there, or cut short: it is run again in a directory of its own
        while where.exists():
            where = where.with_name(where.name + "-again")
        where.parent.mkdir(parents=True, exist_ok=True)
        return self.measure(arm, self.policy, seed, where)

    def _outcome(self, pairs: list[Pair], verdict: Verdict, reason: str) -> Outcome:
        valid = [pair for pair in pairs if not pair.void]
        findings = self.findings(valid)
        lacking = [n for n in self.policy.margins if not all(n in pair.values for pair in valid)]
        return conclude(
            Outcome(
                self.policy,
                (self.baseline, self.candidate),
                tuple(pairs),
                tuple(findings),
                verdict,
                reason,
                tuple(lacking),
            )
        )
