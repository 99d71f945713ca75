"""How large the engine's limits and its KV pool are, from the model, the device and what the user set."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch

from backbench.backends.interface import Device, GraphSupport
from backbench.engine.config import EngineConfig
from backbench.engine.execution.step_shape import StepShape, graph_shapes
from backbench.engine.models.config import ModelConfig
from backbench.errors import EngineError

CPU_POOL_BYTES = 512 * 2**20
"""The KV pool's default size on a CPU: enough for the bundled models' largest batches."""

GRAPH_LAYER_BYTES = 128 * 2**10
"""Set aside for each layer of each captured graph, whose launches and their arguments the driver keeps on the
device. A reserve, not a measurement: nothing can be captured before there is a pool."""
SCRATCH_BYTES = 256 * 2**20
"""Set aside for what is taken after the pool: step buffers, kernels' code, and the matrix library's workspace
of the stream that captures (tens of MiB on Hopper)."""

GPU_BLOCK_SIZE = 64
"""A whole number of key tiles: prefill kernels then load a block as one box."""
CPU_BLOCK_SIZE = 16


@dataclass(frozen=True)
class StepLimits:
    """What the largest step may hold: all that a model's launches are sized for. Nothing is left open."""

    block_size: int
    """Tokens a KV block holds."""
    max_len: int
    """Longest prompt + output of a sequence."""
    max_seqs: int
    """Sequences that may run at once."""
    max_step_tokens: int
    """Prompt tokens of a step; decodes come on top."""
    prefill_chunk: int
    """Prompt tokens of one sequence in a step."""
    draft_tokens: int = field(default=0, kw_only=True)
    """Tokens that a decode may verify beside its own."""

    @property
    def max_batch_tokens(self) -> int:
        """Tokens of the largest step."""
        return self.max_step_tokens + self.max_samples

    @property
    def max_samples(self) -> int:
        """Tokens of a step whose logits are drawn from, at most."""
        return self.max_seqs * (1 + self.draft_tokens)

    @property
    def blocks_per_seq(self) -> int:
        """Blocks of the longest sequence: the block table's columns."""
        return -(-self.max_len // self.block_size)

    def captured_shapes(self, support: GraphSupport) -> list[StepShape]:
        """The steps that graphs are captured for where attention supports that much, fewest tokens first."""
        if support < GraphSupport.DECODE:
            return []
        mixed = support >= GraphSupport.MIXED
        return graph_shapes(self.max_seqs, self.max_step_tokens, mixed, self.draft_tokens)


@dataclass(frozen=True)
class EngineLimits(StepLimits):
    """Every size of a running engine: a step's, and those of what lasts from step to step."""

    num_blocks: int
    """KV blocks in the pool."""

    @property
    def num_rows(self) -> int:
        """Rows of the device's request tables.

        Twice max_seqs: a finished sequence keeps its row until the steps in flight have landed.
        """
        return 2 * self.max_seqs


def realise_limits(config: EngineConfig, model: ModelConfig, device: Device) -> StepLimits:
    """Decide the limits of a step; raises EngineError where they exceed the model's context."""
    max_len = config.max_len or model.max_len
    if max_len > model.max_len:
        raise EngineError(
            f"max_len {max_len} exceeds the model's context of {model.max_len}; lower --max-len."
        )
    on_cpu = device.torch_device.type == "cpu"
    return StepLimits(
        block_size=config.block_size or (CPU_BLOCK_SIZE if on_cpu else GPU_BLOCK_SIZE),
        max_len=max_len,
        max_seqs=config.max_seqs,
        max_step_tokens=config.max_step_tokens,
        prefill_chunk=config.prefill_chunk or config.max_step_tokens,
        draft_tokens=0 if config.speculation is None else config.speculation.tokens,
    )


class StepCost(Protocol):
    """What sizing a pool asks of a decoder."""

    @property
    def num_layers(self) -> int:
        """Layers, each of whose launches a captured graph keeps."""

    @property
    def graph_support(self) -> GraphSupport:
        """Which steps may be captured."""

    def cache_bytes_per_block(self) -> int:
        """Device bytes one block takes over all layers."""

    def profile(self, lengths: list[int], num_seqs: int) -> None:
        """Compute prompts of `lengths` and `num_seqs` rows of logits, to see what memory a step needs."""


def realise_pool(
    config: EngineConfig,
    limits: StepLimits,
    decoder: StepCost,
    device: Device,
    drafting_bytes_per_block: int = 0,
) -> EngineLimits:
    """Decide `num_blocks`: what was set, or what the memory left beside weights and activations holds.

    drafting_bytes_per_block: what a model that drafts keeps for each block, beside the decoder's own.
    """
    per_block = decoder.cache_bytes_per_block() + drafting_bytes_per_block
    wanted = limits.max_seqs * limits.blocks_per_seq
    num_blocks = config.num_blocks
    if num_blocks is None:
        if device.torch_device.type == "cpu":
            room = CPU_POOL_BYTES
        else:
            room = _free_device_bytes(config, limits, decoder, device)
        num_blocks = min(wanted, room // per_block)
    if num_blocks < 1:
        raise EngineError(
            f"The device has no room for even one KV block of {per_block} bytes beside the weights; "
            "use a smaller model, a lower --max-step-tokens or a higher --kv-memory-fraction."
        )
    return EngineLimits(**asdict(limits), num_blocks=num_blocks)


def _prompts_of(limits: StepLimits, num_tokens: int) -> list[int]:
    """Lengths of prompts that together have `num_tokens`, as far as the longest and their number may go."""
    longest = limits.max_len
    tokens = min(num_tokens, limits.max_seqs * longest)
    return [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)


def _free_device_bytes(config: EngineConfig, limits: StepLimits, decoder: StepCost, device: Device) -> int:
    """Bytes the pool may take: the allowed share of the device, less what is taken beside it.

    Beside it are what a full step needs at its peak, what captured steps need (their memory is apart from
    the other steps'), and what the library and the driver take later.
    """
    torch_device = device.torch_device
    try:
        activations = _profiled_bytes(limits, decoder, torch_device, limits.max_batch_tokens)
        shapes = limits.captured_shapes(decoder.graph_support) if config.graphs else []
        captured = SCRATCH_BYTES + len(shapes) * decoder.num_layers * GRAPH_LAYER_BYTES
        if shapes:
            captured += _profiled_bytes(limits, decoder, torch_device, shapes[-1].num_tokens)
    except torch.cuda.OutOfMemoryError:
        raise EngineError(
            f"A step of {limits.max_step_tokens} tokens does not fit the device's memory beside the weights; "
            "lower --max-step-tokens or use a smaller model."
        ) from None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(torch_device)
    used = total - free
    return int(total * config.kv_memory_fraction) - used - activations - captured


def _profiled_bytes(
    limits: StepLimits, decoder: StepCost, torch_device: torch.device, num_tokens: int
) -> int:
    """Bytes torch takes from the device for a step of `num_tokens`, whole segments, as they stay taken."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(torch_device)
    before = torch.cuda.memory_reserved(torch_device)
    decoder.profile(_prompts_of(limits, num_tokens), limits.max_samples)
    return torch.cuda.max_memory_reserved(torch_device) - before
