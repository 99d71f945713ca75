"""AMD GPUs: AITER's paged attention and tuned products where they serve, Triton with AMD tiles elsewhere.

Compiled for, and checked against the released signatures of, machines that were not at hand; not run.
"""

from backbench.backends.interface import Backend
from backbench.backends.rocm.attention import AiterAttention, RocmAttention
from backbench.backends.rocm.linear import RocmLinear
from backbench.backends.triton import KERNELS
from backbench.backends.triton.attention import TritonAttention

BACKEND = Backend(
    name="rocm",
    summary="AITER kernels on preshuffled layouts, Triton and hipBLASLt elsewhere; compiled, not run.",
    attention=RocmAttention(),
    linear=RocmLinear(),
    base="triton",
    variants={"aiter": AiterAttention(), "triton": TritonAttention()},
    kernels=KERNELS,
)
