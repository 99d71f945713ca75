"""What tells captured graphs apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from backbench.engine.execution.runner import Runner

INPUTS: dict[str, Any] = {
    "shape": "shape",
    "max_len": 100,
    "all_greedy": True,
    "any_filter": False,
    "any_forced": False,
    "logprobs": False,
    "candidates": 0,
}


def key(plan: Any, **flags: Any) -> Any:
    return keys(lambda batch: plan)(INPUTS | flags)


@dataclass
class Bounded:
    """A batch as far as plans are told apart by it here."""

    max_len: int


def keys(plan: Callable[[Bounded], Any]) -> Callable[[dict[str, Any]], Any]:
    """What tells inputs apart where a decoder plans so, for sequences of up to 128 and 256 tokens."""
    runner = SimpleNamespace(
        decoder=SimpleNamespace(plan=plan),
        _max_lens=[256, 128],
        _plans={},
        _batch=lambda inputs: Bounded(inputs.max_len),
    )
    return lambda inputs: Runner._graph_key(runner, SimpleNamespace(**inputs))  # type: ignore[arg-type]


def test_plans_are_made_once_for_each_length_that_is_captured_for() -> None:
    planned: list[int] = []

    def plan(batch: Bounded) -> int:
        planned.append(batch.max_len)
        return batch.max_len

    key_of, some = keys(plan), INPUTS
    found = [key_of(some | {"max_len": max_len}) for max_len in (1, 127, 128, 129, 256, 5)]
    assert planned == [128, 256]
    assert found[0] == found[1] == found[2] == found[5] != found[3] == found[4]


def test_mistake_16_every_host_integer_of_a_launch_is_in_the_key() -> None:
    """Left out, a graph captured for one split of the keys is replayed for another, and answers are wrong."""
    known = {key(plan) for plan in ((("splits", 1),), (("splits", 2),), (("splits", 1), ("splits", 1)))}
    assert len(known) == 3
    for name in ("all_greedy", "any_filter", "any_forced", "logprobs", "candidates"):
        assert key((), **{name: True}) != key((), **{name: False})
    assert key((), shape="other") != key(())
