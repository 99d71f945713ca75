"""What an experiment measures: its limits, what it is, its target, its memory and its check of results.

Each subject is one file here. Its class is made from a run's options without loading anything; the
experiment (`harness.experiment`) then calls the methods below in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from backbench.harness.memory import Readings
from backbench.harness.replay import Replay
from backbench.harness.sensors.telemetry import Sensor
from backbench.harness.subjects.target import Target
from backbench.workloads.request import Workload

if TYPE_CHECKING:
    from backbench.engine.request import StepStats


@dataclass(frozen=True)
class Limits:
    """What a workload is made for; known before anything is loaded."""

    vocab_size: int
    """Token ids are below it."""
    max_len: int
    """Tokens of a prompt and its output together."""
    num_requests: int
    """Where nothing was asked for: a run of about a minute."""
    concurrency: int
    tokenize: Callable[[str], list[int]] | None = None
    """Text to token ids, called only where a workload holds text; None = the model has no tokenizer."""
    tokenize_chat: Callable[[list[dict[str, str]]], list[int] | None] | None = None
    """Messages to a prompt by the model's chat template; it returns None where there is no template."""


@dataclass(frozen=True)
class Facts:
    """What is measured, as JSON can hold it: sections of the record, and what the numbers need.

    Of what a subject cannot know it says why: a section is then {"reason": ...}.
    """

    model: dict[str, Any]
    backend: dict[str, Any]
    system: dict[str, Any]
    warm_up_s: float = 0.0
    batch_limit: int = 0
    """Sequences that may run at once."""
    block_size: int | None = None
    """Tokens a KV block holds; None = no prefix can be hit, or nothing is known of it."""
    gpus: int = 0
    shape: dict[str, Any] | None = None
    """`reports.metrics.roofline.ModelShape` as a dict; None = no roofline."""
    peaks: dict[str, Any] = field(default_factory=dict)
    """`reports.metrics.roofline.Peaks` as a dict."""
    idle_power_w: float | None = None


class ObservedTarget(Target, Protocol):
    """A target that also says how it is doing."""

    steps: list[StepStats]
    """Statistics of every step so far; empty where the subject has no steps."""

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...


class Subject(Protocol):
    """What is measured."""

    @property
    def clock(self) -> Callable[[], int]:
        """The clock (ns) of everything that is stamped: the replay, the target and the telemetry."""

    def limits(self) -> Limits:
        """What a workload for it may hold."""

    def prepare(self, workload: Workload, stage: Callable[[str], None]) -> None:
        """Load what is measured, refuse a workload it can never serve (HarnessError), and warm up."""

    @property
    def loaded(self) -> bool:
        """Whether what `prepare` has loaded is still there; where it is not, `prepare` loads it again."""

    def facts(self) -> Facts:
        """What it is; after `prepare`."""

    def settings(self) -> dict[str, Any]:
        """The record's `engine` section: every setting, and the counts of the run since `start`."""

    def sensors(self) -> tuple[list[Sensor], list[str]]:
        """Fresh sensors of one run, and why others are missing."""

    def start(self) -> ObservedTarget:
        """The target of a new run: caches cold, and peaks and counts of what was before forgotten."""

    def finish(self, done: Replay, stage: Callable[[str], None]) -> dict[str, Any]:
        """Close what the run had open; returns the record's `target` section. Never raises BackbenchError."""

    def memory(self, reachable: bool = True) -> Readings:
        """Asked at a run's end, before anything else uses memory; not `reachable` after a device fault."""

    def check(self, workload: Workload) -> dict[str, Any]:
        """The record's `correctness` section; `passed` is None, with a reason, where that is unknown. May
        give back what was loaded."""

    def accuracy(self) -> dict[str, Any]:
        """The record's `accuracy` section: what quantization costs, or the `reason` why that is unknown."""
