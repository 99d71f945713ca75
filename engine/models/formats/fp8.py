"""DeepSeek's fp8: blocks of 128 x 128 weights with one scale, as most official FP8 releases are.

Source: FineGrainedFP8Config and FP8Linear of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from backbench.backends.interface import Scheme, Weight
from backbench.backends.quantization import FP8
from backbench.engine.models.fields import shown
from backbench.engine.models.quantized import QuantizedFormat, StoredLinear, check_known, names_in
from backbench.engine.models.schemes import Schemes, exactly, unconverted
from backbench.errors import EngineError

SETTINGS = (
    "quant_method activation_scheme weight_block_size fmt scale_fmt modules_to_not_convert ignored_layers "
    "dequantize modules_to_convert expert_dtype"
)
"""No model here has experts, whatever their dtype is said to be."""
SERVED = {
    "activation_scheme": ("dynamic",),
    "fmt": ("e4m3", None),
    "scale_fmt": ("float", None),
    "dequantize": (False, None),
    "modules_to_convert": (None, []),
    "weight_block_size": ([128, 128],),
}
"""Setting -> its values that are served."""


class BlockFp8(QuantizedFormat):
    """Every linear but the head's and those named otherwise."""

    method = "fp8"

    def schemes(self, settings: Mapping[str, Any]) -> Schemes:
        check_known(settings, SETTINGS, "quantization_config")
        stated = {"activation_scheme": "dynamic", "weight_block_size": [128, 128], **settings}
        for name, served in SERVED.items():
            if stated.get(name) not in served:
                raise EngineError(
                    f"fp8 weights with {name} = {shown(stated.get(name))} are not read; "
                    f"only {shown(served[0])} is."
                )
        kept = names_in(settings, "modules_to_not_convert") or names_in(settings, "ignored_layers")
        scheme = Scheme("fp8", group=128, group_n=128, activation="fp8-group128")
        return Schemes((*exactly(["lm_head"]), *unconverted(kept), (".*", scheme)))

    def read(self, linear: StoredLinear) -> Weight:
        q = linear.take("weight", (linear.n, linear.k), FP8)
        scale = linear.take("weight_scale_inv", linear.scale_shape, torch.float32, torch.bfloat16)
        return Weight(linear.scheme, q, scale)


FORMAT = BlockFp8()
