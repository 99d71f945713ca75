"""How large the engine's limits and its KV pool are, from the model, the device and what the user set."""

from __future__ import annotations

from dataclasses import replace

import torch

from backbench.backends.interface import Device, GraphSupport
from backbench.engine.config import EngineConfig
from backbench.engine.execution.step_shape import StepShape, graph_shapes
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.decoder import Decoder
from backbench.errors import EngineError

CPU_POOL_BYTES = 512 * 2**20
"""The KV pool's default size on a CPU: enough for the bundled models' largest batches."""


GRAPH_LAYER_BYTES = 128 * 2**10
"""Set aside for each layer of each captured graph, whose launches and their arguments the driver keeps on the
device. A reserve, not a measurement: nothing can be captured before there is a pool."""
SCRATCH_BYTES = 128 * 2**20
"""Set aside for what is taken after the pool: step buffers, kernels' code, and the matrix library's workspace
of the stream that captures (tens of MiB on Hopper)."""

GPU_BLOCK_SIZE = 64
"""A whole number of key tiles: prefill kernels then load a block as one box."""
CPU_BLOCK_SIZE = 16


def realise_limits(config: EngineConfig, model: ModelConfig, device: Device) -> EngineConfig:
    """Decide `block_size` and `max_len`; raises EngineError where that exceeds the model's context."""
    max_len = config.max_len or model.max_len
    if max_len > model.max_len:
        raise EngineError(
            f"max_len {max_len} exceeds the model's context of {model.max_len}; lower --max-len."
        )
    on_cpu = device.torch_device.type == "cpu"
    block_size = config.block_size or (CPU_BLOCK_SIZE if on_cpu else GPU_BLOCK_SIZE)
    return replace(config, block_size=block_size, max_len=max_len)


def realise_pool(config: EngineConfig, decoder: Decoder, device: Device) -> EngineConfig:
    """Decide `num_blocks`: what was set, or what the memory left beside weights and activations holds."""
    assert config.max_len is not None and config.block_size is not None
    per_block = decoder.cache_bytes_per_block()
    wanted = config.max_seqs * -(-config.max_len // config.block_size)
    num_blocks = config.num_blocks
    if num_blocks is None:
        if device.torch_device.type == "cpu":
            room = CPU_POOL_BYTES
        else:
            room = _free_device_bytes(config, decoder, device)
        num_blocks = min(wanted, room // per_block)
    if num_blocks < 1:
        raise EngineError(
            f"The device has no room for even one KV block of {per_block} bytes beside the weights; "
            "use a smaller model, a lower --max-step-tokens or a higher --kv-memory-fraction."
        )
    return replace(config, num_blocks=num_blocks)


def _prompts_of(config: EngineConfig, num_tokens: int) -> list[int]:
    """Lengths of prompts that together have `num_tokens`, as far as the longest and their number may go."""
    longest = config.max_len or 1
    tokens = min(num_tokens, config.max_seqs * longest)
    return [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)


def _free_device_bytes(config: EngineConfig, decoder: Decoder, device: Device) -> int:
    """Bytes the pool may take: the allowed share of the device, less what is taken beside it.

    Beside it are what a full step needs at its peak, what captured steps need (their memory is apart from
    the other steps'), and what the library and the driver take later.
    """
    torch_device = device.torch_device
    try:
        activations = _profiled_bytes(config, decoder, torch_device, config.max_batch_tokens)
        shapes = _captured_shapes(config, decoder)
        captured = SCRATCH_BYTES + len(shapes) * decoder.config.num_layers * GRAPH_LAYER_BYTES
        if shapes:
            captured += _profiled_bytes(config, decoder, torch_device, shapes[-1].num_tokens)
    except torch.cuda.OutOfMemoryError:
        raise EngineError(
            f"A step of {config.max_step_tokens} tokens does not fit the device's memory beside the weights; "
            "lower --max-step-tokens or use a smaller model."
        ) from None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(torch_device)
    used = total - free
    return int(total * config.kv_memory_fraction) - used - activations - captured


def _profiled_bytes(
    config: EngineConfig, decoder: Decoder, torch_device: torch.device, num_tokens: int
) -> int:
    """Bytes torch takes from the device for a step of `num_tokens`, whole segments, as they stay taken."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(torch_device)
    before = torch.cuda.memory_reserved(torch_device)
    decoder.profile(_prompts_of(config, num_tokens), config.max_seqs)
    return torch.cuda.max_memory_reserved(torch_device) - before


def _captured_shapes(config: EngineConfig, decoder: Decoder) -> list[StepShape]:
    """The steps that graphs are captured for, fewest tokens first."""
    if not config.graphs or decoder.graph_support < GraphSupport.DECODE:
        return []
    mixed = decoder.graph_support >= GraphSupport.MIXED
    return graph_shapes(config.max_seqs, config.max_step_tokens, mixed)
