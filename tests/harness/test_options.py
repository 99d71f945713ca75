"""What the edge refuses."""

from __future__ import annotations

import pytest

from backbench.errors import HarnessError
from backbench.harness.options import RunOptions, parse_slo


def test_slo() -> None:
    assert parse_slo("ttft=0.5, tpot=0.05") == {"ttft": 0.5, "tpot": 0.05}


@pytest.mark.parametrize(
    "text", ["ttft", "p99=1", "ttft=fast", "ttft=0", "ttft=-1", "tpot=inf", "ttft=nan", ""]
)
def test_bad_slo(text: str) -> None:
    with pytest.raises(HarnessError, match="--slo"):
        parse_slo(text)


@pytest.mark.parametrize(("field", "value"), [("warmup", -1), ("repeat", 0), ("seed", -1)])
def test_bad_options(field: str, value: int) -> None:
    with pytest.raises(HarnessError, match=f"--{field}"):
        RunOptions(workload="sharegpt", backend="torch", **{field: value})
