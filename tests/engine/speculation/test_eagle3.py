"""A head in the engine drafts what it would draft if it computed every sequence again from the first token.

The tokens that come out are right whatever is drafted (`test_engine_speculation`), so here the drafts and the
head's keys are held to plain torch: over random batches, chunks, preemptions, prefix hits, forks and any
number of accepted tokens. The faults that this must find are planted below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from eagle3_fixtures import DRAFT_VOCAB, LAYOUTS, Compared, Layout, head_folder
from engine_fixtures import WordTokenizer, open_small, small_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from speculation_fixtures import acceptance, check_books
from torch import Tensor
from traffic import alone, engines, serve

from backbench.engine.engine import Engine
from backbench.engine.execution.step_buffers import StepBuffers
from backbench.engine.execution.step_shape import graph_shapes
from backbench.engine.models.eagle3 import Eagle3Head
from backbench.engine.request import SamplingParams
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import Slice, StepPlan
from backbench.engine.speculation.draft import DraftProposer
from backbench.engine.speculation.eagle3 import HiddenStateTap
from backbench.engine.speculation.speculator import Speculator

CLOSE = 1e-3
"""Of logits and keys that are sums of up to 144 fp32 products, after the target's two layers and the head's
passes; they spread over several units, and every planted fault moves them by more."""
PROMPT = list(range(30, 70))
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)


class Held(Compared):
    """An engine with a head whose every draft and key are held to plain torch."""

    def __init__(self, layout: Layout = Layout(), **changed: Any) -> None:  # noqa: B008
        folder = head_folder(small_config(), layout)
        asked = {"speculate": f"eagle3:{folder}:3", "adaptive_drafts": False, "tokenizer": WordTokenizer()}
        super().__init__(open_small(**(asked | changed)), folder, CLOSE)
        self.keys = 0
        """Slots whose keys were compared."""

    def check_keys(self) -> None:
        """The head's cached keys, of all slots that it counts, are those of the tokens that are there."""
        for sequence in self.engine.scheduler.running:
            state = sequence.proposer_state
            if state is None or state.blocks is not sequence.blocks or not state.tokens:
                continue
            known = sequence.token_ids[: state.tokens + 1]
            count = len(known) - 1
            blocks = torch.tensor(sequence.blocks)
            runner = self.proposer.head.layers[0].runner
            cached = runner.read(self.proposer.runner.caches[0], blocks)[0].flatten(0, 1)[:count]
            expected = self.plain.keys(self.plain.fuse(self.states(known[:-1])), torch.tensor(known[1:]))
            assert torch.allclose(cached, expected, rtol=0, atol=CLOSE), "a key is not that of its token"
            self.keys += count

    def step(self) -> None:
        self.engine.step()
        self.check_keys()

    def run(self, prompt: Sequence[int], params: SamplingParams = GREEDY) -> list[int]:
        """The tokens of one request, checked step by step."""
        self.engine.add_request(f"{self.engine.requests.arrivals}", prompt, params)
        found: list[int] = []
        while self.engine.has_work:
            found += [token.token_id for token in self.engine.step() if token.sequence == 0]
            self.check_keys()
        return found


def accept_any_number(engine: Engine, drawn: Any) -> None:
    """Drafts become output, as many as are drawn: a random head is seldom right, and what was accepted is
    what the head has to compute again."""
    assert engine.speculator is not None

    def outputs(part: Slice, tokens: list[int]) -> list[int]:
        count = drawn(len(part.draft))
        return [*part.draft[:count], tokens[count]]

    engine.speculator.outputs = outputs  # type: ignore[method-assign]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drafts_and_keys_are_those_of_whole_sequences(layout: str) -> None:
    compared = [0, 0]

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(engines(), st.data())
    def run(setting: dict[str, Any], data: st.DataObject) -> None:
        held = Held(Layout(layout), **setting)
        step = held.engine.step

        def checked() -> Any:
            tokens = step()
            check_books(held.engine)
            held.check_keys()
            return tokens

        held.engine.step = checked  # type: ignore[method-assign]
        for asked in serve(held.engine, data):
            asked.check()
        compared[0] += held.drafts
        compared[1] += held.keys

    run()
    assert min(compared) > 0


