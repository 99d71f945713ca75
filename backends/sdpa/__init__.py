"""Torch's fused attention on gathered cache blocks: fast wherever torch runs, without Triton."""

from backbench.backends.interface import Backend
from backbench.backends.sdpa.attention import SdpaAttention

BACKEND = Backend(
    name="sdpa",
    summary="Torch's fused attention over gathered blocks, on the CPU and on any GPU torch knows.",
    attention=SdpaAttention(),
)
