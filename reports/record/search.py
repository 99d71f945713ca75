"""The file beside an experiment's that says what a search for the highest load found, probe by probe."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backbench.errors import ReportError, shown
from backbench.reports.metrics.statistics import wilson
from backbench.reports.record.bundle import is_file, read_object

SEARCH_FILE = "search.json"
SEARCH_VERSION = 1
HOLDS, FAILS, UNCLEAR = "holds", "fails", "unclear"
UNITS = {"rate": "req/s", "concurrency": "at once"}
"""What was varied -> the words after its value."""


@dataclass(frozen=True)
class Limit:
    """At least a share `level` of the requests within `limit_s`: that percentile is below the limit."""

    quantity: str
    """ttft, tpot or e2e."""
    level: float
    limit_s: float

    @property
    def name(self) -> str:
        """ "ttft_p95", as it is asked for."""
        return f"{self.quantity}_p{100 * self.level:.6g}"


@dataclass(frozen=True)
class Probe:
    """One load, one run."""

    run: str
    """Its directory inside the search's."""
    load: float
    met: dict[str, tuple[int, int]]
    """Limit's name -> requests that met it, and requests that it applies to; failures miss."""
    verdict: str
    why: str = ""
    """Of an unclear one."""


@dataclass(frozen=True)
class Search:
    """What was asked, and the probes in the order they ran."""

    path: Path
    varied: str
    """"rate" or "concurrency"."""
    limits: tuple[Limit, ...]
    probes: tuple[Probe, ...] = ()

    @property
    def held(self) -> Probe | None:
        """The highest load that holds below every one that does not."""
        over = self.exceeded
        found = [
            each for each in self.probes if each.verdict == HOLDS and (not over or each.load < over.load)
        ]
        return max(found, key=lambda each: each.load, default=None)

    @property
    def exceeded(self) -> Probe | None:
        """The lowest load that does not hold."""
        found = [each for each in self.probes if each.verdict != HOLDS]
        return min(found, key=lambda each: each.load, default=None)

    def words(self, load: float) -> str:
        """ "12.5 req/s", "8 at once"."""
        return f"{load:.4g} {UNITS[self.varied]}"

    def share(self, probe: Probe, limit: Limit) -> str:
        """ "98.5 % (96.9-99.3)": who met the limit, with Wilson's interval."""
        met, due = probe.met[limit.name]
        low, high = wilson(met, due)
        return f"{100 * met / due:.1f} % ({100 * low:.1f}–{100 * high:.1f})" if due else "applies to none"

    def conclusion(self) -> str:
        """The answer in a sentence."""
        asked = ", ".join(f"{each.name} {each.limit_s:g} s" for each in self.limits)
        held, over = self.held, self.exceeded
        if held is None:
            tried = f"; it does not at {self.words(over.load)}, the lowest tried" if over else ""
            return f"No load holds {asked}{tried}."
        above = f"{self.words(over.load)} {_does(over)}" if over else "none higher was tried"
        return f"The highest load that holds {asked} is {self.words(held.load)}; {above}."

    def with_probe(self, probe: Probe) -> Search:
        """And one more."""
        return replace(self, probes=(*self.probes, probe))

    def as_json(self) -> dict[str, Any]:
        """What search.json holds."""
        held = self.held
        content = asdict(self) | {
            "schema_version": SEARCH_VERSION,
            "conclusion": self.conclusion(),
            "highest_load": held.load if held else None,
        }
        del content["path"]
        return content

    def write(self) -> None:
        """Write search.json; a reader sees the old file or the new one, never a part."""
        temporary = self.path / f".{SEARCH_FILE}.tmp"
        try:
            temporary.write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
            temporary.replace(self.path / SEARCH_FILE)
        except OSError as error:
            raise ReportError(f"Cannot write {self.path / SEARCH_FILE}: {error.strerror}.") from None


def _does(probe: Probe) -> str:
    return "does not" if probe.verdict == FAILS else f"is unclear: {probe.why}"


def is_search(path: Path) -> bool:
    """Whether the experiment at `path` was a search."""
    return is_file(path / SEARCH_FILE)


def read_search(path: Path) -> Search:
    """The search at `path`. Raises ReportError where search.json cannot be read or is none."""
    file = path / SEARCH_FILE
    data = read_object(file, "search", SEARCH_VERSION)
    try:
        limits = tuple(Limit(**each) for each in data["limits"])
        probes = tuple(_probe(each, limits) for each in data["probes"])
        if data["varied"] not in UNITS:
            raise ValueError(f"varied {data['varied']}")
        return Search(path, data["varied"], limits, probes)
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{file} is no search as Backbench writes it ({shown(str(error))}).") from None


def _probe(data: dict[str, Any], limits: tuple[Limit, ...]) -> Probe:
    met = {each.name: (int(data["met"][each.name][0]), int(data["met"][each.name][1])) for each in limits}
    if data["verdict"] not in (HOLDS, FAILS, UNCLEAR):
        raise ValueError(f"verdict {data['verdict']}")
    return Probe(str(data["run"]), float(data["load"]), met, data["verdict"], str(data["why"]))
