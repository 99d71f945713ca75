"""FlashAttention 3 (`fa3-fwd`, prebuilt for CUDA 13): no paging, windows or fp16 in the released build."""

from __future__ import annotations

import torch

from backbench.backends.dependency import Release
from backbench.backends.flash.gathered import KEYWORDS, GatheredRunner
from backbench.backends.flash.library import Library
from backbench.backends.interface import AttentionRunner, AttentionSpec, Device

MODULE = "fa3_fwd_interface"
FUNCTION = "flash_attn_varlen_func"


class FlashAttention3(Library):
    """Hopper's fastest prefill, on gathered keys."""

    key = "fa3"
    release = Release("fa3-fwd", "0.0.3")
    arches = ("sm90",)
    dtypes = (torch.bfloat16,)

    def limits(self, spec: AttentionSpec, device: Device) -> list[str]:
        return ["this build has no sliding window"] if spec.window is not None else []

    def open(self, spec: AttentionSpec, device: Device) -> AttentionRunner:
        return GatheredRunner(spec, device, self.release.function(MODULE, FUNCTION, KEYWORDS))
