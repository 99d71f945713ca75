"""compressed-tensors, read and written as llm-compressor does: integers, fp8, NVFP4, MXFP4 and MXFP8.

Source: the library's `quantization/quant_args.py` and `compressors/` (version 0.19).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface import Scheme, Weight
from backbench.backends.quantization import FP8
from backbench.engine.models.fields import shown
from backbench.engine.models.formats.dense import DTYPES
from backbench.engine.models.quantized import (
    QuantizedFormat,
    StoredLinear,
    as_codes,
    check_known,
    in_order,
    names_in,
    order_of,
    zero_codes,
)
from backbench.engine.models.schemes import DENSE, Schemes
from backbench.errors import EngineError

TOP = (
    "quant_method config_groups format ignore kv_cache_scheme quantization_status sparsity_config "
    "transform_config version global_compression_ratio"
)
GROUP = "targets weights input_activations output_activations format"
NUMBERS = (
    "num_bits type symmetric strategy group_size block_structure dynamic actorder scale_dtype zp_dtype "
    "observer observer_kwargs"
)
DEFAULTS: Mapping[str, Any] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "dynamic": False,
    **dict.fromkeys(("strategy", "group_size", "block_structure", "scale_dtype")),
}
"""Of `NUMBERS`, what is read and what an absent one means."""
KNOWN: Mapping[str, tuple[Any, ...]] = {
    "num_bits": tuple(range(1, 17)),
    "type": ("int", "float"),
    "symmetric": (True, False),
    "dynamic": (True, False, "local"),
    "strategy": (None, "tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"),
}
"""What the library itself takes."""
LINEAR_CLASS = "Linear"
HEAD = "lm_head"
PACKING = {
    ("int4", "float"): ("pack-quantized",),
    ("int8", "float"): ("pack-quantized", "int-quantized", "naive-quantized"),
    ("fp8", "float"): ("float-quantized", "naive-quantized"),
    ("fp8", "e8m0"): ("mxfp8-quantized",),
    ("fp4", "e4m3"): ("nvfp4-pack-quantized",),
    ("fp4", "e8m0"): ("mxfp4-pack-quantized",),
}
"""(`Scheme.weight`, `Scheme.scale`) -> the layouts it is read from."""
ROUNDINGS = {
    ("int", 8, "token", True, None): "int8-token",
    ("int", 8, "tensor", False, None): "int8-tensor",
    ("float", 8, "token", True, None): "fp8-token",
    ("float", 8, "tensor", False, None): "fp8-tensor",
    ("float", 8, "group", True, 128): "fp8-group128",
    ("float", 8, "group", True, 32): "mxfp8",
    ("float", 4, "group", True, 32): "mxfp4",
    ("float", 4, "tensor_group", "local", 16): "nvfp4",
}
"""(type, bits, strategy, dynamic, group) of `input_activations` -> `Scheme.activation`."""
POWERS_OF_TWO = "torch.uint8"
"""`scale_dtype` of e8m0 scales."""
SCALE_DTYPES = {"float": None, "e8m0": POWERS_OF_TWO, "e4m3": "torch.float8_e4m3fn"}
"""`Scheme.scale` -> `scale_dtype`."""
VERSION = "0.19.0"
"""Of the library whose layouts are written."""


class CompressedTensors(QuantizedFormat):
    """Linears by groups of the config; the names of their tensors say how each is packed."""

    method = "compressed-tensors"

    def schemes(self, settings: Mapping[str, Any]) -> Schemes:
        check_known(settings, TOP, "quantization_config")
        _check_top(settings)
        ignored = [(_pattern(name), DENSE) for name in names_in(settings, "ignore")]
        exact: list[tuple[str, Scheme]] = []
        patterns: list[tuple[str, Scheme]] = []
        classes: list[tuple[str, Scheme]] = []
        for group in settings["config_groups"].values():
            targets = names_in(group, "targets")
            scheme = _scheme(group, str(settings.get("format")))
            for target in targets:
                kind = classes if target == LINEAR_CLASS else patterns if target.startswith("re:") else exact
                kind.append((target, scheme))
        # As `match_targets` of the library: names before expressions before classes, each sorted.
        rules = [*sorted(exact, key=_target), *sorted(patterns, key=_target), *classes]
        return Schemes((*ignored, *((_pattern(target), scheme) for target, scheme in rules)))

    def read(self, linear: StoredLinear) -> Weight:
        scheme = linear.scheme
        linear.take_zeros("input_zero_point", *(() if scheme.zero_point else ("weight_zero_point",)))
        if scheme.weight == "fp4":
            return _fp4(linear)
        if scheme.weight == "int4" or "weight_packed" in linear.unread:
            return _packed_integers(linear)
        if scheme.zero_point:
            raise EngineError(f"{linear.name} has zero points and is not packed; it is not read.")
        q = linear.take("weight", (linear.n, linear.k), FP8 if scheme.weight == "fp8" else torch.int8)
        return Weight(scheme, q, _scale(linear), input_scale=_input_scale(linear))


FORMAT = CompressedTensors()


def _packed_integers(linear: StoredLinear) -> Weight:
    """Unsigned codes in 32-bit words along K; zero points in words along N."""
    scheme, n, k = linear.scheme, linear.n, linear.k
    bits = 4 if scheme.weight == "int4" else 8
    words = linear.take("weight_packed", (n, -(-k * bits // 32)), torch.int32)
    if "weight_shape" in linear.unread:
        shape = linear.take("weight_shape", (2,), torch.int64, torch.int32).tolist()
        if shape != [n, k]:
            raise EngineError(f"{linear.name}.weight_shape is {shape}; the config asks for {[n, k]}.")
    zero, order = None, None
    if scheme.zero_point:
        stored = linear.take("weight_zero_point", (-(-n * bits // 32), linear.groups), torch.int32)
        zero = zero_codes(stored.T, bits)[:, :n].T.contiguous()
    if "weight_g_idx" in linear.unread:
        order = order_of(linear.take("weight_g_idx", (k,), torch.int32, torch.int64), linear)
    q = as_codes(words, bits)[:, : k * bits // 8]
    return Weight(scheme, in_order(q, order, scheme.weight), _scale(linear), zero, order=order)


def _fp4(linear: StoredLinear) -> Weight:
    n, k, scheme = linear.n, linear.k, linear.scheme
    q = linear.take("weight_packed", (n, k // 2), torch.uint8)
    if scheme.scale == "e8m0":
        return Weight(scheme, q, linear.take("weight_scale", linear.scale_shape, torch.uint8))
    scale = linear.take("weight_scale", linear.scale_shape, FP8)
    row_scale = (1 / linear.take_number("weight_global_scale")).repeat(n)
    rounded = scheme.activation == "nvfp4"
    input_scale = 1 / linear.take_number("input_global_scale") if rounded else None
    return Weight(scheme, q, scale, row_scale=row_scale, input_scale=input_scale)


def _scale(linear: StoredLinear) -> Tensor:
    """Scales [R, G]; one of the whole tensor is every row's."""
    if linear.scheme.scale == "e8m0":
        return linear.take("weight_scale", linear.scale_shape, torch.uint8)
    if linear.scheme.group is None and linear.size("weight_scale") == 1:
        return linear.take_number("weight_scale").expand(linear.n, 1)
    return linear.take("weight_scale", linear.scale_shape, *DTYPES)


