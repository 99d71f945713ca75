"""Whether the next step is worth a guess; that armed steps are right is tested through the engine."""

from __future__ import annotations

from typing import Any, cast

from backbench.engine.execution.ahead import MEMORY, Ahead, Armed


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


def test_a_graph_is_expected_again_where_most_steps_were_like_the_one_before() -> None:
    ahead = Ahead()
    assert not ahead.likely
    assert seen(ahead, "a", 7) == [False] * 4 + [True] * 3


def test_the_end_of_an_answer_does_not_make_the_next_unlikely() -> None:
    """Its last steps have fewer tokens, each its own graph."""
    ahead = Ahead()
    seen(ahead, "long", 50)
    assert seen(ahead, "short", 1) == [True]
    assert seen(ahead, "long", 50) == [True] * 50


def test_graphs_that_take_turns_are_not_expected() -> None:
    """Also where each comes twice: a guess in two is wrong."""
    ahead = Ahead()
    seen(ahead, "a", 50)
    found = [likely for _ in range(MEMORY) for graph in "ab" for likely in seen(ahead, graph, 2)]
    assert not any(found[8:])


def test_steps_without_a_graph_are_never_expected() -> None:
    assert not any(seen(Ahead(), None, 3 * MEMORY))


def test_wrong_guesses_end_them_and_each_opens_the_gate() -> None:
    ahead = Ahead()
    seen(ahead, "a", MEMORY)
    gate = arm(ahead)
    ahead.use()
    assert (gate.closed, ahead.armed, ahead.used, ahead.likely) == (False, None, 1, True)
    gate = arm(ahead)
    ahead.waste()
    assert (gate.closed, ahead.armed, ahead.wasted, ahead.likely) == (False, None, 1, True)
    for _ in range(3):
        arm(ahead)
        ahead.waste()
    assert not ahead.likely
    assert seen(ahead, "a", 2 * MEMORY)[-1], "it comes back"
    ahead.reset_counts()
    assert (ahead.used, ahead.wasted) == (0, 0)
