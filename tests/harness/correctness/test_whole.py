"""The reference of a divided model rounds rows as its devices do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from parallel_fixtures import WIDE

from backbench.backends.interface import PackedWeight, Scheme
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import SCHEMES, product, quantize
from backbench.engine.models.on_the_fly import OnTheFly
from backbench.engine.models.weights import random_weights
from backbench.harness.correctness.reference import PlainLinear, WideLinear
from backbench.harness.correctness.whole import ByDevice, rounded_apart


def held(scheme: Scheme) -> PackedWeight:
    generator = torch.Generator().manual_seed(3)
    return PackedWeight.of(PlainLinear(), quantize(torch.randn(24, 64, generator=generator), scheme), cpu())


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("scheme", ["fp8", "int8-w8a8"])
def test_each_device_rounds_its_own_columns_of_a_row(scheme: str, world: int) -> None:
    """What the devices' products by their own columns add up to, and not what one device computes: a column
    of large numbers takes nothing from the others' columns."""
    whole = held(SCHEMES[scheme])
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    rows[:, 1] *= 1000
    weight, size = whole.canonical(), 64 // world
    shares = [range(first, first + size) for first in range(0, 64, size)]
    wanted = sum(
        product(rows[:, share.start : share.stop], weight.columns(share.start, share.stop))
        for share in shares
    )
    for linear, dtype in ((PlainLinear(), torch.float32), (WideLinear(), torch.float64)):
        found = ByDevice(linear, world, [whole]).run(rows.to(dtype), whole)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), wanted)
        alone = ByDevice(linear, world, []).run(rows.to(dtype), whole)
        torch.testing.assert_close(alone, linear.run(rows.to(dtype), whole))
        assert (alone.float() - wanted).abs().max() > 0.1


def test_only_products_divided_by_columns_whose_rows_have_one_scale_are_rounded_apart() -> None:
    for name, apart in (("fp8", 2), ("int8-w8a8", 2), ("fp8-block", 0), ("int8", 0), ("none", 0)):
        change = None if name == "none" else OnTheFly(SCHEMES[name])
        config = replace(WIDE, on_the_fly=change)
        weights = random_weights(config, torch.device("cpu"), torch.float32)
        weights.pack(PlainLinear(), cpu())
        found = rounded_apart(config.spec, weights)
        assert len(found) == apart * config.num_layers, name
        for layer in weights.layers:
            both = (layer.attention_output, layer.down)
            assert sum(any(each is one for one in found) for each in both) == apart