def _input_scale(linear: StoredLinear) -> Tensor | None:
    static = linear.scheme.activation in ("int8-tensor", "fp8-tensor")
    return linear.take_number("input_scale") if static else None


def _check_top(settings: Mapping[str, Any]) -> None:
    status = settings.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):  # as it was called until 2024
        raise EngineError(
            f"A checkpoint of quantization_status {shown(status)} is not read; save it compressed."
        )
    for name in ("kv_cache_scheme", "transform_config"):
        if settings.get(name):
            raise EngineError(f"The quantization_config's {name} is not served; only null is.")
    sparsity = settings.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise EngineError(f"The quantization_config's sparsity_config {shown(sparsity)} is not read.")
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise EngineError("The quantization_config's config_groups must be an object of objects.")


def _scheme(group: Mapping[str, Any], layout: str) -> Scheme:
    """What a config group keeps its linears in."""
    check_known(group, GROUP, "config_groups")
    if group.get("output_activations"):
        raise EngineError("Rounding of output_activations is not served.")
    scheme = _weights(_numbers(group.get("weights"), "weights"), _activation(group.get("input_activations")))
    layout = str(group.get("format") or layout)
    read = PACKING[scheme.weight, scheme.scale]
    if layout not in read:
        raise EngineError(f"Weights of {scheme} in the format {shown(layout)} are not read; {read[0]} is.")
    return scheme


