"""What speculation is worth: plain and speculating engines side by side, in one process, taking turns.

    python benchmarks/speculation.py                  the CPU: `tiny`, repetitive text and other
    python benchmarks/speculation.py --device-rows    a GPU: random weights, acceptance drawn (no accuracy)
    python benchmarks/speculation.py --layouts        a GPU: the two layouts of captured steps with drafts
    python benchmarks/speculation.py --check          the same tokens in fp32; on a GPU captured and eager

A row is the time of all steps without prompts, plain over speculating, for the same requests; both engines
share their weights, are warmed up, and run in turns, a cold prefix cache each time. Drawn acceptance runs
every pass and pays for looking n-grams up. Absolute times depend on the machine; the ratios are the result.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from backbench.backends.interface.device import detect
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.perplexity import split_corpus, topics_corpus
from backbench.engine.request import SamplingParams, StepStats

INPUT, OUTPUT = 512, 256
DEVICE_ROWS = {"shape:qwen3-0.6b": (1, 64, 256), "shape:qwen3-8b": (1,)}
"""Model -> batch sizes."""
ASKED_LENGTH = 2.5
SYNTHETIC = f"synthetic:{ASKED_LENGTH}:4"
CPU_ROWS = (
    ("ngram:4", 0.0, "greedy, which repeats itself"),
    ("draft:tiny-draft:1", 0.0, "greedy"),
    ("draft:tiny-draft:2", 0.0, "greedy"),
    ("draft:tiny-draft:1", 1.0, "sampled"),
    ("ngram:4", 1.0, "sampled, which does not repeat"),
)
"""What is drafted, the temperature, and what the text is like."""


@dataclass
class Served:
    """What serving some requests once took, and its steps."""

    seconds: float
    tokens: list[list[int]]
    steps: list[StepStats]

    @property
    def decode_s(self) -> float:
        """Time of the steps that computed no prompt."""
        total, before = 0, 0
        for step in self.steps:
            if not step.num_prefill_tokens:
                total += step.end_ns - max(step.start_ns, before)
            before = step.end_ns
        return total / 1e9


def tokens_per_s(steps: list[StepStats], batch: int) -> float:
    """Of the decode-only steps in which all `batch` sequences still run: no tail of the unlucky ones."""
    seconds, tokens, before = 0.0, 0, 0
    for step in steps:
        if not step.num_prefill_tokens and step.num_seqs == batch:
            seconds += (step.end_ns - max(step.start_ns, before)) / 1e9
            tokens += step.num_seqs + sum(step.accepted_lengths)
        before = step.end_ns
    return tokens / seconds


def serve(engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> Served:
    """All requests at once on an idle, cold engine."""
    engine.reset_prefix_cache()
    engine.take_step_stats()
    gc.collect()
    tokens: list[list[int]] = [[] for _ in prompts]
    start = time.perf_counter()
    for index, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(index), prompt, each)
    while engine.has_work:
        for token in engine.step():
            tokens[int(token.request_id)].append(token.token_id)
    return Served(time.perf_counter() - start, tokens, engine.take_step_stats())


def params_of(count: int, outputs: int, temperature: float = 0.0, **more: Any) -> list[SamplingParams]:
    return [
        SamplingParams(max_tokens=outputs, temperature=temperature, seed=seed, ignore_eos=True, **more)
        for seed in range(count)
    ]


def side_by_side(
    name: str,
    plain: Engine,
    drafting: Engine,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    repeats: int,
) -> dict[str, Any]:
    """One row: the engines take turns, plain first in one turn and last in the next."""
    seen: dict[str, list[Served]] = {"plain": [], "drafting": []}
    ahead = drafting.runner.ahead
    ahead.reset_counts()
    engines = [("plain", plain), ("drafting", drafting)]
    for turn in range(repeats + 1):
        turns = [replace(each, seed=each.seed + 1000 * turn) for each in params]
        for key, engine in engines if turn % 2 else reversed(engines):
            served = serve(engine, prompts, turns)
            if turn:  # the first is a warm-up
                seen[key].append(served)
    assert drafting.speculator is not None
    times = {key: statistics.median(each.decode_s for each in found) for key, found in seen.items()}
    whole = {key: statistics.median(each.seconds for each in found) for key, found in seen.items()}
    full = {
        key: statistics.median(tokens_per_s(each.steps, len(prompts)) for each in found)
        for key, found in seen.items()
    }
    ratios = sorted(a.decode_s / b.decode_s for a, b in zip(*seen.values(), strict=True))
    row = {
        "name": name,
        "speed_up": round(times["plain"] / times["drafting"], 4),
        "speed_up_full_batch": round(full["drafting"] / full["plain"], 4),
        "speed_up_with_prompts": round(whole["plain"] / whole["drafting"], 4),
        "lowest": round(ratios[0], 4),
        "highest": round(ratios[-1], 4),
        "plain_ms_a_token": round(times["plain"] / params[0].max_tokens * 1e3, 4),
        "drafting_ms_a_token": round(times["drafting"] / params[0].max_tokens * 1e3, 4),
        "steps_launched_ahead": ahead.used,
        "steps_launched_in_vain": ahead.wasted,
        **facts(*([step for each in found for step in each.steps] for found in seen.values())),
    }
    if SYNTHETIC in name:
        row["speed_up_at_asked_length"] = round(at_asked_length(row), 4)
    same = all(a.tokens == b.tokens for a, b in zip(*seen.values(), strict=True))
    row["same_tokens"] = (
        same if drafting.config.speculation and drafting.config.speculation.accurate else None
    )
    print(
        f"{name:52s} {row['speed_up']:6.3f}x  ({row['lowest']:.3f} to {row['highest']:.3f}), all running "
        f"{row['speed_up_full_batch']:.3f}x  "
        f"length {row['mean_length'] or 0:.2f}, break-even {row['break_even'] or 0:.2f}, "
        f"drafted in {row['drafted_share']:.0%} of the steps, {ahead.used} launched ahead, "
        f"{ahead.wasted} in vain",
        flush=True,
    )
    return row


def at_asked_length(row: dict[str, Any]) -> float:
    """What the same steps would give had just the asked number of tokens been drawn: a thousand steps draw
    some percent more or fewer."""
    share = row["drafted_share"]
    given, asked = ((1 - share) + share * length for length in (row["mean_length"], ASKED_LENGTH))
    return float(row["speed_up"] * asked / given)


def facts(plain: list[StepStats], drafting: list[StepStats]) -> dict[str, Any]:
    """Acceptance and step times of decode-only steps, in ms."""

    def median_ms(steps: list[StepStats]) -> float | None:
        return round(statistics.median(s.end_ns - s.start_ns for s in steps) / 1e6, 4) if steps else None

    decodes = [step for step in drafting if not step.num_prefill_tokens]
    with_drafts = [step for step in decodes if step.draft_lengths]
    drafts = sum(len(step.draft_lengths) for step in drafting)
    accepted = sum(sum(step.accepted_lengths) for step in drafting)
    ends = [step for step in plain if not step.num_prefill_tokens]
    gaps = [b.end_ns - a.end_ns for a, b in itertools.pairwise(ends)]
    plain_ms = round(statistics.median(gaps) / 1e6, 4) if gaps else None
    verify_ms = median_ms(with_drafts)
    return {
        "mean_length": round(1 + accepted / drafts, 4) if drafts else None,
        "drafted": sum(sum(step.draft_lengths) for step in drafting),
        "accepted": accepted,
        "drafted_share": round(len(with_drafts) / max(len(decodes), 1), 4),
        "plain_step_ms": plain_ms,
        "drafted_step_ms": verify_ms,
        "drafting_ms": round(statistics.median(s.draft_ns for s in with_drafts) / 1e6, 4)
        if with_drafts
        else None,
        "break_even": round(verify_ms / plain_ms, 4) if verify_ms and plain_ms else None,
        "host_ms": round(statistics.median(s.host_ns for s in with_drafts) / 1e6, 4) if with_drafts else None,
        "graph_share": round(sum(s.graph for s in decodes) / max(len(decodes), 1), 4),
    }


def open_pair(
    model: str, backend: str, asked: str, dtype: torch.dtype, **settings: Any
) -> tuple[Engine, Engine]:
    """A plain and a speculating engine on the same weights, both warmed up."""
    source, weights, found = find_model(model), None, []
    for speculate in (None, asked):
        engine = Engine.open(
            source,
            backend=backend,
            device=detect(),
            dtype=dtype,
            config=EngineConfig(speculate=speculate, **settings),
            weights=weights,
        )
        weights = engine.weights
        for temperature in (0.0, 1.0) if model == "tiny" else (0.0,):
            engine.warm_up(SamplingParams(temperature=temperature))
        found.append(engine)
    return found[0], found[1]


def device_rows(models: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Random weights in bf16, 512 tokens in and 256 out; the pool holds just the largest batch."""
    rows = []
    for model in models:
        batches = DEVICE_ROWS[model]
        largest = max(*batches, 8)
        settings = {
            "max_seqs": largest,
            "max_step_tokens": 8192,
            "max_len": 1024,
            "block_size": 64,
            "num_blocks": largest * (-(-(INPUT + OUTPUT) // 64) + 1),
        }
        plain, drafting = open_pair(model, "triton", SYNTHETIC, torch.bfloat16, **settings)
        print(
            f"{model}: {plain.runner.num_graphs} graphs plain, {drafting.runner.num_graphs} drafting",
            flush=True,
        )
        vocab = plain.model_config.vocab_size
        for batch in batches:
            rng = random.Random(batch)
            prompts = [[rng.randrange(vocab) for _ in range(INPUT)] for _ in range(batch)]
            name = f"{model.removeprefix('shape:')} bs{batch} {SYNTHETIC}"
            rows.append(side_by_side(name, plain, drafting, prompts, params_of(batch, OUTPUT), repeats))
        del plain, drafting
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def layout_rows(repeats: int) -> list[dict[str, Any]]:
    """Captured steps with drafts laid out as sequences of several tokens and as decodes of one: what
    `Runner.few_drafted` decides. Drafts at any price, so that both verify the same number of tokens."""
    batches, model = (1, 2, 4, 8, 16, 32), "shape:qwen3-0.6b"
    settings = {
        "max_seqs": 192,
        "max_step_tokens": 8192,
        "max_len": 1024,
        "block_size": 64,
        "num_blocks": 500,
    }
    plain, drafting = open_pair(model, "triton", SYNTHETIC, torch.bfloat16, adaptive_drafts=False, **settings)
    vocab, rows = plain.model_config.vocab_size, []
    for batch in batches:
        rng = random.Random(batch)
        prompts = [[rng.randrange(vocab) for _ in range(INPUT)] for _ in range(batch)]
        for layout, few in (("sequences", 0), ("decodes", 512)):
            drafting.runner.few_drafted = few
            name = f"qwen3-0.6b bs{batch} {SYNTHETIC} as {layout}"
            rows.append(side_by_side(name, plain, drafting, prompts, params_of(batch, OUTPUT), repeats))
    return rows


def cpu_rows(repeats: int, batches: Sequence[int]) -> list[dict[str, Any]]:
    """`tiny` in fp32 goes on with English text it was not trained on: 64 tokens in, 256 out."""
    prompts = split_corpus(topics_corpus(), find_model("tiny").tokenizer(), length=64, limit=64)[::8]
    rows = []
    for asked, temperature, text in CPU_ROWS:
        plain, drafting = open_pair("tiny", "sdpa", asked, torch.float32, max_seqs=8, max_step_tokens=2048)
        for batch in batches:
            name = f"tiny bs{batch} {asked} {text}"
            params = params_of(batch, 256, temperature)
            rows.append(side_by_side(name, plain, drafting, prompts[:batch], params, repeats))
    return rows


def check() -> bool:
    """Whether speculating engines give the tokens of plain ones in fp32; prints every way that was tried."""
    on_gpu = torch.cuda.is_available()
    text = split_corpus(topics_corpus(), find_model("tiny").tokenizer(), length=64, limit=80)[::8]
    rng = random.Random(0)
    prompts = [
        *text,
        [5, 9, 2] * 20,
        *([rng.randrange(4000) for _ in range(rng.randint(1, 90))] for _ in range(9)),
    ]
    kinds = {
        "greedy": {},
        "sampled": {"temperature": 0.9},
        "filtered": {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    }
    settings: dict[str, Any] = {"max_seqs": 8, "max_step_tokens": 256, "num_blocks": 160, "block_size": 16}
    backends = ("triton", "torch") if on_gpu else ("torch", "sdpa")
    plain: dict[str, list[list[int]]] = {}
    passed = True
    for backend in backends:
        for graphs in (True, False) if on_gpu and backend == "triton" else (False,):
            for asked in (None, "ngram:4", "draft:tiny-draft:2"):
                engine = Engine.open(
                    find_model("tiny"),
                    backend=backend,
                    device=detect(),
                    dtype=torch.float32,
                    config=EngineConfig(
                        speculate=asked,
                        graphs=graphs,
                        overlap=False,
                        adaptive_drafts=asked == "ngram:4",
                        **settings,
                    ),
                )
                for kind, more in kinds.items():
                    params = params_of(len(prompts), 64, **more)
                    engine.warm_up(params[0])
                    served = serve(engine, prompts, params)
                    expected = plain.setdefault(kind, served.tokens)
                    right = served.tokens == expected
                    wrong = sum(a != b for a, b in zip(served.tokens, expected, strict=True))
                    lengths = [length for step in served.steps for length in step.accepted_lengths]
                    passed &= right
                    said = "same tokens" if right else f"{wrong} of {len(prompts)} outputs DIFFER"
                    captured = sum(step.graph for step in served.steps)
                    print(
                        f"{backend:7s} {'captured' if graphs else 'eager':9s} {asked or '':20s} {kind:9s} "
                        f"{said}; {sum(lengths)} drafted tokens accepted, {captured} of {len(served.steps)} "
                        "steps from graphs",
                        flush=True,
                    )
                del engine
                gc.collect()
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device-rows", action="store_true", help="rows on one GPU, instead of the CPU's")
    parser.add_argument("--models", default=",".join(DEVICE_ROWS), help="of --device-rows")
    parser.add_argument(
        "--check", action="store_true", help="fp32 tokens with and without speculation; exit 1 if not"
    )
    parser.add_argument(
        "--layouts", action="store_true", help="rows of both layouts of captured drafts, on a GPU"
    )
    parser.add_argument("--batches", default="1,4", help="requests at once in the CPU rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    passed, rows = True, []
    if options.check:
        passed = check()
        print("check passed" if passed else "CHECK FAILED", flush=True)
    if options.device_rows:
        rows = device_rows(options.models.split(","), options.repeats)
    elif options.layouts:
        rows = layout_rows(options.repeats)
    elif not options.check:
        rows = cpu_rows(options.repeats, [int(batch) for batch in options.batches.split(",")])
    if options.out:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
        conditions = {"device": device, "torch": torch.__version__, "repeats": options.repeats}
        found = {"conditions": conditions, "check_passed": passed if options.check else None, "rows": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
