"""A gate's answer, and the files it leaves: gate.json, JUnit XML, Markdown for a step summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from backbench.errors import INCONCLUSIVE, INVALID, REGRESSED, WRONG, printable
from backbench.harness.gate.arms import Arm
from backbench.harness.gate.decision import Finding, Verdict
from backbench.harness.gate.fingerprint import Fingerprint
from backbench.harness.gate.policy import Policy, gated
from backbench.harness.provenance import redacted
from backbench.reports.record import finite

SCHEMA_VERSION = 1
"""Of gate.json."""
LONGEST_REASON = 1000
"""Characters of one void pair's reasons in the summary; gate.json has them whole."""
LONGEST_SUMMARY = 2**17
"""Characters: at four bytes each, half of the MiB that GitHub takes of a step's summary."""
EXIT_CODES = {
    Verdict.PASS: 0,
    Verdict.REGRESSED: REGRESSED,
    Verdict.INCONCLUSIVE: INCONCLUSIVE,
    Verdict.INVALID: INVALID,
}


@dataclass(frozen=True)
class Pair:
    """Two neighbouring runs of one request stream."""

    index: int
    seed: int
    order: tuple[str, str]
    values: dict[str, tuple[float, float]]
    """Metric -> (baseline, candidate), each 0 or more."""
    void: tuple[str, ...] = ()
    """Why it does not count."""
    wrong: str | None = None
    """What the candidate's correctness check found, where it failed."""
    checked: bool = False
    """Whether both runs' results were checked and right."""

    def compares(self, name: str) -> bool:
        """Whether both runs have a value of which a ratio can be taken."""
        return all(value > 0 for value in self.values.get(name, (0, 0)))


