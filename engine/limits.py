"""How large the engine's limits and its KV pool are, from the model, the device and what the user set."""

from __future__ import annotations

from dataclasses import replace

import torch

from backbench.backends.interface import Device
from backbench.engine.config import EngineConfig
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.decoder import Decoder
from backbench.errors import EngineError

CPU_POOL_BYTES = 512 * 2**20
"""The KV pool's default size on a CPU: enough for the bundled models' largest batches."""


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


def _largest_step(config: EngineConfig) -> list[int]:
    """Lengths of prompts that together fill a step, as far as the longest may go."""
    longest = config.max_len or 1
    tokens = min(config.max_batch_tokens, config.max_seqs * longest)
    return [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)


def _free_device_bytes(config: EngineConfig, decoder: Decoder, device: Device) -> int:
    """Bytes the pool may take: the allowed share of the device, less what a full step needs at its peak."""
    torch_device = device.torch_device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(torch_device)
    before = torch.cuda.memory_allocated(torch_device)
    try:
        decoder.profile(_largest_step(config), config.max_seqs)
    except torch.cuda.OutOfMemoryError:
        raise EngineError(
            f"A step of {config.max_step_tokens} tokens does not fit the device's memory beside the weights; "
            "lower --max-step-tokens or use a smaller model."
        ) from None
    activations = torch.cuda.max_memory_allocated(torch_device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(torch_device)
    used = total - free
    return int(total * config.kv_memory_fraction) - used - activations
