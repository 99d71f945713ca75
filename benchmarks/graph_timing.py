"""Published rows: what one is, and writing them down beside the conditions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton


@dataclass(frozen=True)
class Row:
    """One measured figure."""

    name: str
    value: float
    unit: str
    spread: float
    """Half the range between the 10th and the 90th percentile of the replays, in `unit`."""


def conditions() -> dict[str, str]:
    """What the figures were measured on and with."""
    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "method": "median of replays of one captured graph of back-to-back calls on rotating buffers",
    }


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows` and the conditions as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"conditions": conditions(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(record, indent=1) + "\n")
