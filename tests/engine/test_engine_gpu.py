"""On a GPU: graphs, overlap, the Triton backend and other requests change nothing about the tokens."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from eagle3_fixtures import Compared, Layout, head_folder

from backbench.backends.interface.device import detect
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.execution.device_queue import DeviceQueue
from backbench.engine.execution.runner import Runner
from backbench.engine.models.checkpoint import find_model
from backbench.engine.request import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

GREEDY = SamplingParams(max_tokens=48, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=48, ignore_eos=True, temperature=0.8, top_k=50, top_p=0.9, seed=3)


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, 4096) for _ in range(rng.randint(1, 300))] for _ in range(12)]


def tokens(
    backend: str, params: SamplingParams, dtype: torch.dtype = torch.float32, **settings: object
) -> list:
    config = EngineConfig(**({"max_seqs": 16, "max_step_tokens": 512, "num_blocks": 2048} | settings))  # type: ignore[arg-type]
    engine = Engine.open(find_model("tiny"), backend=backend, device=detect(), dtype=dtype, config=config)
    engine.warm_up(params)
    done = engine.generate(prompts(), params)
    stats = engine.take_step_stats()
    if config.graphs and backend == "triton":
        assert {step.num_prefill_tokens > 0 for step in stats if step.graph} == {True, False}
        assert engine.runner.graph_misses == 0
    assert engine.pool.num_used == 0
    return [completion.token_ids for completion in done]


@pytest.fixture(scope="module", params=[GREEDY, SEEDED], ids=["greedy", "seeded"])
def params(request: pytest.FixtureRequest) -> SamplingParams:
    return request.param


@pytest.fixture(scope="module")
def reference(params: SamplingParams) -> list:
    return tokens("torch", params, overlap=False)


def test_triton_equals_torch_in_fp32(params: SamplingParams, reference: list) -> None:
    assert tokens("triton", params) == reference


@pytest.mark.parametrize(
    "settings",
    [{"graphs": False}, {"overlap": False}, {"graphs": False, "overlap": False}, {"num_blocks": 60}],
    ids=str,
)
def test_captured_equals_eager_and_overlap_changes_nothing(
    params: SamplingParams, reference: list, settings: dict
) -> None:
    assert tokens("triton", params, **settings) == reference


def test_torch_with_overlap(params: SamplingParams, reference: list) -> None:
    assert tokens("torch", params) == reference


@dataclass
class Request:
    """One of the random traffic: when it comes, and when it is aborted, if it is."""

    prompt: list[int]
    params: SamplingParams
    step: int
    aborted_at: int | None


def traffic() -> list[Request]:
    """Forks, shared prefixes, greedy and sampled ones; some end by a stop token, some are aborted.

    The seeds are such that the two best scores of every draw are at least 8e-5 apart, where logits in fp32
    differ by 3e-6 with the order of summation. With the seeds from 0 on, one draw's were 1e-6 apart.
    """
    rng = random.Random(4)
    document = [rng.randrange(5, 4000) for _ in range(90)]
    requests = []
    for i in range(40):
        own = [rng.randrange(5, 4000) for _ in range(rng.choice([1, 5, 6, 7, 9, 15, 16, 17, 40]))]
        params = SamplingParams(
            max_tokens=rng.choice([1, 2, 24, 24]),
            temperature=rng.choice([0.0, 1.0, 1.0]),
            top_k=rng.choice([0, 40]),
            seed=100 + i,
            n=rng.choice([1, 2, 3]),
            stop_token_ids=tuple(rng.sample(range(5, 600), 120)) if i % 4 == 0 else (),
            ignore_eos=True,
        )
        step = rng.randrange(25)
        aborted_at = step + rng.randrange(1, 12) if i % 7 == 3 else None
        requests.append(Request(document[: rng.choice([0, 0, 32, 61, 90])] + own, params, step, aborted_at))
    return requests


def open_tiny(backend: str, **settings: Any) -> Engine:
    config = EngineConfig(**({"block_size": 16, "max_seqs": 12, "max_len": 160} | settings))
    source = find_model("tiny-draft")
    return Engine.open(source, backend=backend, device=detect(), dtype=torch.float32, config=config)


@pytest.fixture(scope="module")
def alone() -> Callable[[list[int], SamplingParams, int], list[int]]:
    """The tokens of one sequence of a request, served by itself one step at a time without sharing."""
    engine = open_tiny("torch", prefix_cache=False, overlap=False, num_blocks=40)
    known: dict[Any, list[int]] = {}

    def tokens_alone(prompt: list[int], params: SamplingParams, index: int) -> list[int]:
        one = replace(params, n=1, seed=params.seed + index)
        key = (tuple(prompt), one)
        if key not in known:
            known[key] = engine.generate([prompt], one)[0].token_ids
        return known[key]

    return tokens_alone


class BusyQueue(DeviceQueue):
    """Lets the device wait before everything it does, so that it is behind the host all the time."""

    def submit(self, work: Callable[[], None]) -> None:
        torch.cuda._sleep(500_000)
        super().submit(work)


@pytest.mark.parametrize("busy", [False, True], ids=["", "device behind"])
@pytest.mark.parametrize(("backend", "graphs"), [("torch", False), ("triton", False), ("triton", True)])
def test_traffic_of_every_kind_equals_each_sequence_alone(
    backend: str, graphs: bool, busy: bool, alone: Callable[[list[int], SamplingParams, int], list[int]]
) -> None:
    engine = open_tiny(backend, graphs=graphs, num_blocks=16, max_step_tokens=96, prefill_chunk=24)
    if busy:
        queue = BusyQueue(engine.selection.device.torch_device)
        engine.runner = Runner(
            engine.decoder, engine.selection.operations, engine.limits, graphs=graphs, queue=queue
        )
    for temperature, top_k in ((0.0, 0), (1.0, 0), (1.0, 40)) if graphs else ((1.0, 40),):
        engine.warm_up(SamplingParams(temperature=temperature, top_k=top_k))
    assert engine.max_steps_in_flight == 2
    requests, got = traffic(), {}
    for step in range(10**6):
        for i, request in enumerate(requests):
            if request.step == step:
                engine.add_request(str(i), request.prompt, request.params)
            if request.aborted_at == step:
                engine.abort(str(i))
        if not engine.has_work and step > 60:
            break
        for token in engine.step():
            got.setdefault((int(token.request_id), token.sequence), []).append(token.token_id)
    wrong = []
    for i, request in enumerate(requests):
        for index in range(request.params.n):
            expected = alone(request.prompt, request.params, index)
            tokens = got.get((i, index), [])
            if request.aborted_at is not None:
                expected = expected[: len(tokens)]
            if tokens != expected:
                wrong.append((i, index, tokens, expected))
    assert not wrong
    stats = engine.take_step_stats()
    assert sum(step.preemptions for step in stats) == engine.scheduler.preemptions > 0
    assert sum(step.prefix_hit_tokens for step in stats) > 0
    assert any(step.graph for step in stats) == graphs
    assert engine.runner.graph_misses == 0
    assert engine.pool.num_used == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_forks_equal_the_same_sequences_alone(
    backend: str, alone: Callable[[list[int], SamplingParams, int], list[int]]
) -> None:
    """Prompts that end inside a block, with the default switches and a large pool."""
    engine = open_tiny(backend, num_blocks=400)
    params = SamplingParams(max_tokens=12, n=3, temperature=1.0, ignore_eos=True)
    rng, wrong = random.Random(1), 0
    for _ in range(30):
        prompt = [rng.randrange(5, 4000) for _ in range(rng.choice([5, 6, 7, 9, 10, 11, 13]))]
        done = engine.generate([prompt], params)
        wrong += sum(one.token_ids != alone(prompt, params, index) for index, one in enumerate(done))
        engine.reset_prefix_cache()
    assert wrong == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_forks_in_a_pool_too_small_for_them(
    backend: str, alone: Callable[[list[int], SamplingParams, int], list[int]]
) -> None:
    """Plans without slices come between a fork and its first step."""
    engine = open_tiny(backend, num_blocks=4, max_step_tokens=12, max_seqs=4)
    params = SamplingParams(max_tokens=2, n=2, temperature=1.0, ignore_eos=True)
    prompts = [list(range(100, 136)), list(range(136, 100, -1))]
    done = engine.generate(prompts, params)
    assert [one.token_ids for one in done] == [
        alone(prompt, params, index) for prompt in prompts for index in range(2)
    ]


@pytest.mark.parametrize("graphs", [False, True], ids=["", "graphs"])
def test_each_step_is_timed_on_the_device_and_events_are_used_again(graphs: bool) -> None:
    """Stretches of one queue follow each other, so that together they are no longer than all of it."""
    config = EngineConfig(max_seqs=16, max_step_tokens=512, num_blocks=2048, graphs=graphs)
    engine = Engine.open(
        find_model("tiny"), backend="triton", device=detect(), dtype=torch.float32, config=config
    )
    engine.warm_up(GREEDY)
    engine.generate(prompts(), GREEDY)
    stats = engine.take_step_stats()
    times_ns = [step.device_ns for step in stats if step.device_ns is not None]
    assert len(times_ns) == len(stats) and min(times_ns) > 0
    assert sum(times_ns) <= stats[-1].end_ns - stats[0].start_ns
    assert len(engine.runner.queue._events) <= 2 * engine.max_steps_in_flight


@pytest.mark.parametrize("graphs", [True, False], ids=["captured", "eager"])
@pytest.mark.parametrize("speculate", ["ngram:4", "draft:tiny-draft:2"])
def test_speculation_changes_no_token(
    params: SamplingParams, reference: list, speculate: str, graphs: bool
) -> None:
    """In a pool that is short, with few sequences (each token a decode) and many (prompts of several)."""
    config = EngineConfig(
        max_seqs=16,
        max_step_tokens=512,
        num_blocks=60,
        graphs=graphs,
        speculate=speculate,
        adaptive_drafts=False,
    )
    engine = Engine.open(
        find_model("tiny"), backend="triton", device=detect(), dtype=torch.float32, config=config
    )
    engine.warm_up(params)
    done = engine.generate(prompts(), params)
    assert [completion.token_ids for completion in done] == reference
    stats = engine.take_step_stats()
    assert sum(sum(step.accepted_lengths) for step in stats) > 0
    assert any(step.graph and step.draft_lengths for step in stats) == graphs
    assert engine.runner.graph_misses == 0
    assert engine.pool.num_used == 0


@pytest.mark.parametrize("speculate", ["ngram:4", "synthetic:2.5:4"])
@pytest.mark.parametrize("count", [1, 12])
def test_steps_launched_ahead_change_no_token(params: SamplingParams, speculate: str, count: int) -> None:
    """With every guess taken, right and wrong, and with none; nothing is left closed in between."""
    config = EngineConfig(
        max_seqs=16, max_step_tokens=512, num_blocks=60, speculate=speculate, adaptive_drafts=False
    )
    engine = Engine.open(
        find_model("tiny"), backend="triton", device=detect(), dtype=torch.float32, config=config
    )
    engine.warm_up(params)
    served: dict[float, list[Any]] = {}
    for sure in (1.0, -1.0):
        engine.reset_prefix_cache()
        engine.reset_counts()
        engine.runner.ahead.sure = sure
        for i, prompt in enumerate(prompts()[:count]):
            engine.add_request(str(i), prompt, params)  # drawn acceptance depends on the name, too
        served[sure] = []
        while engine.has_work:
            served[sure] += engine.step()
        torch.cuda.synchronize()  # would wait for ever behind a closed gate
    facts = engine.describe()
    if facts["not_launched_ahead"] is not None:
        assert facts["steps_launched_ahead"] == 0
        pytest.skip(facts["not_launched_ahead"])
    assert served[-1.0] == served[1.0]
    # What a random model says may hold no n-gram twice.
    assert facts["steps_launched_ahead"] > 5 or speculate.startswith("ngram")
    steps = engine.take_step_stats()
    assert all(step.device_ns is not None and step.device_ns > 0 for step in steps)
    assert all(step.device_ns <= step.end_ns - step.start_ns + 10**6 for step in steps if step.device_ns)
    assert engine.runner.graph_misses == 0


def test_an_engine_dropped_while_the_device_waits_leaves_it_free() -> None:
    config = EngineConfig(max_seqs=4, num_blocks=200, speculate="synthetic:2.5:4", adaptive_drafts=False)
    engine = Engine.open(
        find_model("tiny"), backend="triton", device=detect(), dtype=torch.float32, config=config
    )
    engine.warm_up()
    engine.runner.ahead.sure = -1.0
    engine.add_request("a", prompts()[0], GREEDY)
    if engine.describe()["not_launched_ahead"] is not None:
        pytest.skip(engine.describe()["not_launched_ahead"])
    while engine.has_work and engine.runner.ahead.used == 0:
        engine.step()
    (under_way,) = engine._in_flight
    engine.runner.arm(under_way.step)  # as within a step that is interrupted
    assert engine.runner.ahead.armed is not None
    engine.add_request("b", prompts()[1], GREEDY)  # it still has work
    del engine
    gc.collect()
    torch.cuda.synchronize()


@pytest.mark.parametrize("graphs", [True, False], ids=["captured", "eager"])
def test_a_head_over_hidden_states_changes_no_token_and_drafts_what_it_says(
    params: SamplingParams, reference: list, graphs: bool
) -> None:
    """A random one, whose drafts are held to plain torch on the CPU where they are greedy."""
    source = find_model("tiny")
    folder = head_folder(source.config, Layout(head_dim=64))
    config = EngineConfig(
        max_seqs=16,
        max_step_tokens=512,
        num_blocks=60,
        graphs=graphs,
        speculate=f"eagle3:{folder}:3",
        adaptive_drafts=False,
    )
    engine = Engine.open(source, backend="triton", device=detect(), dtype=torch.float32, config=config)
    engine.warm_up(params)
    # fp32 sums of up to 768 products in another order, after four layers of `tiny` and up to three passes.
    held = Compared(engine, folder, close=1e-2)
    done = engine.generate(prompts(), params)
    assert [completion.token_ids for completion in done] == reference
    assert held.drafts > 100 or params.temperature > 0
    assert (held.proposer.runner.num_graphs > 0) == graphs
    assert engine.pool.num_used == 0