@dataclass(frozen=True)
class Outcome:
    """A gate's answer with everything it rests on."""

    policy: Policy
    arms: tuple[Arm, Arm]
    pairs: tuple[Pair, ...]
    findings: tuple[Finding, ...]
    verdict: Verdict
    reason: str
    """In words, why the verdict is what it is."""
    not_measured: tuple[str, ...] = ()
    """Gated metrics that some run lacks."""
    fingerprint: Fingerprint | None = None
    """Of the machine, the model and the workload; None = nothing ran."""
    exit_code: int = 0
    floors: tuple[str, ...] = ()
    """The policy's floors that the candidate breaks, in words."""
    soft: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Arm -> driver, Python, torch and the like, which may differ."""


def conclude(outcome: Outcome) -> Outcome:
    """The outcome with its reason in words and its exit code; no verdict is left that asks for more pairs."""
    if wrong := next((pair.wrong for pair in outcome.pairs if pair.wrong), None):
        return replace(outcome, reason=wrong, exit_code=WRONG)
    findings = tuple(
        replace(each, verdict=Verdict.INCONCLUSIVE) if each.verdict is Verdict.EXTEND else each
        for each in outcome.findings
    )
    verdict = Verdict.INCONCLUSIVE if outcome.verdict is Verdict.EXTEND else outcome.verdict
    said = "; ".join(sentence(each) for each in findings if each.verdict is verdict)
    reason = "; ".join(filter(None, (*outcome.floors, outcome.reason, said)))
    return replace(outcome, findings=findings, verdict=verdict, reason=reason, exit_code=EXIT_CODES[verdict])


def sentence(finding: Finding) -> str:
    """One metric in words: candidate over baseline, its interval, and what could have been seen.

    It is called worse or better only where the whole interval is.
    """
    change = ", worse" if finding.low > 0 else ", better" if finding.high < 0 else ""
    middle, *ends = (
        1 / (1 + loss) if gated(finding.metric).quantity.higher_is_better else 1 + loss
        for loss in (finding.loss, finding.low, finding.high)
    )
    seen = f"margin {finding.margin:.0%}, could have seen >= {finding.detectable:.1%}"
    span = f"{min(ends):.3f} to {max(ends):.3f}, n = {finding.pairs} pairs"
    return f"{finding.metric} {middle:.3f}x the baseline's{change} ({span}; {seen})"


def headline(outcome: Outcome) -> str:
    """The answer in one line."""
    answer = "wrong results" if outcome.exit_code == WRONG else outcome.verdict.value
    return f"{answer.upper()}: {outcome.reason}"


def write(outcome: Outcome, folder: Path) -> None:
    """gate.json, junit.xml and summary.md in `folder`, each whole or not at all."""
    for name, text in (
        ("gate.json", to_json(outcome)),
        ("junit.xml", to_junit(outcome)),
        ("summary.md", to_markdown(outcome)),
    ):
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def to_json(outcome: Outcome) -> str:
    """Everything: raw values, order, seeds, p, intervals, margins, detectable effects, voids and why."""
    content = asdict(outcome) | {
        "schema_version": SCHEMA_VERSION,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "arms": {arm.name: arm.describe() for arm in outcome.arms},
    }
    return json.dumps(finite(redacted(content)), indent=1) + "\n"


def to_junit(outcome: Outcome) -> str:
    """One test case a metric; regressed = failure, inconclusive = skipped, wrong results = error."""
    suite = ElementTree.Element("testsuite", name="bench gate")
    counts = {"failure": 0, "error": 0, "skipped": 0}

    def case(name: str, kind: str | None, text: str) -> None:
        element = ElementTree.SubElement(suite, "testcase", classname="bench.gate", name=name)
        if kind is not None:
            counts[kind] += 1
            ElementTree.SubElement(element, kind, message=printable(text)).text = printable(text)

    kinds = {Verdict.REGRESSED: "failure", Verdict.PASS: None}
    if outcome.exit_code in (WRONG, INVALID):
        case("gate", "error", outcome.reason)
    else:
        for floor in outcome.floors:
            case("floor", "failure", floor)
        for each in outcome.findings:
            case(each.metric, kinds.get(each.verdict, "skipped"), sentence(each))
        if not len(suite):
            case("gate", kinds.get(outcome.verdict, "skipped"), outcome.reason)
    suite.attrib |= {
        "tests": str(len(suite)),
        "failures": str(counts["failure"]),
        "errors": str(counts["error"]),
    }
    suite.attrib |= {"skipped": str(counts["skipped"])}
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def to_markdown(outcome: Outcome) -> str:
    """A few lines and a table, for a step summary."""
    lines = [f"**{headline(outcome)}**", ""]
    for arm in outcome.arms:
        described = ", ".join(f"{key} `{value}`" for key, value in arm.describe().items() if value)
        lines.append(f"- {arm.name}: {described or 'as installed'}")
    void = [pair for pair in outcome.pairs if pair.void]
    lines.append(f"- pairs: {len(outcome.pairs) - len(void)} valid, {len(void)} void")
    if outcome.findings:
        lines += ["", "| metric | verdict | loss | 95 % interval | p (Holm) | margin | could have seen |"]
        lines.append("|---|---|---|---|---|---|---|")
    for each in outcome.findings:
        lines.append(
            f"| {each.metric} | {each.verdict.value} | {each.loss:+.2%} "
            f"| {each.low:+.2%} to {each.high:+.2%} | {each.p:.4f} "
            f"| {each.margin:.0%} | {each.detectable:.2%} |"
        )
    lines += ["", *_software(outcome)]
    lines += [f"- {name} was not measured by every run" for name in outcome.not_measured]
    lines += [
        f"- pair {pair.index + 1} is void: {_cut('; '.join(pair.void), LONGEST_REASON)}" for pair in void
    ]
    return _cut("\n".join(lines), LONGEST_SUMMARY) + "\n"


def _software(outcome: Outcome) -> list[str]:
    """What both arms ran with, and what of it differs."""
    before, after = (outcome.soft.get(arm.name, {}) for arm in outcome.arms)
    same = [f"{key} {value}" for key, value in before.items() if value and after.get(key) == value]
    lines = [f"- with {', '.join(same)}"] if same else []
    return lines + [
        f"- {key} differs: {before.get(key)} vs {after.get(key)}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
