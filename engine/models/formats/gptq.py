"""GPTQ, as AutoGPTQ, optimum and GPTQModel write it: integer codes in 32-bit words along K.

`qweight` i32 [K/f, N], `qzeros` i32 [G, N/f], `scales` [G, N], `g_idx` i32 [K], with f codes a word. Version
1 stores every zero point less one; version 2 as it is. `g_idx` says which group a feature is in: with
act-order the groups are not contiguous, and are made so here (`Weight.order`).
Source: GPTQModel's `nn_modules/qlinear` and `convert_gptq_v1_to_v2_format_module`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface import Scheme, Weight
from backbench.engine.models.fields import shown
from backbench.engine.models.quantized import (
    WRITING,
    QuantizedFormat,
    StoredLinear,
    as_codes,
    check_known,
    in_order,
    order_of,
    zero_codes,
)
from backbench.engine.models.schemes import DENSE, Schemes, exactly
from backbench.errors import EngineError

HONOURED = "quant_method bits group_size sym checkpoint_format format dynamic"
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "method": ("gptq", None),
    "pack_dtype": ("int32", None),
    "lm_head": (False, None),
    "is_marlin_format": (False, None),
    "modules_in_block_to_quantize": (None, []),
}
"""Setting -> its values that are served."""
VERSIONS = ("gptq", "gptq_v2")
ONE_IN_EACH = {4: 0x11111111, 8: 0x01010101}
"""Bits a code -> the word that adds one to every zero point of a word."""
OVERRIDDEN = "bits group_size sym"
"""What `dynamic` may say of the linears that a pattern matches, beside what has no effect."""


class Gptq(QuantizedFormat):
    """All linears of the layers, but those that `dynamic` keeps out or overrides."""

    method = "gptq"

    def schemes(self, settings: Mapping[str, Any]) -> Schemes:
        check_known(settings, " ".join((HONOURED, WRITING, *REFUSED)), "quantization_config")
        for name, served in REFUSED.items():
            if settings.get(name) not in served:
                raise EngineError(f"GPTQ weights with {name} = {shown(settings[name])} are not read.")
        if _version(settings) not in VERSIONS:
            raise EngineError(
                f"GPTQ weights in the format {shown(_version(settings))} are not read; "
                f"{' and '.join(VERSIONS)} are."
            )
        dynamic = settings.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise EngineError(f"The quantization_config's dynamic must be an object; it is {shown(dynamic)}.")
        overrides = [_override(settings, str(pattern), values) for pattern, values in dynamic.items()]
        return Schemes((*exactly(["lm_head"]), *overrides, (".*", _scheme(settings))))

    def read(self, linear: StoredLinear) -> Weight:
        scheme, n, k, groups = linear.scheme, linear.n, linear.k, linear.groups
        bits = 4 if scheme.weight == "int4" else 8
        words = linear.take("qweight", (k * bits // 32, n), torch.int32)
        order = None
        if "g_idx" in linear.unread:
            order = order_of(linear.take("g_idx", (k,), torch.int32, torch.int64), linear)
        zero = self._zero(linear, linear.take("qzeros", (groups, n * bits // 32), torch.int32), bits)
        scale = linear.take("scales", (groups, n), torch.float16, torch.bfloat16, torch.float32)
        q = in_order(as_codes(words.T, bits), order, scheme.weight)
        return Weight(scheme, q, scale.T, zero, order=order)

    def _zero(self, linear: StoredLinear, words: Tensor, bits: int) -> Tensor | None:
        """[N, G]; None where the config says that each is the middle, and it is."""
        if _version(linear.settings) == "gptq":
            # A word at a time, as the writer took them away: a zero of 0 borrowed from its neighbour.
            words = (words.long() + ONE_IN_EACH[bits]).to(torch.int32)
        zero = zero_codes(words, bits).T.contiguous()
        if linear.scheme.zero_point:
            return zero
        if (zero != (8 if bits == 4 else 0)).any():
            raise EngineError(
                f"{linear.name}.qzeros holds other zero points than the middle, though the config says sym."
            )
        return None


FORMAT = Gptq()


def _version(settings: Mapping[str, Any]) -> Any:
    return settings.get("checkpoint_format") or settings.get("format") or "gptq"


def _scheme(settings: Mapping[str, Any]) -> Scheme:
    bits, group, symmetric = settings.get("bits"), settings.get("group_size", 128), settings.get("sym", True)
    if bits not in (4, 8):
        raise EngineError(f"GPTQ weights of {shown(bits)} bits are not read; 4 and 8 are.")
    if isinstance(group, bool) or not isinstance(group, int) or (group != -1 and group < 1):
        raise EngineError(f"GPTQ weights with a group_size of {shown(group)} are not read.")
    if not isinstance(symmetric, bool):
        raise EngineError(f"GPTQ weights with a sym of {shown(symmetric)} are not read.")
    return Scheme(f"int{bits}", group=None if group == -1 else group, zero_point=not symmetric)


def _override(settings: Mapping[str, Any], pattern: str, values: Any) -> tuple[str, Scheme]:
    """A rule of `dynamic`: "-:expression" keeps linears dense, "+:expression" says how they differ."""
    if pattern.startswith("-:"):
        return pattern.removeprefix("-:"), DENSE
    if not isinstance(values, Mapping):
        raise EngineError(f"The quantization_config's dynamic has {shown(values)} for {shown(pattern)}.")
    check_known(values, f"{OVERRIDDEN} {WRITING}", "dynamic")
    return pattern.removeprefix("+:"), _scheme({**settings, **values})
