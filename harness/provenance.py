"""Where a run came from: the machine and the software, with names that identify people left out."""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbench.reports.record.redaction import redact as redact
from backbench.reports.record.redaction import redacted as redacted

if TYPE_CHECKING:
    from backbench.backends.interface import Device

PACKAGES = (
    "backbench",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pandas",
    "pyarrow",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "fa3-fwd",
    "amd-aiter",
)

_THREADS_DEVICES_LIBRARIES = """
    OMP_NUM_THREADS OMP_WAIT_POLICY OMP_PROC_BIND OMP_PLACES OMP_DYNAMIC OMP_SCHEDULE
    GOMP_SPINCOUNT GOMP_CPU_AFFINITY KMP_BLOCKTIME KMP_AFFINITY OPENBLAS_NUM_THREADS
    MKL_NUM_THREADS MKL_DYNAMIC MKL_CBWR MKL_ENABLE_INSTRUCTIONS ONEDNN_MAX_CPU_ISA
    ATEN_CPU_CAPABILITY DNNL_MAX_CPU_ISA ONEDNN_DEFAULT_FPMATH_MODE
    CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUDA_MODULE_LOADING
    CUDA_DEVICE_MAX_CONNECTIONS CUDA_CACHE_DISABLE CUDA_FORCE_PTX_JIT CUDA_SCALE_LAUNCH_QUEUES
    HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES HIP_LAUNCH_BLOCKING HIP_FORCE_DEV_KERNARG
    HSA_OVERRIDE_GFX_VERSION HSA_NO_SCRATCH_RECLAIM GPU_MAX_HW_QUEUES NVIDIA_TF32_OVERRIDE
    PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF PYTORCH_HIP_ALLOC_CONF
    PYTORCH_NO_CUDA_MEMORY_CACHING PYTORCH_TUNABLEOP_ENABLED PYTORCH_TUNABLEOP_TUNING
    PYTORCH_TUNABLEOP_FILENAME TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_BLAS_PREFER_HIPBLASLT
    TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL TORCH_CUDNN_V8_API_DISABLED
    TORCH_SHOW_CPP_STACKTRACES TORCH_LOGS TORCH_COMPILE_DISABLE TORCHDYNAMO_DISABLE
    CUBLAS_WORKSPACE_CONFIG CUBLASLT_WORKSPACE_SIZE CUBLAS_LOGINFO_DBG
    TRITON_INTERPRET TRITON_CACHE_DIR TRITON_DEBUG TRITON_ALWAYS_COMPILE TRITON_PTXAS_PATH
    TRITON_F32_DEFAULT TRITON_DISABLE_LINE_INFO TRITON_KERNEL_DUMP TRITON_OVERRIDE_DIR
    TRITON_PRINT_AUTOTUNING TRITON_HIP_USE_BLOCK_PINGPONG AMDGCN_USE_BUFFER_OPS DISABLE_LLVM_OPT
    MALLOC_ARENA_MAX MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ LD_PRELOAD
"""
VARIABLES = frozenset(_THREADS_DEVICES_LIBRARIES.split())
"""Environment variables a record may keep: what changes what the libraries compute, or how fast."""


def command_line(arguments: Sequence[str]) -> str:
    """The command as typed, redacted."""
    import shlex

    return redact(shlex.join(["bench", *arguments]))


def system(device: Device, accelerator: dict[str, Any] | None = None) -> dict[str, Any]:
    """The record's `system` section. `accelerator` adds what the driver says (`NvmlSensor.describe`)."""
    import psutil

    from backbench.backends.interface.device import cpu_name

    return {
        "device": {
            "vendor": device.vendor,
            "name": device.name,
            "arch": device.arch,
            "units": device.units,
            "memory_bytes": device.memory_bytes,
            "interpreter": device.interpret,
            **(accelerator or {}),
        },
        "cpu": {
            "name": cpu_name(),
            "arch": platform.machine(),
            "cores_physical": psutil.cpu_count(logical=False),
            "cores_usable": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
        },
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()}",
    }


def software() -> dict[str, Any]:
    """The record's `software` section: versions, torch's GPU toolkit, and this product's git state.

    torch is described where this process has loaded it: one that only measures a server computes nothing.
    """
    from backbench.backends.dependency import installed_version

    sha, dirty = git_state(Path(__file__).resolve().parent)  # not the link to it in backbench/
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := installed_version(name)) is not None},
        **_torch(),
        "git_sha": sha,
        "git_dirty": dirty,
        "environment": _environment(),
    }


def _torch() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "torch_threads": torch.get_num_threads(),
    }


def _environment() -> dict[str, str]:
    """Those of `VARIABLES` that are set, redacted. Others may hold anything, a token too."""
    return {name: redact(os.environ[name]) for name in sorted(VARIABLES) if name in os.environ}


def source_hash(implementation: object) -> str:
    """SHA-256 over the sources and tuning tables beside `implementation`, or over its file alone.

    An attention that divides its work among others takes theirs in.
    """
    module = sys.modules[type(implementation).__module__]
    file = Path(inspect.getfile(module))
    files = [file]
    if module.__name__.count(".") > 1:
        files = sorted([*file.parent.rglob("*.py"), *file.parent.rglob("tuning/*.json")])
    digest = hashlib.sha256()
    for each in files:
        digest.update(each.relative_to(file.parent).as_posix().encode() + b"\0" + each.read_bytes())
    for side in getattr(implementation, "sides", ()):
        digest.update(source_hash(side).encode())
    return digest.hexdigest()


def git_state(directory: Path) -> tuple[str | None, bool | None]:
    """(commit, uncommitted changes) of the checkout that holds this package; None outside one."""
    if not (directory.parent / ".git").exists():
        return None, None

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    sha = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no") if sha else None
    return sha, None if changes is None else bool(changes)