@pytest.mark.parametrize("layout", [Layout(), Layout("speculators", norm_before_residual=True)], ids=str)
def test_any_number_of_accepted_tokens(layout: Layout) -> None:
    held = Held(layout)
    turn = iter(range(10**6))
    accept_any_number(held.engine, lambda drafted: next(turn) % (drafted + 1))
    held.run(PROMPT)
    held.run(PROMPT[:7], SamplingParams(max_tokens=40, ignore_eos=True, n=3))
    assert held.drafts > 20 and held.keys > 100


def pad(held: Held) -> None:
    """Lay the head's steps out as captured graphs have them."""
    runner, limits = held.proposer.runner, held.proposer.limits
    runner._shapes = graph_shapes(limits.max_seqs, limits.max_step_tokens, True)
    largest = max(shape.num_tokens for shape in runner._shapes)
    tables, cpu = runner._eager.tables, torch.device("cpu")
    runner._captured = StepBuffers(limits, tables, cpu, runner.queue, largest, ids_ahead=1)


@pytest.mark.parametrize("num_prompts", [1, 5])
def test_captured_layouts_of_the_head(num_prompts: int) -> None:
    """Padding leaves nothing where a sequence's hidden states are."""
    held = Held()
    pad(held)
    turn = iter(range(10**6))
    accept_any_number(held.engine, lambda drafted: next(turn) % (drafted + 1))
    for number in range(num_prompts):
        held.engine.add_request(str(number), PROMPT[number * 3 :], GREEDY)
    while held.engine.has_work:
        held.step()
    assert held.proposer.runner.graph_misses > 0
    assert held.drafts > 20


def test_a_prefix_hit_serves_both() -> None:
    held = Held(max_step_tokens=96)
    passes: list[int] = []
    launch = held.proposer.runner.launch

    def counted(plan: StepPlan) -> Any:
        passes.append(plan.num_tokens)
        return launch(plan)

    held.proposer.runner.launch = counted  # type: ignore[method-assign]
    first = held.run(PROMPT)
    cold, _ = sum(passes), passes.clear()
    assert held.run(PROMPT) == first == alone(tuple(PROMPT), GREEDY, 0)[0]
    # All but the prompt's last block of 4 was found: 36 tokens, which neither computes again.
    assert sum(passes) == cold - 36


def test_what_was_computed_while_nothing_was_drafted_is_caught_up_with() -> None:
    held = Held(max_step_tokens=8)
    assert held.engine.speculator is not None
    choose = held.engine.speculator.choose
    held.engine.speculator.choose = lambda num_running: 0  # type: ignore[method-assign]
    held.engine.add_request("a", PROMPT, GREEDY)
    for _ in range(12):
        held.engine.step()
    assert held.drafts == 0
    held.engine.speculator.choose = choose  # type: ignore[method-assign]
    while held.engine.has_work:
        held.step()
    assert held.drafts > 0


def test_a_block_is_found_only_where_the_next_token_is_the_same() -> None:
    """The head's last key of a block depends on the token after it, which a hit must not change."""
    held, shared = Held(), PROMPT[:8]
    for token in (1, 2, 1, 2):
        held.run([*shared, token, 5, 6, 7, 8])
        held.run([*shared, token, 5])
    hits = sum(step.prefix_hit_tokens for step in held.engine.take_step_stats())
    # Of the first with each token only its first block, then what is full and not the end.
    assert hits == (0 + 8) + (4 + 8) + (12 + 8) + (12 + 8)


@pytest.mark.parametrize("draft_vocab", [None, DRAFT_VOCAB])
def test_where_noise_alone_decides_head_and_target_draw_alike(draft_vocab: int | None) -> None:
    """At such a temperature every draft comes true, but for tokens that the head cannot draft."""
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=5000.0, seed=3, n=2)
    held = Held(Layout(draft_vocab=draft_vocab))
    prompts = [PROMPT, PROMPT[:1], PROMPT[:5]]
    done = held.engine.generate(prompts, params)
    expected = [alone(tuple(prompt), params, index)[0] for prompt in prompts for index in range(2)]
    assert [one.token_ids for one in done] == expected
    drafted, accepted = acceptance(held.engine)
    assert 0 < accepted < drafted if draft_vocab else drafted == accepted > 0