def _weights(numbers: Mapping[str, Any], activation: str | None) -> Scheme:
    kind, bits, strategy = numbers["type"], numbers["num_bits"], numbers["strategy"]
    group, symmetric, powers = (
        numbers["group_size"],
        numbers["symmetric"],
        numbers["scale_dtype"] == POWERS_OF_TWO,
    )
    said = f"{bits}-bit {kind} by {strategy}"
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8), ("float", 4)):
        raise EngineError(f"Weights of {said} are not read; int of 4 or 8 bits and float of 8 or 4 are.")
    if numbers["dynamic"]:
        raise EngineError(f"Weights of {said} cannot be dynamic.")
    if kind == "int":
        if strategy not in ("group", "channel", "tensor"):
            raise EngineError(f"Weights of {said} are not read; by group, channel or tensor they are.")
        return Scheme(f"int{bits}", group=group, zero_point=not symmetric, activation=activation)
    if not symmetric:
        raise EngineError(f"Weights of {said} with zero points are not read.")
    if bits == 4:
        kinds = {("tensor_group", 16, False): "e4m3", ("group", 32, True): "e8m0"}
        if (strategy, group, powers) not in kinds:
            raise EngineError(f"Weights of {said} of {group} are not read; NVFP4's and MXFP4's are.")
        return Scheme("fp4", group=group, scale=kinds[strategy, group, powers], activation=activation)
    if strategy == "block":
        rows, columns = numbers["block_structure"]
        return Scheme("fp8", group=columns, group_n=rows, activation=activation)
    if strategy not in ("tensor", "channel", "group"):
        raise EngineError(f"Weights of {said} are not read; by tensor, channel, group or block they are.")
    return Scheme("fp8", group=group, scale="e8m0" if powers else "float", activation=activation)


def _activation(stated: Any) -> str | None:
    if not stated:
        return None
    numbers = _numbers(stated, "input_activations")
    kind, bits, strategy = numbers["type"], numbers["num_bits"], numbers["strategy"]
    key = (kind, bits, strategy, numbers["dynamic"], numbers["group_size"])
    powers = numbers["scale_dtype"] == POWERS_OF_TWO
    rounding = ROUNDINGS.get(key)
    if rounding is None or not numbers["symmetric"] or powers != rounding.startswith("mx"):
        how = "dynamic" if numbers["dynamic"] else "static"
        raise EngineError(
            f"Activations of {bits}-bit {kind} by {strategy}, {how}"
            f"{'' if numbers['symmetric'] else ', with zero points'}, are not served."
        )
    return rounding


