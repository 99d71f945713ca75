"""The Triton backend: one portable source for NVIDIA and AMD GPUs. Kernels are imported at first use."""

from pathlib import Path

from backbench.backends.interface import Backend, KernelCase, Kernels
from backbench.backends.triton.attention import TritonAttention
from backbench.backends.triton.collectives import OneShotCollectives
from backbench.backends.triton.linear import TritonLinear
from backbench.backends.triton.operations import TritonOperations
from backbench.backends.triton.tune import TritonTuner


def _cases() -> list[KernelCase]:
    from backbench.backends.triton.aot_cases import cases
    from backbench.backends.triton.quantized_aot import quantized_cases
    from backbench.backends.triton.sparse_aot import sparse_cases

    return [*cases(), *quantized_cases(), *sparse_cases()]


KERNELS = Kernels(
    cases=_cases,
    baseline=Path(__file__).parent / "portability.json",
    operations={
        f"{__name__}.{module}": operation
        for module, operation in (
            ("decode_kernel", "attention"),
            ("prefill_kernel", "attention"),
            ("fused_write", "attention"),
            ("gemm", "linear"),
            ("packed_gemm", "linear"),
            ("byte_gemm", "linear"),
            ("sparse_gemm", "linear"),
            ("rounding", "linear"),
            ("fused_rounding", "operations"),
            ("elementwise", "operations"),
            ("sampling", "operations"),
            ("thresholds", "operations"),
            ("oneshot", "collectives"),
        )
    },
)
BACKEND = Backend(
    name="triton",
    summary="Fused Triton kernels for NVIDIA and AMD GPUs; --interpret checks them on a CPU.",
    attention=TritonAttention(),
    linear=TritonLinear(),
    operations=TritonOperations(),
    collectives=OneShotCollectives(),
    tuner=TritonTuner(),
    kernels=KERNELS,
)
