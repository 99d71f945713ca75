"""AWQ in the GEMM layout, as AutoAWQ and GPTQModel write it: four-bit codes in 32-bit words along N.

`qweight` i32 [K, N/8], `qzeros` i32 [G, N/8], `scales` [G, N]. The codes of a word are of eight neighbouring
output features, in the order that its CUDA kernel takes them apart.
Source: AutoAWQ's `utils/packing_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface import Scheme, Weight
from backbench.backends.quantization import packed, unpacked
from backbench.engine.models.fields import shown
from backbench.engine.models.quantized import (
    ROWS_AT_ONCE,
    WRITING,
    QuantizedFormat,
    StoredLinear,
    check_known,
    names_in,
)
from backbench.engine.models.schemes import Schemes, exactly, unconverted
from backbench.errors import EngineError

PLACE_OF = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output feature within a word -> the place of its code, counted from the lowest bits."""
SERVED: Mapping[str, tuple[Any, ...]] = {
    "bits": (4,),
    "method": ("awq", None),
    "pack_dtype": ("int32", None),
    "lm_head": (False, None),
    "desc_act": (False, None),
    "dynamic": (None, {}),
    "modules_in_block_to_quantize": (None, []),
    "do_fuse": (False, None),
}
"""Setting -> its values that are served."""
HONOURED = "quant_method group_size version format checkpoint_format modules_to_not_convert"
WITHOUT_EFFECT = "zero_point sym q_group_size w_bit fuse_max_seq_len modules_to_fuse"
"""The zero points are stored whatever `zero_point` and `sym` say."""


class AwqGemm(QuantizedFormat):
    """All linears of the layers, but those named otherwise."""

    method = "awq"

    def schemes(self, settings: Mapping[str, Any]) -> Schemes:
        check_known(settings, " ".join((HONOURED, WITHOUT_EFFECT, WRITING, *SERVED)), "quantization_config")
        for name, served in SERVED.items():
            if settings.get(name) not in served:
                raise EngineError(f"AWQ weights with {name} = {shown(settings.get(name))} are not read.")
        layouts = [settings.get(name) for name in ("version", "checkpoint_format", "format")]
        if odd := [each for each in layouts if each is not None and str(each).lower() != "gemm"]:
            raise EngineError(f"AWQ weights in the layout {shown(odd[0])} are not read; gemm is.")
        group = settings.get("group_size", 128)
        if isinstance(group, bool) or not isinstance(group, int) or (group != -1 and group < 1):
            raise EngineError(f"AWQ weights with a group_size of {shown(group)} are not read.")
        kept = names_in(settings, "modules_to_not_convert")
        scheme = Scheme("int4", group=None if group == -1 else group, zero_point=True)
        return Schemes((*exactly(["lm_head"]), *unconverted(kept), (".*", scheme)))

    def read(self, linear: StoredLinear) -> Weight:
        n, k, groups = linear.n, linear.k, linear.groups
        words = linear.take("qweight", (k, n // 8), torch.int32)
        zeros = linear.take("qzeros", (groups, n // 8), torch.int32)
        scale = linear.take("scales", (groups, n), torch.float16, torch.bfloat16, torch.float32)
        q = torch.empty(n, k // 2, dtype=torch.uint8)
        for part, rows in zip(words.split(ROWS_AT_ONCE, 1), q.split(8 * ROWS_AT_ONCE), strict=True):
            by_row = part.T.contiguous()
            for feature, place in enumerate(PLACE_OF):
                rows[feature::8] = packed((by_row >> (4 * place)) & 15)
        return Weight(linear.scheme, q, scale.T, _codes(zeros).T.contiguous())


FORMAT = AwqGemm()


def _codes(words: Tensor) -> Tensor:
    """uint8 [A, N] of words [A, N/8], in the order of the output features."""
    codes = unpacked(words.contiguous().view(torch.uint8))
    return codes.unflatten(1, (-1, 8))[:, :, PLACE_OF].flatten(1)
