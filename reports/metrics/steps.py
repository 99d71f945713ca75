"""What the table of steps says about time: each step's own, and which decodes' time is theirs alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from backbench.reports.metrics.window import Window


def step_times_ns(steps: pd.DataFrame, window: Window | None = None) -> np.ndarray:
    """What each step added to the run, f64[steps]: from the later of its start and its predecessor's end.

    With overlap a step is scheduled while the one before still runs; that stretch belongs to the latter.
    With a window, only what lies inside it: a step may have begun before the run did.
    """
    start = steps["start_ns"].to_numpy(dtype=np.float64)
    end = steps["end_ns"].to_numpy(dtype=np.float64)
    before = np.concatenate(([-np.inf], end[:-1]))
    if window is not None:
        start, end = np.maximum(start, window.start_ns), np.minimum(end, window.end_ns)
    times: np.ndarray = np.maximum(end - np.maximum(start, before), 0.0)
    return times


def plain_decodes(steps: pd.DataFrame) -> np.ndarray:
    """Which steps are measured ones of decodes alone, seen to end when they did: bool[steps].

    A host that launches a step with prompts kernel by kernel, while a decode runs, sees the decode's end
    only afterwards: that time is the launch's.
    """
    start, end = steps["start_ns"].to_numpy(), steps["end_ns"].to_numpy()
    prompts = (steps["num_prefill_tokens"] > 0).to_numpy(bool)
    launched_singly = prompts & ~steps["graph"].to_numpy(bool)
    seen_late = np.zeros(len(steps), dtype=bool)
    seen_late[:-1] = launched_singly[1:] & (start[1:] < end[:-1])
    decodes: np.ndarray = ~prompts & (steps["num_decodes"] > 0).to_numpy(bool) & (end > 0) & ~seen_late
    return decodes


def decode_times_ns(steps: pd.DataFrame) -> tuple[np.ndarray, bool]:
    """What each of the `plain_decodes` took, f64, and whether that is the device's own time.

    The device's events say it without the host's delays; where a step lacks them, the host's stamps do.
    """
    chosen = plain_decodes(steps)
    own: np.ndarray = steps["device_ns"].to_numpy(dtype=np.float64, na_value=np.nan)[chosen]
    on_device = len(own) > 0 and not np.isnan(own).any()
    return (own, True) if on_device else (step_times_ns(steps)[chosen], False)
