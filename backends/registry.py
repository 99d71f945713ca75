"""Finding backends by name, and choosing what serves each operation."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch

from backbench.backends import composite
from backbench.backends.interface import (
    AttentionSpec,
    Backend,
    Device,
    Kernels,
    Scheme,
    Selection,
    WeightSpec,
)
from backbench.backends.quantization import name_of
from backbench.errors import BackendError

BUILT_IN = ("torch", "triton", "sdpa", "flash", "rocm")
ENTRY_POINTS = "backbench.backends"
OPERATIONS = ("attention", "linear", "operations")
BETWEEN_DEVICES = "collectives"
"""What several devices need on top."""
AUTO_ORDER: Mapping[str, tuple[str, ...]] = {
    "nvidia": ("triton", "flash", "sdpa", "torch"),
    "amd": ("rocm", "triton", "sdpa", "torch"),
    "cpu": ("torch",),
}
"""Vendor -> the backends `auto` tries, best first."""


def names() -> list[str]:
    """Every backend there is: built-in ones, then those that installed packages add.

    Raises:
        BackendError: two backends have the same name.
    """
    found = [name for name in BUILT_IN if find_spec(f"backbench.backends.{name}") is not None]
    for point in _entry_points():
        if point.name in found:
            raise BackendError(f"Two backends are named {point.name!r}; uninstall or rename {point.value}.")
        found.append(point.name)
    return found


def load(name: str) -> Backend:
    """The backend called `name`; its module is imported only now.

    "flash:fa4" is one variant of a backend, "prefill=flash,decode=triton" a mix of two, which leaves
    everything but attention to the one that decodes. "path/to/mine.py" is a file with a `BACKEND`.

    Raises:
        BackendError: no such backend or variant, or its module cannot be imported.
    """
    if "=" in name:
        return composite.mixed_backend(name, load)
    name, colon, pin = name.partition(":")
    if colon:
        return _pinned(load(name), pin)
    if name.endswith(".py"):
        return _from_file(Path(name))
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known) or known
        raise BackendError(f"Unknown backend {name!r}; did you mean {' or '.join(close)}?")
    try:
        if name in BUILT_IN:
            backend = getattr(importlib.import_module(f"backbench.backends.{name}"), "BACKEND", None)
        else:
            backend = next(point for point in _entry_points() if point.name == name).load()
    except ImportError as error:
        raise BackendError(f"Backend {name!r} cannot be imported: {error}.") from error
    if not isinstance(backend, Backend) or backend.name != name:
        raise BackendError(f"Backend {name!r} does not export a Backend of that name; mend its module.")
    return backend


def _from_file(path: Path) -> Backend:
    """The `BACKEND` of a Python file, run once in a process."""
    if not path.is_file():
        raise BackendError(f"There is no backend file {str(path)!r}; give the path of a Python file.")
    path = path.resolve()
    name = f"backbench_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    module = sys.modules.get(name)
    if module is None:
        spec = spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if not isinstance(error, Exception):
                raise
            what = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise BackendError(f"Backend file {path.name!r} cannot be run: {what}.") from error
    backend = getattr(module, "BACKEND", None)
    if not isinstance(backend, Backend):
        raise BackendError(f"Backend file {path.name!r} exports no `BACKEND = Backend(...)`; add one.")
    return backend


def _pinned(backend: Backend, pin: str) -> Backend:
    """The backend with its attention pinned to one variant."""
    if pin not in backend.variants:
        offered = ", ".join(f"{backend.name}:{each}" for each in backend.variants) or "none"
        raise BackendError(f"Backend {backend.name!r} has no variant {pin!r}; it offers {offered}.")
    return replace(backend, name=f"{backend.name}:{pin}", attention=backend.variants[pin])


def kernel_operation(module: str) -> str | None:
    """Which operation the kernels of a Python module compute, by what the backends say of theirs."""
    for name in names():
        try:
            kernels = load(name).kernels
        except BackendError:  # a backend that cannot be imported launched nothing
            continue
        if kernels is not None and module in kernels.operations:
            return kernels.operations[module]
    return None


def select(
    name: str,
    *,
    device: Device,
    specs: Sequence[AttentionSpec],
    dtype: torch.dtype,
    weights: Sequence[WeightSpec] = (),
    overrides: Mapping[str, str] | None = None,
    world: int = 1,
) -> Selection:
    """What serves each operation when backend `name` (or "auto") is asked for.

    Args:
        specs: the model's distinct attention layers; all must be served.
        weights: the model's products; all must be served. Empty = one as wide as each attention layer.
        overrides: operation ("attention", "linear", "operations") -> the backend that serves it instead;
            for attention also one backend a role, "prefill=flash,decode=triton".
        world: devices that share the model; several need "collectives", too, which can be overridden.

    Raises:
        BackendError: something asked for cannot be served; all reasons are named, and what would work.
    """
    overrides = dict(overrides or {})
    weights = weights or ordinary_weights(specs, dtype)
    known = (*OPERATIONS, BETWEEN_DEVICES)
    for operation in overrides:
        if operation not in known:
            raise BackendError(f"Unknown operation {operation!r}; override one of {', '.join(known)}.")
    if BETWEEN_DEVICES in overrides and world == 1:
        raise BackendError("--collectives is for several devices; give --tp as well.")
    if name == "auto":
        return _select_auto(device, specs, weights, dtype, overrides, world)
    backend = load(name)
    selection = _assemble(backend, name, device, overrides, world=world)
    if reasons := _reasons(selection, specs, weights, dtype, world):
        working = [
            other
            for other in names()
            if other != name and _works(other, device, specs, weights, dtype, world)
        ]
        advice = f"these would: {', '.join(working)}" if working else "no other backend could either"
        raise BackendError(f"Backend {name!r} cannot serve this: {'; '.join(reasons)} ({advice}).")
    return replace(selection, spec=next(iter(specs), None), weights=tuple(weights))


def ordinary_weights(specs: Sequence[AttentionSpec], dtype: torch.dtype) -> list[WeightSpec]:
    """A square product as wide as each layer: what is asked where no model is known."""
    widths = dict.fromkeys(spec.q_heads * spec.head_dim for spec in specs)
    return [WeightSpec("any", width, width, Scheme(), dtype) for width in widths]


def availability(device: Device) -> list[tuple[str, bool, list[str]]]:
    """(name, available, reasons why not) of every backend, judged on an ordinary layer."""
    dtype = torch.float32 if device.vendor == "cpu" else torch.bfloat16
    spec = AttentionSpec(8, 2, 64, dtype, dtype, block_size=16, scale=0.125)
    weights = ordinary_weights([spec], dtype)
    rows = []
    for name in names():
        try:
            reasons = _reasons(_assemble(load(name), name, device, {}), [spec], weights, dtype)
        except BackendError as error:
            reasons = [str(error)]
        rows.append((name, not reasons, reasons))
    return rows


def _entry_points() -> list[EntryPoint]:
    return sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)


def _select_auto(
    device: Device,
    specs: Sequence[AttentionSpec],
    weights: Sequence[WeightSpec],
    dtype: torch.dtype,
    overrides: Mapping[str, str],
    world: int,
) -> Selection:
    """The first backend of the vendor's written order that serves everything."""
    passed_over: dict[str, Sequence[str]] = {}
    known = names()
    for name in AUTO_ORDER[device.vendor]:
        if name not in known:
            continue
        try:
            selection = _assemble(load(name), "auto", device, overrides, passed_over, world)
        except BackendError as error:
            passed_over[name] = [str(error)]
            continue
        reasons = _reasons(selection, specs, weights, dtype, world)
        if not reasons:
            return replace(selection, spec=next(iter(specs), None), weights=tuple(weights))
        passed_over[name] = reasons
    tried = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in passed_over.items())
    raise BackendError(f"No backend serves this model on {device.name}: {tried}.")


