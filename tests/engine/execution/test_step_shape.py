"""Which shapes of steps are captured."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from backbench.engine.execution.step_shape import (
    GRAPH_PROMPT_TOKENS,
    StepShape,
    graph_shapes,
    graph_sizes,
    max_len_ladder,
)

MOST_TOKENS = GRAPH_PROMPT_TOKENS[-1]


@given(st.integers(1, 5000))
def test_graph_sizes_cover_every_batch_up_to_the_largest(max_seqs: int) -> None:
    sizes = graph_sizes(max_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(max_seqs, 1024)
    waste = [(b - a) / b for a, b in itertools.pairwise(sizes) if a >= 8]
    assert all(part <= 0.5 for part in waste)


@given(st.integers(1, 600), st.integers(1, 9000), st.booleans())
def test_captured_shapes_fit_the_engines_limits(max_seqs: int, max_step_tokens: int, mixed: bool) -> None:
    shapes = graph_shapes(max_seqs, max_step_tokens, mixed)
    assert len(shapes) == len(set(shapes))
    assert [shape.num_tokens for shape in shapes] == sorted(shape.num_tokens for shape in shapes)
    for shape in shapes:
        assert shape.num_seqs <= max_seqs
        assert shape.prompt_tokens <= max_step_tokens
        assert (shape.prompts == 0) == (shape.prompt_tokens == 0)
        assert mixed or shape.prompts == 0


@given(st.integers(1, 512), st.data())
def test_one_more_prompt_always_finds_a_shape(max_seqs: int, data: st.DataObject) -> None:
    """As in an engine that is full: a sequence ended, the next one starts."""
    live = StepShape(data.draw(st.integers(0, max_seqs - 1)), 1, data.draw(st.integers(1, MOST_TOKENS)))
    shapes = graph_shapes(max_seqs, MOST_TOKENS, mixed=True)
    assert any(shape.holds(live) for shape in shapes)


def test_a_shape_holds_smaller_ones_of_its_kind() -> None:
    shape = StepShape(16, 4, 64)
    assert shape.holds(StepShape(0, 1, 64))
    assert not shape.holds(StepShape(17, 1, 1))
    assert not shape.holds(StepShape(1, 5, 64))
    assert not shape.holds(StepShape(1, 1, 65))
    assert not shape.holds(StepShape(1)), "decodes alone have graphs of their own"
    assert not StepShape(16).holds(StepShape(1, 1, 1))


@given(st.integers(1, 200_000))
def test_the_ladder_of_lengths_descends_from_the_longest(max_len: int) -> None:
    ladder = max_len_ladder(max_len)
    assert ladder[0] == max_len
    assert ladder == sorted(set(ladder), reverse=True)
    assert ladder[-1] <= 128


@given(st.integers(1, 600), st.integers(1, 15))
def test_drafts_have_shapes_of_their_own(max_seqs: int, draft_tokens: int) -> None:
    plain = graph_shapes(max_seqs, 512, True)
    shapes = graph_shapes(max_seqs, 512, True, draft_tokens)
    added = [shape for shape in shapes if shape.query]
    assert [shape for shape in shapes if not shape.query] == plain
    assert {shape.query for shape in added} == {draft_tokens + 1}
    assert all(shape.num_samples == shape.num_tokens <= MOST_TOKENS for shape in added)
    # One sequence with any draft finds a shape, and no shape of prompts holds it, or it one of theirs.
    live = StepShape(0, 1, 2, 2)
    assert any(shape.holds(live) for shape in added)
    assert not any(shape.holds(live) for shape in plain)
    assert not any(shape.holds(StepShape(0, 1, 2)) for shape in added)