def test_the_record_says_which_head() -> None:
    held = Held()
    described = held.engine.describe()["draft_model"]
    assert described["num_parameters"] == sum(
        tensor.numel() for name, tensor in held.plain.tensors.items() if name not in ("d2t", "t2d")
    )
    assert len(described["revision"]) == 16


# Planted faults: each is caught by a comparison that passes without it.


def finds_it(held: Held) -> bool:
    turn = iter(range(10**6))
    accept_any_number(held.engine, lambda drafted: next(turn) % (drafted + 1))
    try:
        held.run(PROMPT)
        held.run([*PROMPT[:8], 5, 6])
    except AssertionError:
        return True
    return False


def test_a_hidden_state_shifted_by_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not finds_it(Held())
    keep = HiddenStateTap.keep

    def shifted(self: HiddenStateTap, states: Sequence[Tensor], slots: Tensor) -> None:
        keep(self, [each.roll(1, 0) for each in states], slots)

    monkeypatch.setattr(HiddenStateTap, "keep", shifted)
    assert finds_it(Held())


def test_a_layer_too_high_is_caught() -> None:
    held = Held()
    assert held.engine.decoder.tap is not None
    held.engine.decoder.tap.layers = (1, 1, 1)
    assert finds_it(held)


def test_a_vocabulary_taken_for_the_targets_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = Eagle3Head.logits

    def ignores_d2t(self: Eagle3Head, hidden: Tensor) -> Tensor:
        self._target_ids = torch.arange(self.config.draft_vocab_size)
        return logits(self, hidden)

    monkeypatch.setattr(Eagle3Head, "logits", ignores_d2t)
    assert finds_it(Held())


def test_keys_of_drafted_tokens_kept_once_accepted_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for a model that drafts; a head computed them from its own states."""
    propose = DraftProposer.propose

    def counts_accepted(self: DraftProposer, plan: StepPlan, rooms: list[int], pool: BlockPool) -> Any:
        for part in plan.slices[: len(rooms)]:
            state = part.sequence.proposer_state
            if state is not None and state.blocks is part.sequence.blocks:
                state.tokens = max(state.tokens, part.start - 1)
        return propose(self, plan, rooms, pool)

    monkeypatch.setattr(DraftProposer, "propose", counts_accepted)
    assert finds_it(Held())


def test_keys_of_rejected_tokens_kept_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    propose = DraftProposer.propose

    def no_rollback(self: DraftProposer, plan: StepPlan, rooms: list[int], pool: BlockPool) -> Any:
        drafts = propose(self, plan, rooms, pool)
        for part, drafted in zip(plan.slices, drafts, strict=False):
            if drafted:
                part.sequence.proposer_state.tokens += len(drafted) - 1
        return drafts

    monkeypatch.setattr(DraftProposer, "propose", no_rollback)
    assert finds_it(Held())


def test_a_block_found_whatever_follows_it_is_caught() -> None:
    """Without the token after it in its hash, a block has the key of another sequence's next token."""

    def two_ways(held: Held) -> None:
        for token in (1, 2):
            held.run([*PROMPT[:8], token, 5])

    two_ways(Held())
    held = Held()
    held.engine.pool.lookahead = 0
    held.proposer._content = DraftProposer._content.__get__(held.proposer)  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        two_ways(held)


def test_a_sequence_without_a_token_before_its_last_is_not_drafted_for() -> None:
    """A prompt of one token: the target has no state yet."""
    held = Held()
    assert held.run([5]) == alone((5,), GREEDY, 0)[0]
    lengths = [step.draft_lengths for step in held.engine.take_step_stats()]
    assert lengths[0] == () and lengths[1] != ()


def test_a_head_takes_part_in_rejection_sampling() -> None:
    greedy = SamplingParams(max_tokens=20, ignore_eos=True)
    folder = head_folder(small_config())
    engine = open_small(
        speculate=f"eagle3:{folder}:3", adaptive_drafts=False, speculation_sampling="rejection"
    )
    assert engine.generate([PROMPT], greedy)[0].token_ids == alone(tuple(PROMPT), greedy, 0)[0]
    assert isinstance(engine.speculator, Speculator) and engine.speculator.rejection
