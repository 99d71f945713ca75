"""Compare the logits of checkpoints from `bench quantize` between transformers and this engine, on a CPU.

    pip install compressed-tensors==0.19.0
    python tools/check_with_transformers.py DIR...

One line a directory: the relative difference of the logits of 32 prompts, the median and the largest. The
exit code is 1 where a median is above what rounding explains, 2e-6.

Both compute in fp32, and sums in another order make 2e-7. Where rows are rounded, too, such a last bit
decides a code of one prompt in five or so, whose logits then differ by a hundredth: hence short prompts and
their median. Were rows not rounded at all, every prompt would differ by as much.

compressed-tensors makes dense weights of 4-bit floats only in bf16, so these go through bf16 here as well.
NVFP4's scale times global scale has few digits, and a weight may lie halfway between two numbers of bf16; a
last bit then decides between them, in either order of the factors. All such weights of a product, 6 % of one,
made 1.4e-3; 4e-3 is allowed, a sixteenth of what NVFP4 itself makes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbench.backends.interface import Linear, Weight
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import dequantize, meant_rows
from backbench.backends.registry import select
from backbench.engine.limits import StepLimits
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.decoder import Decoder, attention_specs, whole_sequences

PROMPTS, TOKENS = 32, 2
MOST = 2e-6
MOST_OF_NVFP4 = 4e-3
LIMITS = StepLimits(block_size=16, max_len=16, max_seqs=1, max_step_tokens=16, prefill_chunk=16)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ByDefinition(Linear):
    """Every product as `backends.quantization` defines it, of dense weights that went through `dtype`."""

    dtype: torch.dtype
    name = "definition"

    def refusals(self, spec: Any, device: Any) -> list[str]:
        return []

    def pack(self, weight: Weight, device: Any) -> Weight:
        return weight

    def run(self, x: Tensor, packed: Weight, bias: Tensor | None = None) -> Tensor:
        dense = dequantize(packed, torch.float32 if packed.scheme.dense else self.dtype).float()
        return torch.nn.functional.linear(meant_rows(x, packed), dense, bias)


def main() -> int:
    wrong = False
    for folder in map(Path, sys.argv[1:]):
        median, largest = differences(folder)
        config = find_model(str(folder)).config
        print(
            f"{folder.name:24} {config.quantization!s:20} median {median:.1e}, largest {largest:.1e}",
            flush=True,
        )
        wrong |= not median <= most(config)
    return int(wrong)


def most(config: ModelConfig) -> float:
    """What rounding explains of a prompt's relative difference."""
    nvfp4 = any(product.scheme.scale == "e4m3" for product in config.spec.products)
    return MOST_OF_NVFP4 if nvfp4 else MOST


def differences(folder: Path) -> tuple[float, float]:
    """Of all prompts' relative differences the median and the largest."""
    config = find_model(str(folder)).config
    bf16 = any(product.scheme.weight == "fp4" for product in config.spec.products)
    dtype = torch.bfloat16 if bf16 else torch.float32
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(0, config.vocab_size, (PROMPTS, TOKENS), generator=generator)
    expected = by_transformers(folder, prompts, dtype).flatten(1)
    found = by_engine(folder, prompts, dtype).flatten(1)
    relative = (found - expected).norm(dim=1) / expected.norm(dim=1)
    return float(relative.median()), float(relative.max())


def by_transformers(folder: Path, prompts: Tensor, dtype: torch.dtype) -> Tensor:
    """f32 [PROMPTS, TOKENS, V]; dtype: what the first pass makes dense weights in."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        model(prompts[:1])  # the first pass makes the weights dense
        torch.nn.Module.float(model)  # the model's own refuses, for the sake of weights that are not
        return torch.cat([model.eval()(prompt[None]).logits for prompt in prompts])


def by_engine(folder: Path, prompts: Tensor, dtype: torch.dtype) -> Tensor:
    """f32 [PROMPTS, TOKENS, V]; dtype: what dequantized weights are rounded to."""
    source = find_model(str(folder))
    specs = attention_specs(source.config, dtype=torch.float32, limits=LIMITS)
    products = source.config.spec.weight_specs(torch.float32)
    selection = select("torch", device=cpu(), specs=specs, weights=products, dtype=torch.float32)
    selection = replace(selection, linear=ByDefinition(dtype))
    weights = source.load_weights(CPU, torch.float32)
    decoder = Decoder(source.config, weights, selection, dtype=torch.float32, limits=LIMITS)
    batch = whole_sequences([TOKENS], LIMITS.block_size, CPU)
    places, caches = torch.arange(TOKENS), decoder.new_caches(LIMITS.blocks_per_seq)
    return torch.stack([decoder.logits(decoder.forward(ids, places, batch, caches)) for ids in prompts])


if __name__ == "__main__":
    sys.exit(main())
