from __future__ import annotations

import pytest
from engine_fixtures import open_small

from backbench.engine.request import SamplingParams
from backbench.engine.scheduling.scheduler import Slice
from backbench.engine.scheduling.sequence import Sequence
from backbench.engine.speculation.asked import parse_speculation
from backbench.engine.speculation.synthetic import SyntheticProposer


@pytest.mark.parametrize(("asked", "length"), [("synthetic:2.5:4", 2.5), ("synthetic:0.9/0.5/0.1", 2.5)])
def test_the_mean_length_over_ten_thousand_steps(asked: str, length: float) -> None:
    """Within 2 %: the standard error of the mean is 1.4 / sqrt(10,000), 0.6 %."""
    speculation = parse_speculation(asked)
    proposer = SyntheticProposer(speculation.rates, 97)
    draft, steps, total = (0,) * speculation.tokens, 0, 0
    for request in range(40):
        sequence, place = Sequence(str(request), 0, [1], SamplingParams(), 0), 0
        for _ in range(250):
            accepted = proposer.accepted(Slice(sequence, 0, 1 + len(draft), 1 + len(draft), place, draft), [])
            place += accepted + 1
            total += accepted + 1
            steps += 1
    assert steps == 10_000
    assert total / steps == pytest.approx(length, rel=0.02)


def serve(**settings: int) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    engine = open_small(speculate="synthetic:2.5:4", adaptive_drafts=False, **settings)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    for name in "abcd":
        engine.add_request(name, [1, 2, 3], params)
    tokens: dict[str, list[int]] = {name: [] for name in "abcd"}
    while engine.has_work:
        for token in engine.step():
            tokens[token.request_id].append(token.token_id)
    stats = engine.take_step_stats()
    return list(tokens.values()), [step.accepted_lengths for step in stats]


def test_reproducible_whatever_the_batch() -> None:
    tokens, accepted = serve()
    assert (tokens, accepted) == serve()
    assert all(len(each) == 60 for each in tokens)
    alone, _ = serve(max_seqs=1)
    assert tokens == alone
    assert len({tuple(each) for each in tokens}) == 4, "each request has draws of its own"


def test_the_whole_engine_reaches_the_length() -> None:
    """Four outputs of 60 tokens: some 100 draws, whose mean has a standard error of 0.14."""
    _, accepted = serve()
    lengths = [count for step in accepted for count in step]
    assert 1 + sum(lengths) / len(lengths) == pytest.approx(2.5, rel=0.25)
    assert max(lengths) == 4 and min(lengths) == 0
