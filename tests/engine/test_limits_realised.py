"""How large the KV pool may be, and what is said where the device's memory does not suffice."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from backbench.backends.interface import Device, GraphSupport
from backbench.backends.interface.device import cpu
from backbench.engine.config import EngineConfig
from backbench.engine.execution.step_shape import StepShape, graph_shapes
from backbench.engine.limits import GRAPH_LAYER_BYTES, SCRATCH_BYTES, StepLimits, realise_pool
from backbench.errors import EngineError

GIB = 2**30
GPU = replace(cpu(), vendor="nvidia", arch="sm90", torch_device=torch.device("cuda", 0))
LIMITS = StepLimits(block_size=64, max_len=4096, max_seqs=64, max_step_tokens=8192, prefill_chunk=8192)
FULL_STEP = LIMITS.max_batch_tokens


@dataclass
class FakeDecoder:
    """Takes `activation_bytes` in its largest step, or the device has too few."""

    memory: FakeMemory
    activation_bytes: int = GIB
    block_bytes: int = 2**20
    profiled: list[tuple[list[int], int]] = field(default_factory=list)
    graph_support: GraphSupport = GraphSupport.NEVER
    num_layers: int = 32

    def cache_bytes_per_block(self) -> int:
        return self.block_bytes

    def profile(self, lengths: list[int], rows: int) -> None:
        self.profiled.append((lengths, rows))
        if self.activation_bytes > self.memory.total - self.memory.used:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB.")
        needs = self.activation_bytes * sum(lengths) // FULL_STEP
        self.memory.peak = max(self.memory.peak, self.memory.used + needs)


@dataclass
class FakeMemory:
    """A device whose weights take `used` bytes."""

    total: int = 16 * GIB
    used: int = 10 * GIB
    peak: int = 0


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> FakeMemory:
    fake = FakeMemory()
    answers: dict[str, Any] = {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: setattr(fake, "peak", fake.used),
        "memory_reserved": lambda device: fake.used,
        "max_memory_reserved": lambda device: fake.peak,
        "mem_get_info": lambda device: (fake.total - fake.used, fake.total),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return fake


def blocks(
    decoder: Any,
    fraction: float = 0.9,
    limits: StepLimits = LIMITS,
    device: Device = GPU,
    graphs: bool = True,
) -> int:
    config = EngineConfig(kv_memory_fraction=fraction, graphs=graphs)
    return realise_pool(config, limits, decoder, device).num_blocks


def test_the_pool_takes_what_weights_and_activations_leave(memory: FakeMemory) -> None:
    decoder = FakeDecoder(memory)
    assert blocks(decoder, 0.75) == (12 - 10 - 1) * 1024 - SCRATCH_BYTES // 2**20
    assert decoder.profiled == [([4096, 4096, 64], 64)], "8192 prompt tokens and 64 decodes"


@pytest.mark.parametrize(
    ("support", "largest"),
    [(GraphSupport.DECODE, StepShape(64)), (GraphSupport.MIXED, StepShape(63, 1, 512))],
)
def test_the_pool_leaves_room_for_captured_graphs(
    memory: FakeMemory, support: GraphSupport, largest: StepShape
) -> None:
    """Their memory is apart from the eager steps', and each keeps its launches on the device."""
    decoder = FakeDecoder(memory, graph_support=support)
    left = blocks(decoder, 0.75)
    number = len(graph_shapes(64, 8192, support == GraphSupport.MIXED))
    pool = GIB * largest.num_tokens // FULL_STEP
    kept = number * 32 * GRAPH_LAYER_BYTES
    assert left == (2 * GIB - GIB - SCRATCH_BYTES - pool - kept) // 2**20
    assert [sum(lengths) for lengths, _ in decoder.profiled] == [FULL_STEP, largest.num_tokens]
    without = FakeDecoder(memory, graph_support=support)
    assert blocks(without, 0.75, graphs=False) == 1024 - SCRATCH_BYTES // 2**20


def test_few_short_sequences_bound_the_largest_step(memory: FakeMemory) -> None:
    decoder = FakeDecoder(memory)
    blocks(decoder, limits=replace(LIMITS, max_len=100, max_seqs=3))
    assert decoder.profiled == [([100, 100, 100], 3)]


def test_no_more_blocks_than_the_limits_can_use(memory: FakeMemory) -> None:
    assert blocks(FakeDecoder(memory, block_bytes=1024)) == 64 * 64


def test_a_step_that_does_not_fit_is_refused_in_one_line(memory: FakeMemory) -> None:
    with pytest.raises(EngineError, match=r"8192 tokens does not fit .* lower --max-step-tokens") as caught:
        blocks(FakeDecoder(memory, activation_bytes=90 * GIB))
    assert "\n" not in str(caught.value)


def test_no_room_for_one_block_is_refused_in_one_line(memory: FakeMemory) -> None:
    memory.used = 15 * GIB + 512 * 2**20
    with pytest.raises(EngineError, match=r"no room for even one KV block .* --kv-memory-fraction"):
        blocks(FakeDecoder(memory, activation_bytes=2**20), 0.5)
