"""What tells captured graphs apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from backbench.engine.execution.runner import Runner


def key(plan: Any, **flags: bool) -> Any:
    inputs = {
        "shape": "shape",
        "all_greedy": True,
        "any_filter": False,
        "any_forced": False,
        "logprobs": False,
        "candidates": 0,
    }
    runner = SimpleNamespace(decoder=SimpleNamespace(plan=lambda batch: plan))
    return Runner._graph_key(runner, SimpleNamespace(**(inputs | flags)), None)  # type: ignore[arg-type]


def test_mistake_16_every_host_integer_of_a_launch_is_in_the_key() -> None:
    """Left out, a graph captured for one split of the keys is replayed for another, and answers are wrong."""
    known = {key(plan) for plan in ((("splits", 1),), (("splits", 2),), (("splits", 1), ("splits", 1)))}
    assert len(known) == 3
    for name in ("all_greedy", "any_filter", "any_forced", "logprobs", "candidates"):
        assert key((), **{name: True}) != key((), **{name: False})
    assert key((), shape="other") != key(())
