"""Whether the next step is worth a guess; that armed steps are right is tested through the engine."""

from __future__ import annotations

from typing import Any, cast

from backbench.engine.execution.ahead import ALIKE, Ahead, Armed


class Gate:
    def __init__(self) -> None:
        self.closed = True

    def open(self) -> None:
        self.closed = False


def arm(ahead: Ahead) -> Gate:
    gate = Gate()
    ahead.armed = Armed(*cast("Any", (None, None, None)), gate=gate, host_ns=0)
    return gate


def seen(ahead: Ahead, graph: object, times: int) -> list[bool]:
    found = []
    for _ in range(times):
        ahead.saw(graph)
        found.append(ahead.likely)
    return found


def test_a_graph_is_expected_again_after_so_many_steps_alike() -> None:
    ahead = Ahead()
    assert not ahead.likely
    assert seen(ahead, "a", ALIKE + 3) == [False] * ALIKE + [True] * 3
    assert seen(ahead, "b", ALIKE + 1) == [False] * ALIKE + [True]


def test_steps_without_a_graph_are_never_expected() -> None:
    assert not any(seen(Ahead(), None, 3 * ALIKE))


def test_a_wrong_guess_starts_over_and_both_open_the_gate() -> None:
    ahead = Ahead()
    seen(ahead, "a", ALIKE + 1)
    gate = arm(ahead)
    ahead.use()
    assert (gate.closed, ahead.armed, ahead.used, ahead.likely) == (False, None, 1, True)
    gate = arm(ahead)
    ahead.waste()
    assert (gate.closed, ahead.armed, ahead.wasted, ahead.likely) == (False, None, 1, False)
    assert seen(ahead, "a", ALIKE) == [False] * (ALIKE - 1) + [True]
    ahead.reset_counts()
    assert (ahead.used, ahead.wasted) == (0, 0)
