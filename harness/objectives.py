"""Service-level objectives as they are typed: --slo ttft=0.5,tpot=0.05, or of percentiles: ttft_p95=0.5."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from backbench.errors import HarnessError

PERCENTILE = re.compile(r"(?!0+(\.0*)?$)\d{1,2}(\.\d{1,3})?")
"""What may follow ttft_p: 95, 99.9."""


def parse_slo(given: str | Mapping[str, Any]) -> dict[str, float]:
    """Read "ttft=0.5,tpot=0.05" or {"ttft": 0.5} (seconds); a name may have a percentile: ttft_p95.

    Raises HarnessError where it is malformed or limits one quantity twice.
    """
    from backbench.reports.metrics.compute import SLO_NAMES

    form = ", ".join(f"{each}=SECONDS" for each in SLO_NAMES)
    if isinstance(given, str):
        pairs = [tuple(part.strip().split("=", 1)) for part in given.split(",")]
    elif isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        raise HarnessError(f"--slo takes {form}; not {given!r}.")
    limits: dict[str, float] = {}
    for name, *value in pairs:
        quantity, _, percent = str(name).partition("_p")
        right = PERCENTILE.fullmatch(percent) if percent or str(name).endswith("_p") else True
        if quantity not in SLO_NAMES or not right or not value:
            raise HarnessError(f"--slo takes {form}; not {given!r}.")
        if quantity in per_request(limits):
            raise HarnessError(f"--slo names {quantity} twice; give one limit for it.")
        try:
            limits[name] = float(value[0])
        except (TypeError, ValueError):
            raise HarnessError(f"--slo {name} needs a number of seconds, not {value[0]!r}.") from None
        if not 0 < limits[name] < math.inf:
            raise HarnessError(f"--slo {name} must be a positive number of seconds, not {value[0]}.")
    return limits


def per_request(limits_s: Mapping[str, float]) -> dict[str, float]:
    """The limits as they apply to each request, without the percentiles of `--find-load`."""
    return {name.partition("_p")[0]: limit_s for name, limit_s in limits_s.items()}
