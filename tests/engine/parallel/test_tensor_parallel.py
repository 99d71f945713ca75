"""Engines over two and four processes give the tokens of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from parallel_fixtures import BASE, MODELS, LoudSource, WrongShardSource, answers, open_on, traffic

from backbench.backends.interface.device import cpu
from backbench.engine.parallel.team import Team
from backbench.engine.request import SamplingParams
from backbench.errors import BackendError
from backbench.harness import correctness


@pytest.fixture(scope="module", params=[2, 4])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    """Started once: that takes longer than all that is done in it."""
    found = Team(request.param, cpu())
    yield found
    found.close()


def test_tokens_are_those_of_one_process(team: Team) -> None:
    """In fp32, greedy and sampled; log-probabilities differ by the order of sums alone."""
    for name, model in MODELS.items():
        source = LoudSource(model)
        with open_on(source, 1) as one, open_on(source, team.world, team) as several:
            for (tokens, logprobs), (own, own_logprobs) in zip(answers(one), answers(several), strict=True):
                assert own == tokens, name
                torch.testing.assert_close(torch.tensor(own_logprobs), torch.tensor(logprobs), msg=name)


def test_traffic_under_pressure(team: Team) -> None:
    """Preemption, forks, prefix hits, aborts and large table updates: every step reaches every rank whole."""
    source, limits = LoudSource(BASE), {"num_blocks": 40, "max_seqs": 4}
    with open_on(source, 1, **limits) as one, open_on(source, team.world, team, **limits) as several:
        for seed in range(3):
            assert traffic(several, seed) == traffic(one, seed), seed
        assert one.scheduler.preemptions == several.scheduler.preemptions > 0


def test_drafts_and_beams_reach_every_rank(team: Team) -> None:
    """Steps that verify several tokens, and those whose candidates are asked for: one process's tokens."""
    source = LoudSource(BASE)
    repeating = [[1, 2, 3, 4] * 8, [5, 6] * 9, [7] * 20]
    greedy, search = (
        SamplingParams(max_tokens=24),
        SamplingParams(max_tokens=9, beams=3, n=3, ignore_eos=True),
    )
    drafting = {"speculate": "ngram:3", "adaptive_drafts": False, "overlap": False}
    with (
        open_on(source, 1) as one,
        open_on(source, team.world, team, **drafting) as several,
    ):
        plain = [each.token_ids for each in one.generate(repeating, greedy)]
        assert [each.token_ids for each in several.generate(repeating, greedy)] == plain
        assert sum(sum(step.accepted_lengths) for step in several.take_step_stats()) > 0
        found = [each.token_ids for each in one.generate(repeating, search)]
    with open_on(source, team.world, team) as several:
        assert [each.token_ids for each in several.generate(repeating, search)] == found


def test_what_each_device_holds(team: Team) -> None:
    with open_on(LoudSource(BASE), 1) as one:
        whole = one.memory()["weights_bytes"]
    with open_on(LoudSource(BASE), team.world, team) as several:
        rows = several.memory_by_device()
    assert [row["device"] for row in rows] == ["cpu"] * team.world
    assert len({row["weights_bytes"] for row in rows}) == 1
    # Its share of everything but norms; and 64 rows of a vocabulary of 97, and one of two KV heads.
    assert whole / team.world < rows[0]["weights_bytes"] < 2 * whole / team.world


def test_a_wrong_shard_is_caught_by_the_check_of_results(team: Team) -> None:
    right = correctness.check(open_on(LoudSource(BASE), team.world, team), LoudSource(BASE))
    assert right["passed"], right.get("reason")
    wrong = correctness.check(open_on(WrongShardSource(BASE), team.world, team), LoudSource(BASE))
    assert wrong["passed"] is False
    assert "log-probabilities differ" in wrong["reason"]


def test_what_cannot_be_divided_is_refused_before_any_process_starts() -> None:
    with pytest.raises(BackendError, match="8 query heads and 2 KV heads cannot be divided among 3 devices"):
        open_on(LoudSource(BASE), 3)
