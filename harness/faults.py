"""Faults of the device and of kernels, as one line that says what to do."""

from __future__ import annotations

import errno
from types import TracebackType
from typing import Any

from backbench.errors import HarnessError

LONGEST_DETAIL = 200
"""Characters of a compiler's own message that are kept."""
ENGINE_MODULES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "psutil", "pynvml")
"""What the extra `engine` installs, as it is imported; the rest of Backbench does without."""


def explained(error: Exception) -> Exception:
    """`error` itself, or one for the user where memory ran out, a Triton kernel does not work, or the engine
    is not installed.

    Errors are told by name and by where they came from, so that neither torch nor Triton is imported here.
    """
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in ENGINE_MODULES:
        return HarnessError(
            f"This needs the engine, and {error.name} is not installed: python -m pip install "
            "'backbench[engine]' (in a checkout: -e '.[engine]')."
        )
    if any(each.__name__ == "OutOfMemoryError" for each in type(error).__mro__):  # torch's
        return HarnessError(
            "The device ran out of memory; lower --max-seqs, --max-step-tokens or --kv-memory-fraction."
        )
    if _host_is_full(error):
        return HarnessError(
            "This machine ran out of memory; use a smaller model, or lower --num-blocks, --max-seqs or "
            "--max-step-tokens."
        )
    if not _from_triton(error):
        return error
    from backbench.errors import BackendError

    kernel, module = _kernel(error.__traceback__)
    return BackendError(
        f"The Triton kernel {kernel} does not compile or launch on this device ({_detail(error)}); "
        f"serve it by torch instead: {_advice(module)}."
    )


def _host_is_full(error: Exception) -> bool:
    """Python's and numpy's error, the system's, and torch's allocator, which raises a plain RuntimeError."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    said = ("you tried to allocate", "Cannot allocate memory")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def _from_triton(error: Exception) -> bool:
    """Triton's own errors, and whatever its compiler or its native library raises."""
    if any(each.__module__.split(".")[0] == "triton" for each in type(error).__mro__):
        return True
    places = [str(frame.f_globals.get("__name__", "")) for frame in _frames(error.__traceback__)]
    return any(place.startswith(("triton.compiler", "triton.backends")) for place in places)


def _frames(traceback: TracebackType | None) -> list[Any]:
    found = []
    while traceback is not None:
        found.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return found


def _kernel(traceback: TracebackType | None) -> tuple[str, str]:
    """(name, module) of the kernel being launched: the object Triton's launch was called on."""
    for frame in _frames(traceback):
        if not str(frame.f_globals.get("__name__", "")).startswith("triton.runtime"):
            continue
        launched = frame.f_locals.get("self")
        function = getattr(launched, "fn", None)
        if callable(function) and hasattr(function, "__name__"):
            return function.__name__, str(function.__module__)
    return "(unknown)", ""


def _detail(error: Exception) -> str:
    """The last line of the compiler's message: what it says after quoting the source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return text.rstrip(".") if len(text) <= LONGEST_DETAIL else text[:LONGEST_DETAIL] + "..."


def _advice(module: str) -> str:
    """The option that takes the kernel's operation away from its backend."""
    from backbench.backends.registry import kernel_operation

    flags = {
        "attention": "--attention",
        "linear": "--linear",
        "operations": "--ops",
        "collectives": "--collectives",
    }
    flag = flags.get(kernel_operation(module) or "")
    return f"{flag} torch" if flag else "--attention, --linear or --ops torch"
