"""Compile a Triton kernel for a GPU that is not there, and read what it takes.

Works for every target without its driver: the compiler emits machine code and metadata, and nothing is
launched. `compile_kernel` is what the tests use to prove that a kernel builds for every supported
architecture, fits its shared memory and uses its matrix units.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backbench.backends.aot.in_flight import disassemble, overwritten
from backbench.backends.interface import KernelLaunch
from backbench.errors import BackendError

SHARED_LIMIT_BYTES = {
    "sm80": 163 * 1024,
    "sm86": 99 * 1024,
    "sm89": 99 * 1024,
    "sm90": 227 * 1024,
    "sm100": 227 * 1024,
    "sm103": 227 * 1024,
    "sm120": 99 * 1024,
    "sm121": 99 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
    "gfx1100": 64 * 1024,
    "gfx1151": 64 * 1024,
    "gfx1201": 64 * 1024,
}
"""Target -> the largest shared memory (LDS) one block may use. The compiler never checks it.

NVIDIA: "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide, the maximum
amount of shared memory per thread block. AMD: LDS per workgroup in the GPUs' ISA documents.
"""

TARGETS = tuple(SHARED_LIMIT_BYTES)

MATRIX_INSTRUCTIONS = {
    "nvidia": r"wgmma\.mma_async|mma\.sync|tcgen05\.mma",
    "amd": r"v_mfma_|v_smfmac_|v_wmma_",
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes on one target."""

    target: str
    registers: int | None
    """Per thread (NVIDIA) or vector registers per lane (AMD); None where no tool could read them."""
    spill_bytes: int | None
    """Stack bytes per thread (NVIDIA) or spilled vector registers * 4 (AMD); None as above."""
    shared_bytes: int
    matrix_instructions: int
    """Matrix instructions in the listing; 0 means plain multiply-adds."""
    kinds: tuple[str, ...]
    """The distinct matrix instructions, shortened."""
    text: str
    """The listing: PTX or AMD assembly."""
    overwritten: tuple[str, ...] = ()
    """Instructions that write a register of a Hopper product in flight: results would be wrong at times."""

    @property
    def fits(self) -> bool:
        """True when the kernel's shared memory is within the target's limit."""
        return self.shared_bytes <= SHARED_LIMIT_BYTES[self.target]


def gpu_target(name: str) -> Any:
    """Triton's target for "sm90", "gfx942", ...

    Raises:
        BackendError: the name is none of `TARGETS`.
    """
    from triton.backends.compiler import GPUTarget

    if name not in SHARED_LIMIT_BYTES:
        raise BackendError(f"Unknown compile target {name!r}; use one of {', '.join(TARGETS)}.")
    if name.startswith("sm"):
        return GPUTarget("cuda", int(name[2:]), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
}
"""torch's dtypes as Triton's signatures name them."""


def signature(launch: KernelLaunch) -> dict[str, str]:
    """Argument -> Triton type of those that are not `tl.constexpr`: "*bf16", "i32", "fp32", ..."""
    names = [name for name in launch.kernel.arg_names if name not in launch.constants]
    return {name: _type(argument) for name, argument in zip(names, launch.arguments, strict=True)}


def _type(argument: Any) -> str:
    if isinstance(argument, bool):
        return "i1"
    if isinstance(argument, int):
        return "i32" if -(2**31) <= argument < 2**31 else "i64"
    if isinstance(argument, float):
        return "fp32"
    box = getattr(argument, "block_shape", None)
    if box is None:
        return f"*{TYPES[argument.dtype]}"
    return f"tensordesc<{TYPES[argument.base.dtype]}[{','.join(map(str, box))}]>"


def compile_launch(launch: KernelLaunch, target: str) -> Resources:
    """Compile what `launch` would start, specialised on its arguments as Triton does when it starts.

    Raises:
        BackendError: the kernel was decorated in interpreter mode, or the target is unknown.
    """
    kinds = signature(launch)
    constants = dict(launch.constants)
    divisible = []
    unspecialised = {each.name for each in getattr(launch.kernel, "params", ()) if each.do_not_specialize}
    for name, argument in zip(list(kinds), launch.arguments, strict=True):
        if kinds[name].startswith("*"):
            divisible += [name] if argument.data_ptr() % 16 == 0 else []
        elif isinstance(argument, int) and name not in unspecialised:
            if argument == 1:
                constants[name] = 1
                del kinds[name]
            elif argument % 16 == 0:
                divisible.append(name)
    return compile_kernel(
        launch.kernel, kinds, constants, target, divisible_by_16=tuple(divisible), **launch.options
    )


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    divisible_by_16: tuple[str, ...] | None = None,
    **options: Any,
) -> Resources:
    """Compile `kernel` (a `triton.jit` function) for `target`.

    Args:
        signature: argument -> Triton type ("*bf16", "i32", "fp32", "tensordesc<bf16[64,128]>", ...).
        constants: `tl.constexpr` argument -> value.
        divisible_by_16: arguments the JIT would specialise on; all pointers where None.
        options: num_warps, num_stages, ...

    Raises:
        BackendError: the kernel was decorated in interpreter mode, or the target is unknown.
    """
    import triton
    from triton.compiler import ASTSource

    if not isinstance(kernel, triton.runtime.JITFunction):
        raise BackendError("Kernels decorated under TRITON_INTERPRET=1 cannot be compiled; unset it.")
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    if divisible_by_16 is None:
        divisible_by_16 = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    attributes = {places[name]: [["tt.divisibility", 16]] for name in divisible_by_16}
    values = {places[name]: value for name, value in constants.items()}
    source = ASTSource(kernel, types, values, attributes)
    compiled = triton.compile(source, target=gpu_target(target), options=options)
    return _resources(compiled, target)


def _resources(compiled: Any, target: str) -> Resources:
    nvidia = target.startswith("sm")
    text = compiled.asm["ptx" if nvidia else "amdgcn"]
    found = re.findall(rf"(?:{MATRIX_INSTRUCTIONS['nvidia' if nvidia else 'amd']})[\w.:]*", text)
    kinds = tuple(sorted({name[:60] for name in found}))
    registers, spill = _nvidia_usage(compiled.asm["cubin"]) if nvidia else _amd_usage(text)
    runs_on = any(kind.startswith("wgmma") for kind in kinds)
    wrong = tuple(overwritten(disassemble(compiled.asm["cubin"]))) if runs_on else ()
    return Resources(target, registers, spill, compiled.metadata.shared, len(found), kinds, text, wrong)


def _nvidia_usage(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and stack bytes per thread, by the cuobjdump that Triton carries."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    return (int(usage[1]), int(usage[2])) if usage else (None, None)


def _amd_usage(text: str) -> tuple[int | None, int | None]:
    """Vector registers and spilled bytes per lane, from the kernel's metadata."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    return (int(registers[1]) if registers else None, 4 * int(spilled[1]) if spilled else None)
