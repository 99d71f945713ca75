"""The asyncio front: streams join a running batch, and leaving one aborts its request."""

from __future__ import annotations

import asyncio
import time

import pytest
from engine_fixtures import open_small

from backbench.engine.async_engine import AsyncEngine, StepReport
from backbench.engine.request import SamplingParams
from backbench.errors import EngineError

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


async def collect(front: AsyncEngine, prompt: list[int], params: SamplingParams = PARAMS) -> list[int]:
    return [token.token_id async for token in front.stream(prompt, params)]


def test_concurrent_streams_get_their_own_tokens() -> None:
    engine = open_small()
    asked = [[1, 2, 3], [4, 5], [6] * 20]
    expected = [done.token_ids for done in engine.generate(asked, PARAMS)]

    async def main() -> list[list[int]]:
        async with AsyncEngine(engine) as front:
            first = asyncio.create_task(collect(front, asked[0]))
            await asyncio.sleep(0.01)
            return [await first, *await asyncio.gather(*(collect(front, prompt) for prompt in asked[1:]))]

    assert asyncio.run(main()) == expected


def test_leaving_a_stream_aborts_its_request() -> None:
    engine = open_small()

    async def main() -> None:
        async with AsyncEngine(engine) as front:
            stream = front.stream([1, 2, 3], SamplingParams(max_tokens=100, ignore_eos=True))
            async for _ in stream:
                break
            await stream.aclose()
            assert len(await collect(front, [4, 5])) == 12

    asyncio.run(main())
    assert not engine.has_work
    assert engine.pool.num_used == 0


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([], PARAMS, "empty prompt"),
        (["x"], PARAMS, "must be token ids"),
        ([1], SamplingParams(max_tokens=2, forced_tokens=(1, 10**6)), "outside the vocabulary"),
    ],
)
def test_a_refused_request_raises_in_its_own_stream_only(
    prompt: list[int], params: SamplingParams, said: str
) -> None:
    engine = open_small()

    async def main() -> None:
        async with AsyncEngine(engine) as front:
            fine = asyncio.create_task(collect(front, [1, 2]))
            with pytest.raises(EngineError, match=said):
                await collect(front, prompt, params)
            assert len(await fine) == 12

    asyncio.run(main())


def test_a_failed_step_reaches_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_small()

    def broken(**how: bool) -> None:
        raise EngineError("the device is gone")

    monkeypatch.setattr(engine, "step", broken)

    async def main() -> None:
        async with AsyncEngine(engine) as front:
            results = await asyncio.gather(collect(front, [1]), collect(front, [2]), return_exceptions=True)
            assert [str(result) for result in results] == ["the device is gone"] * 2

    asyncio.run(main())


def test_streaming_needs_the_context_manager() -> None:
    front_error = "async with AsyncEngine"

    async def main() -> None:
        with pytest.raises(EngineError, match=front_error):
            await collect(AsyncEngine(open_small()), [1])

    asyncio.run(main())


def test_whatever_adding_a_request_raises_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_small()
    add = engine.add_request

    def adding(request_id: str, prompt: list[int], params: SamplingParams) -> None:
        if prompt == [9]:
            raise ZeroDivisionError("a defect")
        add(request_id, prompt, params)

    monkeypatch.setattr(engine, "add_request", adding)

    async def main() -> None:
        async with AsyncEngine(engine) as front:
            fine = asyncio.create_task(collect(front, [1, 2]))
            with pytest.raises(ZeroDivisionError):
                await collect(front, [9])
            assert len(await fine) == 12

    asyncio.run(main())


def test_leaving_the_context_serves_live_streams_to_their_end() -> None:
    engine = open_small()

    async def main() -> list[int]:
        async with AsyncEngine(engine) as front:
            task = asyncio.create_task(collect(front, [1, 2], SamplingParams(max_tokens=80, ignore_eos=True)))
            await asyncio.sleep(0.02)
        with pytest.raises(EngineError, match="not running"):
            await collect(front, [3])
        return await asyncio.wait_for(task, 20)

    assert len(asyncio.run(main())) == 80
    assert not engine.has_work


def test_an_exception_that_leaves_the_context_aborts_live_streams() -> None:
    engine = open_small()

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            async with AsyncEngine(engine) as front:
                forever = SamplingParams(max_tokens=120, ignore_eos=True, n=3)
                task = asyncio.create_task(collect(front, [1, 2], forever))
                await asyncio.sleep(0.02)
                raise ZeroDivisionError
        with pytest.raises(EngineError, match="left before this stream had all its tokens"):
            await asyncio.wait_for(task, 20)

    asyncio.run(main())
    assert not engine.has_work
    assert engine.pool.num_used == 0


def test_requests_served_together_join_the_same_step() -> None:
    engine = open_small()
    asked = {"a": [1, 2, 3], "b": [4, 5]}
    expected = [done.token_ids for done in engine.generate(asked.values(), PARAMS)]
    reports: list[StepReport] = []

    async def main() -> dict[str, list[int]]:
        found: dict[str, list[int]] = {name: [] for name in asked}
        async with AsyncEngine(engine, reports.append) as front:
            with front.serve(asked, PARAMS) as tokens:
                async for token in tokens:
                    found[token.request_id].append(token.token_id)
        return found

    engine.take_step_stats()
    assert list(asyncio.run(main()).values()) == expected
    assert [report.started for report in reports if report.started] == [["a", "b"]]
    assert sum(len(report.tokens) for report in reports) == 24
    assert [stats.num_seqs for report in reports for stats in report.stats] == [2] * 12


def test_one_request_that_cannot_be_served_takes_the_others_along() -> None:
    engine = open_small()

    async def main() -> None:
        async with AsyncEngine(engine) as front:
            both = front.serve({"a": [1], "b": []}, PARAMS)
            with both as tokens, pytest.raises(EngineError, match="empty prompt"):
                await anext(tokens)
            again = front.serve({"c": [2]}, PARAMS)
            with front.serve({"c": [1]}, PARAMS), pytest.raises(EngineError, match="already being served"):
                again.__enter__()

    asyncio.run(main())
    assert not engine.has_work and engine.pool.num_used == 0


def test_a_request_starts_when_it_leaves_the_queue() -> None:
    engine = open_small(max_seqs=1)
    reports: list[StepReport] = []

    async def main() -> None:
        async with AsyncEngine(engine, reports.append) as front:
            with front.serve({"a": [1], "b": [2], "c": [3]}, PARAMS) as tokens:
                async for _ in tokens:
                    pass

    asyncio.run(main())
    assert [report.started for report in reports if report.started] == [["a"], ["b"], ["c"]]


def test_a_busy_event_loop_holds_no_step() -> None:
    engine = open_small()

    async def main() -> None:
        async with AsyncEngine(engine) as front:
            task = asyncio.create_task(collect(front, [1, 2]))
            await asyncio.sleep(0)
            time.sleep(0.5)  # nothing else runs in the event loop
            assert not engine.has_work
            assert len(await task) == 12

    asyncio.run(main())
