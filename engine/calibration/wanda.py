"""What a dense model's products are given while it is pruned: Wanda, as weights are loaded.

Source: Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from backbench.backends.interface import Device, Scheme, Weight
from backbench.engine.calibration.inputs import LayerByLayer
from backbench.engine.calibration.samples import CALIBRATION_SEED, LENGTH, SEQUENCES, sample_of
from backbench.engine.config import EngineConfig
from backbench.engine.models.checkpoint import DirectorySource, ModelSource
from backbench.engine.models.formats.dense import SafetensorsFiles
from backbench.engine.models.layers import Product, TensorSpec
from backbench.engine.models.on_the_fly import OnTheFly, round_product
from backbench.engine.models.weights import LayerWeights, filled
from backbench.errors import EngineError


def calibrated(source: ModelSource, config: EngineConfig, device: Device) -> ModelSource:
    """What to open with `config`: `source`, with what its products are given where Wanda is to prune them.

    They are given `config.calibrate`: "topics", a UTF-8 file, or None or "self" = sequences that the model
    draws. It is loaded dense for that, by the torch backend, and let go of; then one layer at a time is held,
    in fp32.

    Raises:
        EngineError: the model has no dense checkpoint, or the text cannot be read.
    """
    change = OnTheFly.asked(config)
    if change is None or not change.calibrated:
        return source
    dense = source.on_the_fly(None)
    if not isinstance(dense, DirectorySource):
        raise EngineError(f"{source.name} has random weights, whose inputs say nothing; prune by magnitude.")
    change.put_on(dense.config.spec)  # what cannot be pruned is refused before anything is drawn
    length = min(LENGTH, dense.config.max_len)
    text = "sampled" if config.calibrate in (None, "self") else str(config.calibrate)
    sample = sample_of(dense, None, device, text, length=length, limit=SEQUENCES, seed=CALIBRATION_SEED)
    return dense.on_the_fly(with_norms(dense, change, device, sample.sequences))


def with_norms(
    source: DirectorySource, change: OnTheFly, device: Device, sequences: Sequence[Sequence[int]]
) -> OnTheFly:
    """`change` with the norms of what every product is given on token sequences, each layer what the changed
    ones before it leave."""
    spec, norms = change.put_on(source.config.spec), dict(change.norms)
    with SafetensorsFiles(source.path) as files:

        def read(wanted: TensorSpec) -> Any:
            tensor = filled(wanted, device.torch_device, torch.float32, files.fill)
            return Weight(Scheme(), tensor) if isinstance(wanted, Product) else tensor

        walk = LayerByLayer(source.config, device, read(spec.embedding), sequences)
        for index, described in enumerate(spec.layers):
            layer = LayerWeights(**{each.role: read(each) for each in described.tensors})
            found = walk.observe(index, layer)
            for product in described.products:
                given = found[product.role].norms
                norms[product.sources[0][0]] = given
                parts = getattr(layer, product.role).q.split([rows for _, rows in product.sources])
                setattr(layer, product.role, round_product(replace(product, input_norms=given), iter(parts)))
            walk.advance(index, layer)
        if change.head:
            norms[spec.head.sources[0][0]] = walk.observe_head(read(spec.final_norm)).norms
    return replace(change, norms=norms)
