"""Where a run came from: the machine and the software, with names that identify people left out."""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def redact(text: str) -> str:
    """`text` without this machine's name, home directories, user name and UUIDs."""
    home = str(Path.home())
    if len(home) > 1:
        text = text.replace(home, "~")
    text = re.sub(r"/(home|Users)/[^/\s]+", "~", text)
    for name in {socket.gethostname(), socket.getfqdn(), platform.node()}:
        if name and name != "localhost":
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "<host>", text)
    return re.sub(r"\b(GPU-|MIG-)?[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b", "<serial>", text)


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
    """The record's `software` section: versions, torch's GPU toolkit, and this product's git state."""
    import torch

    from backbench.backends.dependency import installed_version

    sha, dirty = git_state(Path(__file__).parent)
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := installed_version(name)) is not None},
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "torch_threads": torch.get_num_threads(),
        "git_sha": sha,
        "git_dirty": dirty,
        "environment": _environment(),
    }


def _environment() -> dict[str, str]:
    """Set variables that change what the libraries compute or how fast."""
    names = re.compile(r"(TRITON|TORCH|PYTORCH|CUDA|HIP|ROCR|OMP|GOMP|MKL|NVIDIA_TF32|CUBLAS)(_|$)")
    return {name: redact(value) for name, value in sorted(os.environ.items()) if names.match(name)}


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