def _numbers(stated: Any, where: str) -> dict[str, Any]:
    """A group's `weights` or `input_activations`, with the library's defaults and of sane types."""
    if not isinstance(stated, Mapping):
        raise EngineError(f"The config_groups' {where} must be an object; it is {shown(stated)}.")
    check_known(stated, NUMBERS, where)
    found = {**DEFAULTS, **stated}
    for name in DEFAULTS:
        known = KNOWN.get(name, (found[name],))
        if found[name] not in known or not isinstance(found[name], str | int | list | None):
            raise EngineError(f"The {where} have a {name} of {shown(found[name])}, which is unknown here.")
    if found["group_size"] == -1:
        found["group_size"] = None
        found["strategy"] = found["strategy"] or "channel"
    found["strategy"] = found["strategy"] or ("group" if found["group_size"] else "tensor")
    group, block = found["group_size"], found["block_structure"]
    grouped = found["strategy"] in ("group", "tensor_group")
    if grouped != (group is not None) or (group is not None and not _is_size(group)):
        raise EngineError(f"The {where} by {found['strategy']} have a group_size of {shown(group)}.")
    if (found["strategy"] == "block") != (
        isinstance(block, list) and len(block) == 2 and all(map(_is_size, block))
    ):
        raise EngineError(f"The {where} by {found['strategy']} have a block_structure of {shown(block)}.")
    return found


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _target(rule: tuple[str, Scheme]) -> str:
    return rule[0]


def _pattern(target: str) -> str:
    """A target as a regular expression of the linear's name."""
    if target == LINEAR_CLASS:
        return ".*"
    return target.removeprefix("re:") if target.startswith("re:") else f"{re.escape(target)}$"


def settings_for(scheme: Scheme, *, head: bool) -> dict[str, Any]:
    """The `quantization_config` of a model whose linears are kept in `scheme`; head: the output head, too.

    For the schemes of `--quantize`: no zero points, no static activations. The head is named, since its
    class in vLLM is no linear's (vllm-project/vllm#37291).
    """
    layout = _layout(scheme)
    blocks = scheme.group_n > 1
    grouped = "tensor_group" if scheme.scale == "e4m3" else "group"
    weights = {
        "num_bits": int(scheme.weight[-1]),
        "type": "float" if scheme.weight.startswith("fp") else "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "block" if blocks else grouped if scheme.group else "channel",
        "group_size": None if blocks else scheme.group,
        "block_structure": [scheme.group_n, scheme.group] if blocks else None,
        "scale_dtype": SCALE_DTYPES[scheme.scale],
    }
    group = {
        "targets": [LINEAR_CLASS, f"re:.*{HEAD}$"] if head else [LINEAR_CLASS],
        "format": layout,
        "weights": weights,
        "input_activations": None if scheme.activation is None else _rounding(scheme.activation),
        "output_activations": None,
    }
    return {
        "quant_method": CompressedTensors.method,
        "quantization_status": "compressed",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": [] if head else [HEAD],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": VERSION,
    }


def stored(weight: Weight) -> dict[str, Tensor]:
    """What a linear's weight is kept as, suffix of its name -> tensor: what `CompressedTensors.read` reads.

    For the schemes of `--quantize`. NVFP4's `weight_global_scale` is one number: all rows share theirs.
    """
    scheme = weight.scheme
    assert weight.scale is not None
    found = {"weight_scale": weight.scale}
    if scheme.weight == "fp4":
        found["weight_packed"] = weight.q
        if weight.row_scale is not None:
            found["weight_global_scale"] = 1 / weight.row_scale[:1]
    elif _layout(scheme) == "pack-quantized":
        octets = weight.q if scheme.weight == "int4" else weight.q.view(torch.uint8) ^ 128
        short = -octets.shape[1] % 4
        found["weight_packed"] = torch.nn.functional.pad(octets, (0, short)).contiguous().view(torch.int32)
        found["weight_shape"] = torch.tensor([weight.n, weight.k])
    else:
        found["weight"] = weight.q
    return found


def _layout(scheme: Scheme) -> str:
    """Of those `PACKING` reads the first, as the library's presets: plain int8 only where rows are, too."""
    plain = scheme.weight == "int8" and scheme.activation is not None
    return "int-quantized" if plain else PACKING[scheme.weight, scheme.scale][0]


def _rounding(activation: str) -> dict[str, Any]:
    """The `input_activations` that `ROUNDINGS` reads so."""
    kind, bits, strategy, dynamic, group = next(key for key, name in ROUNDINGS.items() if name == activation)
    return {
        "type": kind,
        "num_bits": bits,
        "strategy": strategy,
        "dynamic": dynamic,
        "group_size": group,
        "symmetric": True,
    }
