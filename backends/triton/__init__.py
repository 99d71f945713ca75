"""The Triton backend: one portable source for NVIDIA and AMD GPUs. Kernels are imported at first use."""

from backends.interface import Backend
from backends.triton.attention import TritonAttention
from backends.triton.linear import TritonLinear
from backends.triton.operations import TritonOperations
from backends.triton.tune import TritonTuner

BACKEND = Backend(
    name="triton",
    summary="Fused Triton kernels for NVIDIA and AMD GPUs; --interpret checks them on a CPU.",
    attention=TritonAttention(),
    linear=TritonLinear(),
    operations=TritonOperations(),
    tuner=TritonTuner(),
)
