"""The Triton backend: one portable source for NVIDIA and AMD GPUs. Kernels are imported at first use."""

from backbench.backends.interface import Backend
from backbench.backends.triton.attention import TritonAttention
from backbench.backends.triton.linear import TritonLinear
from backbench.backends.triton.operations import TritonOperations
from backbench.backends.triton.tune import TritonTuner

BACKEND = Backend(
    name="triton",
    summary="Fused Triton kernels for NVIDIA and AMD GPUs; --interpret checks them on a CPU.",
    attention=TritonAttention(),
    linear=TritonLinear(),
    operations=TritonOperations(),
    tuner=TritonTuner(),
)
