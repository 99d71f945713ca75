"""What a layer's products are given, against transformers' own modules."""

from __future__ import annotations

import pytest
import torch
from two_layers import two_layers

from backbench.backends.interface import Scheme, Weight
from backbench.backends.interface.device import cpu
from backbench.engine.calibration.inputs import InputStatistics, LayerByLayer

CPU = torch.device("cpu")
SEQUENCES = torch.randint(0, 4096, (3, 12), generator=torch.Generator().manual_seed(0)).tolist()
MODULES = {
    "qkv": "self_attn.k_proj",
    "attention_output": "self_attn.o_proj",
    "gate_up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def test_every_product_s_inputs_are_those_of_its_own_layer() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(two_layers().path, dtype=torch.float32)
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> None:
        hook = lambda module, inputs: seen.setdefault(name, []).append(inputs[0].flatten(0, -2))  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)

    names = [f"model.layers.{index}.{module}" for index in range(2) for module in MODULES.values()]
    for name in [*names, "lm_head"]:
        watch(name)
    with torch.no_grad():
        for sequence in SEQUENCES:
            model(torch.tensor([sequence]))

    source = two_layers()
    weights = source.load_weights(CPU, torch.float32)
    walk = LayerByLayer(source.config, cpu(), weights.embedding, SEQUENCES)
    for index, layer in enumerate(weights.layers):
        found = walk.observe(index, layer)
        for role, module in MODULES.items():
            check(found[role], torch.cat(seen[f"model.layers.{index}.{module}"]))
        walk.advance(index, layer)
    check(walk.observe_head(weights.final_norm), torch.cat(seen["lm_head"]))


def check(found: InputStatistics, rows: torch.Tensor) -> None:
    """fp32 through another attention: some 1e-6 of the largest element."""
    gram = rows.double().T @ rows.double()
    assert found.rows == len(rows) == 36
    assert (found.gram - gram).abs().max() < 1e-5 * gram.abs().max()
    assert torch.allclose(found.norms, rows.norm(dim=0), rtol=1e-3, atol=1e-4)
    assert torch.allclose(found.mean_magnitude, rows.abs().mean(0), rtol=1e-3, atol=1e-5)


def test_later_layers_see_what_quantized_ones_leave() -> None:
    source = two_layers()
    weights = source.load_weights(CPU, torch.float32)
    walk = LayerByLayer(source.config, cpu(), weights.embedding, SEQUENCES)
    layer = weights.layers[0]
    walk.observe(0, layer)
    before = walk.hidden[0]
    down = layer.down
    assert isinstance(down, Weight) and down.scheme == Scheme()
    layer.down = Weight(Scheme(), torch.zeros_like(down.q))
    walk.advance(0, layer)
    assert not torch.equal(walk.hidden[0], before)
    assert walk.hidden[0].shape == before.shape
    layer.down = Weight(Scheme(), down.q)
    other = LayerByLayer(source.config, cpu(), weights.embedding, SEQUENCES)
    other.advance(0, layer)
    assert (other.hidden[0] - walk.hidden[0]).norm() > 0.01 * other.hidden[0].norm()


@pytest.mark.parametrize("calls", [1, 3])
def test_rows_count_the_same_however_they_come(calls: int) -> None:
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    found = InputStatistics()
    for part in rows.chunk(calls):
        found.add(part)
    assert torch.allclose(found.gram, (rows.T @ rows).double(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.mean_magnitude, rows.abs().mean(0))
