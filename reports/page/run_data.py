"""One run as the page draws it: its record, its tables and its colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from backbench.reports.page.style import RunStyle
from backbench.reports.record import RunRecord

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class RunData:
    """One run as the report sees it."""

    record: RunRecord
    style: RunStyle
    requests: pd.DataFrame
    steps: pd.DataFrame
    telemetry: pd.DataFrame
