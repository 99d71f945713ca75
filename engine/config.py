"""Every setting of the engine, in one frozen object that goes into the record."""

from __future__ import annotations

from dataclasses import dataclass

from backbench.errors import EngineError


@dataclass(frozen=True)
class EngineConfig:
    """Limits and switches of one engine. None = decided from the model and the device at start."""

    block_size: int | None = None
    """Tokens a KV block holds; None = 64 on a GPU, where kernels read longer runs, and 16 on a CPU. It does
    not depend on the backend: kernels are compared on one KV layout."""
    num_blocks: int | None = None
    """KV blocks in the pool; None = what `kv_memory_fraction` of the device's free memory holds."""
    kv_memory_fraction: float = 0.9
    max_seqs: int = 256
    """Sequences that may run at once."""
    max_step_tokens: int = 8192
    """Prompt tokens of one step, at most. Decodes, a token each, come on top: no prompt makes them wait."""
    max_len: int | None = None
    """Longest prompt + output; None = the model's context length."""
    prefill_chunk: int | None = None
    """Most prompt tokens of one request in one step; None = the step's budget."""
    prefix_cache: bool = True
    graphs: bool = True
    """Capture decodes, and steps with few prompt tokens, in device graphs where the backend allows it."""
    overlap: bool = True
    """Schedule and launch step N + 1 before reading step N's tokens."""

    def __post_init__(self) -> None:
        for name in ("max_seqs", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise EngineError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("block_size", "num_blocks", "max_len", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EngineError(f"{name} must be at least 1, not {value}.")
        if not 0 < self.kv_memory_fraction <= 1:
            raise EngineError(f"kv_memory_fraction must lie in (0, 1], not {self.kv_memory_fraction}.")
