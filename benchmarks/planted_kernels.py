"""Does a run notice a wrong kernel: `python benchmarks/planted_kernels.py --model shape:qwen3-0.6b`.

Plants one fault after the other around a right attention, lets the run's own check look, and prints what it
saw; then how near the right kernels of this machine come to the same bounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbench.backends import registry
from backbench.backends.interface import Attention, AttentionRunner, AttentionSpec, Batch, Device
from backbench.backends.interface.device import detect
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import ModelSource, find_model
from backbench.errors import BackendError
from backbench.harness import correctness

CUT = 1024
"""Keys that the kernels which lose a long context still see."""


class Wrapped(AttentionRunner):
    """A right runner, to be spoiled by those below."""

    def __init__(self, right: AttentionRunner, spec: AttentionSpec) -> None:
        self.right, self.spec = right, spec
        self.batch_invariant = right.batch_invariant
        self.finite_cache = right.finite_cache

    def new_cache(self, num_blocks: int) -> Any:
        return self.right.new_cache(num_blocks)

    def cache_bytes_per_block(self) -> int:
        return self.right.cache_bytes_per_block()

    def plan(self, batch: Batch) -> Any:
        return self.right.plan(batch)

    def write(self, cache: Any, k: Tensor, v: Tensor, batch: Batch) -> None:
        self.right.write(cache, k, v, batch)

    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        self.right.run(q, cache, batch, out)

    def copy_blocks(self, cache: Any, src: Tensor, dst: Tensor) -> None:
        self.right.copy_blocks(cache, src, dst)

    def read(self, cache: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.right.read(cache, ids)

    def on(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        """The right runner on another batch than it was planned for."""
        self.right.plan(batch)
        self.right.run(q, cache, batch, out)


class LastKey(Wrapped):
    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        lengths = batch.seq_lens.clone()
        lengths[: batch.num_decodes] = (lengths[: batch.num_decodes] - 1).clamp_min(1)
        self.on(q, cache, replace(batch, seq_lens=lengths), out)


class HeadScale(Wrapped):
    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        self.right.run(q, cache, batch, out)
        out[:, -1] *= 1.05


class GroupScale(Wrapped):
    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        self.right.run(q, cache, batch, out)
        out[:, : self.spec.q_heads // self.spec.kv_heads] *= 0.5**0.5


class LongDecode(Wrapped):
    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        lengths = batch.seq_lens.clone()
        lengths[: batch.num_decodes].clamp_(max=CUT)
        self.on(q, cache, replace(batch, seq_lens=lengths), out)


class LongPrompt(Wrapped):
    """Queries of prompts see the first keys only."""

    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        self.right.run(q, cache, batch, out)
        starts, lengths = batch.query_start.tolist(), batch.seq_lens.tolist()
        for row in range(batch.num_decodes, batch.num_seqs):
            start, count = starts[row], starts[row + 1] - starts[row]
            first = max(0, CUT - (lengths[row] - count))
            if first >= count:
                continue
            late = slice(start + first, start + count)
            count -= first
            device = q.device
            decodes = Batch(
                query_start=torch.arange(count + 1, dtype=torch.int32, device=device),
                seq_lens=torch.full((count,), CUT, dtype=torch.int32, device=device),
                block_table=batch.block_table[row].repeat(count, 1),
                slots=batch.slots[late],
                num_seqs=count,
                num_tokens=count,
                num_decodes=count,
                max_query=1,
                max_len=CUT,
            )
            part = torch.empty_like(out[late])
            self.on(q[late].contiguous(), cache, decodes, part)
            out[late] = part


class GroupOfAnother(Wrapped):
    """The last group's queries read the first KV head."""

    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        group = self.spec.q_heads // self.spec.kv_heads
        moved, wrong = q.clone(), torch.empty_like(out)
        moved[:, :group] = q[:, -group:]
        self.right.run(moved, cache, batch, wrong)
        self.right.run(q, cache, batch, out)
        out[:, -group:] = wrong[:, :group]


class BlockTwice(Wrapped):
    """Where a table has a third block, the second is read in its place."""

    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        table = batch.block_table.clone()
        if table.shape[1] > 2:
            table[:, 2] = table[:, 1]
        self.on(q, cache, replace(batch, block_table=table), out)


