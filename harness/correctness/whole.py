"""The reference of a model that is divided among devices: the whole of it, on the first one.

What each device holds is a part that the loading cut out. A reference on those parts would be wrong alike,
so the model is loaded once more, undivided, when nothing of the engine is needed any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from backbench.backends.quantization import ACTIVATIONS
from backbench.engine.models.weights import Weights

if TYPE_CHECKING:
    from backbench.engine.engine import Engine
    from backbench.engine.models.checkpoint import ModelSource
    from backbench.engine.models.layers import Product

TOO_LARGE = "the whole model does not fit beside a device's part; check it without --tp and --pp"


def why_not_comparable(products: tuple[Product, ...]) -> str | None:
    """Why one device computes something else than several; None = it does not."""
    for product in products:
        rounded = product.scheme.activation
        if product.shard_axis == 1 and rounded is not None and ACTIVATIONS[rounded][1:] == (None, "float"):
            return (
                f"each device rounds its own columns of {product.role}'s rows by a scale of their own, which "
                "one device does not"
            )
    return None


def whole_weights(engine: Engine, source: ModelSource) -> Weights | None:
    """The undivided weights on the engine's first device; None where they do not fit. Closes the engine."""
    engine.close()
    at = engine.selection.device.torch_device
    if at.type == "cuda":
        torch.cuda.empty_cache()
    try:
        return source.load_weights(at, engine.decoder.dtype)
    except torch.cuda.OutOfMemoryError:
        return None
