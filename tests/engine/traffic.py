"""Random traffic of every kind at once, and what each of its sequences gives when it is served alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from engine_fixtures import VOCAB, WordTokenizer, open_small
from hypothesis import strategies as st

from backbench.engine.engine import Engine
from backbench.engine.request import SamplingParams

LONGEST = 24


@cache
def lone_engine() -> Engine:
    return open_small(prefix_cache=False, tokenizer=WordTokenizer())


@cache
def alone(prompt: tuple[int, ...], params: SamplingParams, index: int) -> tuple[list[int], str | None]:
    """Tokens and finish reason of sequence `index` of a request, served by itself without sharing."""
    one = replace(params, n=1, seed=params.seed + index)
    done = lone_engine().generate([prompt], one)[0]
    return done.token_ids, done.finish_reason


@dataclass
class Asked:
    prompt: tuple[int, ...]
    params: SamplingParams
    aborted: bool = False
    got: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)

    def check(self) -> None:
        for index in range(self.params.n):
            tokens, reason = alone(self.prompt, self.params, index)
            if not self.aborted:
                assert self.got.get(index) == tokens
                assert self.reasons[index] == reason
            else:
                got = self.got.get(index, [])
                assert got == tokens[: len(got)]


PROMPTS = st.one_of(
    # Few tokens and few lengths: requests share prefixes, whole blocks of them and parts.
    st.integers(1, LONGEST).map(lambda length: tuple((3 * i) % VOCAB for i in range(length))),
    st.lists(st.integers(0, 3), min_size=1, max_size=LONGEST).map(tuple),
)


@st.composite
def params(draw: st.DrawFn, lengths: tuple[int, ...]) -> SamplingParams:
    """Few choices, so that what a sequence gives alone is often known already."""
    sampled = draw(st.booleans())
    first, second = draw(st.sampled_from([(1, 2), (7, 1), (4, 4)]))
    filters = draw(st.sampled_from([{}, {"top_k": 20}, {"top_p": 0.9, "min_p": 0.05}])) if sampled else {}
    return SamplingParams(
        max_tokens=draw(st.sampled_from(lengths)),
        temperature=1.0 if sampled else 0.0,
        **filters,
        seed=draw(st.integers(0, 1)),
        n=draw(st.sampled_from([1, 1, 2, 3])),
        # A digit that most outputs hold sooner or later.
        stop=(f"{first}", f"{second}9") if draw(st.integers(0, 3)) == 0 else (),
        ignore_eos=True,
        logprobs=draw(st.booleans()),
    )


@st.composite
def engines(draw: st.DrawFn) -> dict[str, Any]:
    return {
        # From the smallest that serves every request to one that is never short.
        "num_blocks": draw(st.sampled_from([10, 12, 16, 200])),
        "max_seqs": draw(st.integers(2, 6)),
        "max_step_tokens": draw(st.sampled_from([3, 7, 40])),
        "prefill_chunk": draw(st.sampled_from([None, 2, 5])),
        "prefix_cache": draw(st.booleans()),
    }


def serve(engine: Engine, data: st.DataObject, lengths: tuple[int, ...] = (1, 2, 3, 9)) -> list[Asked]:
    """Requests that come and go while others run; lengths: of their outputs, one of these."""
    everyone: dict[str, Asked] = {}
    to_come = data.draw(st.integers(1, 7))
    while to_come or engine.has_work:
        action = data.draw(st.sampled_from(["add", "step", "step", "step", "abort"]))
        if action == "add" and to_come:
            to_come -= 1
            asked = Asked(data.draw(PROMPTS), data.draw(params(lengths)))
            name = str(len(everyone))
            everyone[name] = asked
            engine.add_request(name, asked.prompt, asked.params)
        elif action == "abort" and everyone and data.draw(st.integers(0, 3)) == 0:
            name = data.draw(st.sampled_from(sorted(everyone)))
            everyone[name].aborted |= len(everyone[name].reasons) < everyone[name].params.n
            engine.abort(name)
        elif engine.has_work:
            for token in engine.step():
                asked = everyone[token.request_id]
                asked.got.setdefault(token.sequence, []).append(token.token_id)
                if token.finish_reason is not None:
                    asked.reasons[token.sequence] = token.finish_reason
        engine.pool.check()
    return list(everyone.values())