class StaleCache(Wrapped):
    """A step's keys and values arrive with the next step's."""

    late: tuple[Any, ...] | None = None

    def write(self, cache: Any, k: Tensor, v: Tensor, batch: Batch) -> None:
        if self.late is not None and self.late[0] is cache:
            self.right.write(*self.late)
        self.late = None
        if batch.num_decodes == batch.num_seqs:
            self.late = (cache, k.clone(), v.clone(), replace(batch, slots=batch.slots.clone()))
        else:
            self.right.write(cache, k, v, batch)


class Swapped(Wrapped):
    def write(self, cache: Any, k: Tensor, v: Tensor, batch: Batch) -> None:
        self.right.write(cache, v, k, batch)


class OneLate(Wrapped):
    """Prompts behind a stored prefix stand one position early: no query sees its own key."""

    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        lengths = batch.seq_lens.clone()
        prompts = slice(batch.num_decodes, batch.num_seqs)
        queries = batch.query_start.diff()[prompts]
        lengths[prompts] -= (lengths[prompts] > queries).to(lengths.dtype)
        self.on(q, cache, replace(batch, seq_lens=lengths), out)


class WrongSlot(Wrapped):
    """The last token of a step goes to the block's first slot."""

    def write(self, cache: Any, k: Tensor, v: Tensor, batch: Batch) -> None:
        slots = batch.slots.clone()
        last, size = batch.num_tokens - 1, self.spec.block_size
        slots[last] = torch.where(slots[last] < 0, slots[last], slots[last] // size * size)
        self.right.write(cache, k, v, replace(batch, slots=slots))


class Dimension(Wrapped):
    """The first dimension of every head is its second."""

    def run(self, q: Tensor, cache: Any, batch: Batch, out: Tensor) -> None:
        self.right.run(q, cache, batch, out)
        out[..., 0] = out[..., 1]


Plant = Callable[[Attention, AttentionSpec, Device, int, int], AttentionRunner]
"""(right attention, spec, device, layer, layers) -> the runner of that layer."""


def everywhere(wrong: type[Wrapped]) -> Plant:
    return lambda attention, spec, device, layer, layers: wrong(attention.open(spec, device), spec)


def in_one_layer(wrong: type[Wrapped]) -> Plant:
    def plant(
        attention: Attention, spec: AttentionSpec, device: Device, layer: int, layers: int
    ) -> AttentionRunner:
        right = attention.open(spec, device)
        return wrong(right, spec) if layer == layers // 2 else Wrapped(right, spec)

    return plant


def with_spec(change: Callable[[AttentionSpec], AttentionSpec]) -> Plant:
    return lambda attention, spec, device, layer, layers: Wrapped(attention.open(change(spec), device), spec)


def _window(by: int) -> Callable[[AttentionSpec], AttentionSpec]:
    return lambda spec: spec if spec.window is None else replace(spec, window=spec.window + by)


@dataclass(frozen=True)
class Fault:
    """A wrong kernel."""

    name: str
    plant: Plant
    needs_window: bool = False
    needs_groups: bool = False
    needs_context: int = 0

    def applies(self, engine: Engine, longest: int) -> bool:
        """Whether it changes what this engine computes."""
        specs = [layer.spec for layer in engine.decoder.layers]
        return (
            longest >= self.needs_context
            and (not self.needs_window or any(spec.window is not None for spec in specs))
            and (not self.needs_groups or any(spec.kv_heads > 1 for spec in specs))
        )


FAULTS = (
    Fault("nothing (the harness itself)", everywhere(Wrapped)),
    Fault("decodes miss their last key", everywhere(LastKey)),
    Fault("one head 5 % too large, in one layer", in_one_layer(HeadScale)),
    Fault("one KV head's output times 0.707", everywhere(GroupScale)),
    Fault("one KV head's output times 0.707, in one layer", in_one_layer(GroupScale)),
    Fault(f"decodes see {CUT} keys at most", everywhere(LongDecode), needs_context=CUT + 1),
    Fault(f"prompts see {CUT} keys at most", everywhere(LongPrompt), needs_context=CUT + 1),
    Fault("window one key late", with_spec(_window(1)), needs_window=True),
    Fault("window one key early", with_spec(_window(-1)), needs_window=True),
    Fault("one GQA group reads another's, in one layer", in_one_layer(GroupOfAnother), needs_groups=True),
    Fault("one block of the table read twice", everywhere(BlockTwice)),
    Fault("keys of a decode arrive one step late", everywhere(StaleCache)),
    Fault("keys and values swapped, in one layer", in_one_layer(Swapped)),
    Fault("prompts behind a prefix one position early", everywhere(OneLate)),
    Fault("a step's last token in a wrong slot", everywhere(WrongSlot)),
    Fault("softmax scale 2 % too large", with_spec(lambda spec: replace(spec, scale=1.02 * spec.scale))),
    Fault("one dimension of every head is another's, in one layer", in_one_layer(Dimension)),
)
RIGHT = FAULTS[0]


@contextmanager
def planted(engine: Engine, fault: Fault) -> Iterator[None]:
    """The engine with every layer's attention spoiled, and right again afterwards."""
    decoder, attention, device = engine.decoder, engine.selection.attention, engine.selection.device
    layers, runners = decoder.layers, decoder.runners
    decoder.layers = [
        replace(layer, runner=fault.plant(attention, layer.spec, device, index, len(layers)))
        for index, layer in enumerate(layers)
    ]
    decoder.runners = {layer.spec: layer.runner for layer in decoder.layers}
    try:
        yield
    finally:
        decoder.layers, decoder.runners = layers, runners


def open_engine(
    source: ModelSource, backend: str, device: Device, dtype: torch.dtype | None, longest: int, **given: Any
) -> Engine:
    """An engine whose pool holds the check's sample and little else."""
    config = EngineConfig(
        max_seqs=16,
        max_len=longest,
        num_blocks=(2 * longest + 4096) // 16,
        max_step_tokens=2048,
        graphs=False,
    )
    return Engine.open(source, backend=backend, device=device, dtype=dtype, config=config, **given)


def shares(found: dict[str, Any]) -> dict[str, float | None]:
    """How much of each bound was used."""
    if "tokens" not in found:
        return {"attention": found.get("attention", {}).get("worst_share_of_limit")}
    return {
        "attention": found["attention"].get("worst_share_of_limit"),
        "mean": found["mean_abs_logprob_diff"] / found["tolerance_mean"],
        "sequence": found["worst_sequence_mean_abs_logprob_diff"] / found["tolerance_sequence_mean"],
        "largest": found["max_abs_logprob_diff"] / found["tolerance"],
    }


def line(name: str, found: dict[str, Any], seconds: float) -> str:
    verdict = {True: "passed", False: "CAUGHT", None: "not checked"}[found["passed"]]
    used = "  ".join(
        f"{key} {'inf' if value is None else f'{value:.3g}'}" for key, value in shares(found).items()
    )
    return f"{verdict:11} {name:58} {used}  ({seconds:.1f} s) {found.get('reason', '')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", help="cpu or cuda:N; default: what there is")
    parser.add_argument("--backend", help="the right attention; default: triton on a GPU, torch on a CPU")
    parser.add_argument("--longest", type=int, default=3000, help="longest context of the pretended run")
    options = parser.parse_args()
    device = detect(prefer=options.device)
    on_cpu = device.torch_device.type == "cpu"
    source = find_model(options.model)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    longest = min(options.longest, source.config.max_len)
    right = options.backend or ("torch" if on_cpu else "triton")
    engine = open_engine(source, right, device, dtype, longest)
    print(
        f"{options.model} {engine.decoder.dtype} on {device.name}, {right}, contexts up to {longest}; "
        "share of each bound used",
        flush=True,
    )
    missed = 0
    for fault in FAULTS:
        if not fault.applies(engine, longest):
            continue
        with planted(engine, fault):
            start = time.perf_counter()
            found = correctness.check(engine, source, longest)
        print(line(fault.name, found, time.perf_counter() - start), flush=True)
        missed += found["passed"] is not (fault is RIGHT)
    print("Right kernels:", flush=True)
    weights = engine.weights
    for name in registry.names():
        try:
            other = open_engine(source, name, device, dtype, longest, weights=weights)
        except BackendError as error:
            print(f"{'refused':11} {name}: {str(error)[:120]}")
            continue
        start = time.perf_counter()
        found = correctness.check(other, source, longest)
        print(line(str(other.selection.used), found, time.perf_counter() - start), flush=True)
        missed += found["passed"] is not True
        del other
    print(f"{missed} verdicts are wrong." if missed else "Every verdict is right.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
