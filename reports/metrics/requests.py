"""The request table as arrays, and what the metrics need that no table says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from backbench.errors import INVALID, ReportError
from backbench.reports.metrics.statistics import Floats

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Context:
    """What the tables do not say and the metrics need; kept in the record as `metrics.context`."""

    mode: str
    """"open", "closed" or "all_at_once"."""
    end_ns: int
    """When the replay ended, after the run's start."""
    interrupted: bool
    batch_limit: int
    """Sequences the engine may run at once."""
    concurrency: int | None = None
    gpus: int = 0
    slo_s: dict[str, float] = field(default_factory=dict)
    """Limits in seconds by name: "ttft", "tpot", "e2e"."""
    ideal_prefix_hit_ratio: float | None = None
    shape: dict[str, Any] | None = None
    """`roofline.ModelShape` as a dict."""
    peaks: dict[str, Any] = field(default_factory=dict)
    """`roofline.Peaks` as a dict."""
    steady_least_s: float = 0.0
    """What a steady state lasts at least; runs of before there was a limit have none."""
    steady_fewest_requests: int = 0
    """How many requests finish in it at least, but for a batch that starts together."""
    token_times: bool = True
    """Each token's own time is known; else, of an imported run, only that of a request's first and last."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Context:
        """The context of a stored record; raises ReportError where it is incomplete."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ReportError(
                f"The record's metrics.context is not whole: {error}.", exit_code=INVALID
            ) from None


@dataclass(frozen=True)
class Requests:
    """The request table as arrays. One entry a request; `chunk_ns` and `chunk_tokens` one array each."""

    intended_ns: Floats
    sent_ns: Floats
    """NaN where the request was never sent; likewise `first_ns` and `last_ns`."""
    first_ns: Floats
    last_ns: Floats
    prompt_tokens: Floats
    requested_tokens: Floats
    output_tokens: Floats
    """From the counts seen, or else the server's own; never from the request. NaN where neither is known."""
    completed: np.ndarray
    failed: np.ndarray
    chunk_ns: list[Floats]
    chunk_tokens: list[Floats]

    def __len__(self) -> int:
        return len(self.intended_ns)


def read_requests(frame: pd.DataFrame, context: Context) -> Requests:
    """The measured requests that were due: an interrupted run never came to the rest."""
    measured = frame[~frame["warmup"].to_numpy(dtype=bool)]
    if context.interrupted:
        due = (measured["intended_ns"] < context.end_ns) | measured["sent_ns"].notna()
        measured = measured[due]
    return _arrays(measured)


def read_with_warmup(frame: pd.DataFrame) -> Requests:
    """Every request that the target took, the warm-up's too."""
    return _arrays(frame[frame["sent_ns"].notna()])


def _arrays(frame: pd.DataFrame) -> Requests:
    counts = [
        np.array([np.nan if c is None else c for c in row], dtype=float) for row in frame["token_counts"]
    ]

    def column(name: str) -> Floats:
        return frame[name].to_numpy(dtype=np.float64, na_value=np.nan)

    seen = np.array([row.sum() for row in counts], dtype=np.float64)

    return Requests(
        intended_ns=column("intended_ns"),
        sent_ns=column("sent_ns"),
        first_ns=column("first_ns"),
        last_ns=column("last_ns"),
        prompt_tokens=column("prompt_tokens"),
        requested_tokens=column("requested_tokens"),
        output_tokens=np.where(np.isnan(seen), column("usage_tokens"), seen),
        completed=frame["finished"].to_numpy(dtype=bool),
        failed=frame["error"].notna().to_numpy(dtype=bool),
        chunk_ns=[np.asarray(row, dtype=np.float64) for row in frame["token_ns"]],
        chunk_tokens=counts,
    )
