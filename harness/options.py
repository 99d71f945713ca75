"""What one `bench run` was asked for, checked at the edge."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backbench.errors import HarnessError
from backbench.reports.metrics.compute import SLO_NAMES


@dataclass(frozen=True)
class RunOptions:
    """One experiment. None = decided from the workload, the model and the device, and then recorded."""

    workload: str
    backend: str
    model: str = "tiny"
    load: dict[str, Any] = field(default_factory=dict)
    """Fields of `workloads.options.WorkloadOptions` that were set: the rate, the concurrency, ..."""
    seed: int = 0
    warmup: int | None = None
    """Warm-up requests before the measured ones."""
    repeat: int = 1
    out: Path | None = None
    slo_s: dict[str, float] = field(default_factory=dict)
    dtype: str | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    """Operation -> backend that serves it instead."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Fields of `engine.config.EngineConfig` that were set."""
    interpret: bool = False
    command: str = ""
    """As typed, redacted."""

    def __post_init__(self) -> None:
        if self.warmup is not None and self.warmup < 0:
            raise HarnessError(f"--warmup must be 0 or more, not {self.warmup}.")
        if self.repeat < 1:
            raise HarnessError(f"--repeat must be at least 1, not {self.repeat}.")
        if self.seed < 0:
            raise HarnessError(f"--seed must be 0 or more, not {self.seed}.")


def parse_slo(text: str) -> dict[str, float]:
    """Read "ttft=0.5,tpot=0.05" (seconds) as a dict; raises HarnessError where it is malformed."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in SLO_NAMES or not equals:
            raise HarnessError(
                f"--slo takes {', '.join(f'{each}=SECONDS' for each in SLO_NAMES)}; not {part!r}."
            )
        try:
            limits[name] = float(value)
        except ValueError:
            raise HarnessError(f"--slo {name} needs a number of seconds, not {value!r}.") from None
        if not 0 < limits[name] < float("inf"):
            raise HarnessError(f"--slo {name} must be a positive number of seconds, not {value}.")
    return limits
