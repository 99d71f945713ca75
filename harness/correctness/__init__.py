"""Is the answer right: what the engine computes, against the torch backend on the same weights.

A fast wrong answer is worth nothing, so every run ends with this check: the log-probabilities of whole
sequences (`check`), each layer's attention head by head (`attention`) and each quantized product
(`products`), against torch in the model's dtype and in a wider one (`reference`), which shows what the
dtype's rounding alone does.
"""

from backbench.harness.correctness.check import check, longest_context

__all__ = ["check", "longest_context"]