def _assemble(
    backend: Backend,
    asked: str,
    device: Device,
    overrides: Mapping[str, str],
    passed_over: dict[str, Sequence[str]] | None = None,
    world: int = 1,
) -> Selection:
    """The backend's own operations, the overrides, and its base for what it lacks."""

    def provider(operation: str) -> Backend:
        chosen = load(overrides[operation]) if operation in overrides else backend
        while getattr(chosen, operation) is None:
            if operation in overrides or chosen.base is None:
                raise BackendError(f"Backend {chosen.name!r} offers no {operation}; choose another for it.")
            chosen = load(chosen.base)
        return chosen

    attention, linear, operations = providers = [provider(operation) for operation in OPERATIONS]
    assert attention.attention and linear.linear and operations.operations
    between = provider(BETWEEN_DEVICES) if world > 1 else None
    kernels: list[Kernels] = []
    for serving in [*providers, *([] if between is None else [between])]:
        if serving.kernels is not None and serving.kernels not in kernels:
            kernels.append(serving.kernels)
    return Selection(
        asked,
        device,
        attention.attention,
        linear.linear,
        operations.operations,
        passed_over or {},
        kernels=tuple(kernels),
        collectives=None if between is None else between.collectives,
    )


def _reasons(
    selection: Selection,
    specs: Sequence[AttentionSpec],
    weights: Sequence[WeightSpec],
    dtype: torch.dtype,
    world: int = 1,
) -> list[str]:
    """Why the selection cannot serve the model; empty = it can.

    Each reason is given once, with the operations and the quantized roles it holds for.
    """
    device, attention = selection.device, selection.attention
    linear, operations = selection.linear, selection.operations
    refused = [("attention", attention.name, attention.refusals(spec, device)) for spec in specs]
    refused += [(_asked(weight), linear.name, linear.refusals(weight, device)) for weight in weights]
    refused += [("operations", operations.name, operations.refusals(dtype, device))]
    if between := selection.collectives:
        refused += [(BETWEEN_DEVICES, between.name, between.refusals(device, world))]
    found: dict[tuple[str, str], dict[str, None]] = {}
    for operation, name, reasons in refused:
        for why in reasons:
            found.setdefault((name, why), {})[operation] = None
    return [f"{name} {', '.join(served)}: {why}" for (name, why), served in found.items()]


def _asked(weight: WeightSpec) -> str:
    """The operation, and for a quantized weight its role and scheme."""
    return "linear" if weight.scheme == Scheme() else f"linear {weight.role} as {name_of(weight.scheme)}"


def _works(
    name: str,
    device: Device,
    specs: Sequence[AttentionSpec],
    weights: Sequence[WeightSpec],
    dtype: torch.dtype,
    world: int,
) -> bool:
    try:
        selection = _assemble(load(name), name, device, {}, world=world)
        return not _reasons(selection, specs, weights, dtype, world)
    except BackendError:
        return False
