"""What a decoder is made of, by hand; and that weights, counts and products all follow from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backbench.backends.interface import Scheme, Weight, WeightSpec
from backbench.backends.quantization import dequantize, quantize
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.layers import LayerSpec, Shard
from backbench.engine.models.rope import RopeConfig
from backbench.engine.models.weights import RANDOM_SEED, RANDOM_STD, random_weights
from backbench.errors import BackendError

CPU = torch.device("cpu")


def config(**changes) -> ModelConfig:
    plain = ModelConfig(
        architecture="any",
        vocab_size=50,
        hidden_size=24,
        num_layers=2,
        q_heads=4,
        kv_heads=2,
        head_dim=8,
        ffn_size=20,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
        windows=(None, 5),
        max_len=64,
        eos_token_ids=(),
        dtype=torch.float32,
    )
    return replace(plain, **changes)


def roles(layer: LayerSpec) -> list[str]:
    return [tensor.role for tensor in layer.tensors]


def test_a_layer_by_hand():
    layer = config().spec.layers[1]
    assert roles(layer) == ["attention_norm", "qkv", "attention_output", "ffn_norm", "gate_up", "down"]
    shapes = {product.role: (product.n, product.k, product.shard_axis) for product in layer.products}
    assert shapes == {
        "qkv": (64, 24, 0),
        "attention_output": (24, 32, 1),
        "gate_up": (40, 24, 0),
        "down": (24, 20, 1),
    }
    assert layer.products[0].sources == (
        ("model.layers.1.self_attn.q_proj.weight", 32),
        ("model.layers.1.self_attn.k_proj.weight", 16),
        ("model.layers.1.self_attn.v_proj.weight", 16),
    )
    attention = layer.attention
    assert (attention.window, attention.softcap, attention.scale) == (5, None, pytest.approx(8**-0.5))
    assert attention.flops(3) == 4 * 4 * 8 * 3 and attention.flops(9) == attention.flops(5)


def test_what_a_family_adds():
    added = config(qkv_bias=True, qk_norm=True).spec.layers[0]
    assert set(roles(added)) - set(roles(config().spec.layers[0])) == {"qkv_bias", "q_norm", "k_norm"}
    bias = next(tensor for tensor in added.tensors if tensor.role == "qkv_bias")
    assert bias.shape == (64,) and bias.sources[2] == ("model.layers.0.self_attn.v_proj.bias", 16)


@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_those_of_the_tensors(tied):
    for changes in ({}, {"qkv_bias": True}, {"qk_norm": True}):
        model = config(tied_embeddings=tied, **changes)
        weights = random_weights(model, CPU, torch.bfloat16)
        assert sum(tensor.numel() for tensor in weights.tensors()) == model.num_parameters
        assert weights.num_bytes == model.weight_bytes(torch.bfloat16)
        assert weights.streamed_bytes == model.streamed_weight_bytes(torch.bfloat16)
        assert weights.lm_head.num_bytes == 50 * 24 * 2
        assert (weights.lm_head.q is weights.embedding) is tied


def test_what_a_backend_is_asked():
    dense = Scheme()
    assert config().spec.weight_specs(torch.float16) == (
        WeightSpec("qkv", 64, 24, dense, torch.float16),
        WeightSpec("attention_output", 24, 32, dense, torch.float16),
        WeightSpec("gate_up", 40, 24, dense, torch.float16),
        WeightSpec("down", 24, 20, dense, torch.float16),
        WeightSpec("head", 50, 24, dense, torch.float16),
    )
    assert config().spec.product_shapes()["head"] == (50, 24)


def test_shards_together_are_the_whole_layer():
    """Two devices' attention inputs side by side, and their shares of what is added to the residual."""
    qkv, output = config().spec.layers[0].products[:2]
    weight, x = Weight(Scheme(), torch.randn(qkv.shape)), torch.randn(3, 24)
    halves = [x @ qkv.shard(weight, rank, 2).q.T for rank in range(2)]
    whole = (x @ weight.q.T).split([32, 16, 16], -1)
    shares = [half.split([16, 8, 8], -1) for half in halves]
    for part, one, other in zip(whole, *shares, strict=True):
        torch.testing.assert_close(torch.cat([one, other], -1), part)
    weight, x = Weight(Scheme(), torch.randn(output.shape)), torch.randn(3, 32)
    parts = [share @ output.shard(weight, rank, 2).q.T for rank, share in enumerate(x.chunk(2, -1))]
    torch.testing.assert_close(parts[0] + parts[1], x @ weight.q.T)
    with pytest.raises(BackendError, match="cannot be split into 3"):
        qkv.shard(Weight(Scheme(), torch.randn(qkv.shape)), 0, 3)


def test_shards_of_a_quantized_layer_mean_the_shards_of_what_it_means():
    qkv = config().spec.layers[0].products[0]
    weight = quantize(torch.randn(qkv.shape), Scheme("int4", group=8))
    dense = Weight(Scheme(), dequantize(weight, torch.float32))
    for rank in range(2):
        own = dequantize(qkv.shard(weight, rank, 2), torch.float32)
        assert torch.equal(own, qkv.shard(dense, rank, 2).q)


def test_random_weights_are_drawn_in_a_fixed_order():
    """Figures of `shape:` models stay comparable only while the same seed gives the same model."""
    model = config(qkv_bias=True, qk_norm=True)
    weights = random_weights(model, CPU, torch.float32)
    generator = torch.Generator().manual_seed(RANDOM_SEED)

    def drawn(*parts: tuple[int, ...], std: float = RANDOM_STD) -> torch.Tensor:
        return torch.cat([torch.empty(part).normal_(0.0, std, generator=generator) for part in parts])

    residual = RANDOM_STD / 2  # sqrt(2 * 2 layers)
    assert torch.equal(weights.embedding, drawn((50, 24)))
    for layer in weights.layers:
        assert torch.equal(layer.qkv.q, drawn((32, 24), (16, 24), (16, 24)))
        assert layer.qkv_bias is not None and torch.equal(layer.qkv_bias, drawn((32,), (16,), (16,)))
        assert torch.equal(layer.attention_output.q, drawn((24, 32), std=residual))
        assert torch.equal(layer.gate_up.q, drawn((20, 24), (20, 24)))
        assert torch.equal(layer.down.q, drawn((24, 20), std=residual))
        for norm in (layer.attention_norm, layer.ffn_norm, layer.q_norm, layer.k_norm):
            assert norm is not None and torch.equal(norm, torch.ones_like(norm))
    assert torch.equal(weights.lm_head.q, drawn((50, 24)))


def test_every_device_has_its_heads_and_the_key_value_heads_they_read():
    """Four devices, two KV heads: each of two devices has the same one."""
    model = config(q_heads=8, kv_heads=2, qkv_bias=True)
    spec = model.spec.divided(4)
    attention, (_, qkv, bias, *_) = spec.layers[0].attention, spec.layers[0].tensors
    assert (attention.q_heads, attention.kv_heads) == (2, 1)
    assert qkv.sources == (
        ("model.layers.0.self_attn.q_proj.weight", 16),
        ("model.layers.0.self_attn.k_proj.weight", 8),
        ("model.layers.0.self_attn.v_proj.weight", 8),
    )
    assert bias.shape == (32,)
    whole = torch.arange(96.0)
    parts = [model.spec.layers[0].tensors[2].shard(whole, rank, 4) for rank in range(4)]
    assert [part[:16].tolist() for part in parts] == [whole[16 * rank :][:16].tolist() for rank in range(4)]
    for rank, head in enumerate((0, 0, 1, 1)):
        assert parts[rank][16:24].tolist() == whole[64 + 8 * head :][:8].tolist()
        assert parts[rank][24:].tolist() == whole[80 + 8 * head :][:8].tolist()


@pytest.mark.parametrize("scheme", [Scheme(), Scheme("int4", group=8), Scheme("fp8", group_n=16)])
def test_a_vocabulary_that_does_not_divide_is_padded(scheme):
    head = replace(config().spec.head, scheme=scheme)
    weight = quantize(torch.randn(head.shape), scheme)
    parts = [head.shard(weight, rank, 3) for rank in range(3)]
    assert {part.q.shape[0] for part in parts} == {head.divided(3).n} == {64}
    numbers = torch.cat([dequantize(part, torch.float32) for part in parts])
    assert torch.equal(numbers[:50], dequantize(weight, torch.float32))


def test_what_cannot_be_divided_says_so():
    with pytest.raises(BackendError, match="4 query heads and 2 KV heads cannot be divided among 3 devices"):
        config().spec.divided(3)
    blocks = replace(config().spec.layers[0].products[2], scheme=Scheme("fp8", group=8, group_n=16))
    with pytest.raises(BackendError, match="gate_proj cannot be split into 2: 10 are no whole groups of 16"):
        blocks.divided(2)


def test_loaded_shards_are_parts_of_the_whole():
    """The same random numbers, and no part keeps the whole alive."""
    model = config(tied_embeddings=False)
    whole = random_weights(model, CPU, torch.float32)
    for rank in range(2):
        part = random_weights(model, CPU, torch.float32, Shard(rank, 2))
        for one, own, layer in zip(whole.layers, part.layers, model.spec.layers, strict=True):
            for product in layer.products:
                held, wanted = getattr(own, product.role), getattr(one, product.role)
                assert torch.equal(held.q, product.shard(wanted, rank, 2).q)
                assert held.q.untyped_storage().nbytes() == held.q.nbytes
        assert part.embedding.shape == (64, 24)
        assert part.num_bytes < 0.9 * whole.num_bytes + 2 * 64 * 24 * 4


def test_compressed_weights_are_divided_as_their_numbers_are():
    """Every product of a layer, its queries, keys and values as one, among two devices."""
    scheme = Scheme(sparsity="2:4")
    layer = config(ffn_size=48).spec.layers[0]
    for product in layer.products:
        product = replace(product, scheme=scheme)
        keep = torch.rand(product.n * product.k // 4, 4).argsort(1) < 2
        dense = torch.randn(product.n, product.k) * keep.view(product.n, product.k)
        plain = replace(product, scheme=Scheme())
        for rank in range(2):
            part = product.shard(quantize(dense, scheme), rank, 2)
            assert torch.equal(dequantize(part, torch.float32), plain.shard(dense, rank, 2)), product.role
            assert part.positions.untyped_storage().nbytes() == part.positions.nbytes == part.n * part.k // 8
    down = replace(layer.products[-1], scheme=scheme)
    with pytest.raises(BackendError, match="down_proj cannot be split into 4: 12 are no whole groups of 8"):
        down.divided(4)


def test_a_compressed_vocabulary_that_does_not_divide_is_padded():
    scheme = Scheme(sparsity="2:4")
    head = replace(config().spec.head, scheme=scheme)
    dense = torch.randn(head.shape) * (torch.arange(24) % 4 < 2)
    weight = quantize(dense, scheme)
    numbers = torch.cat([dequantize(head.shard(weight, rank, 3), torch.float32) for rank in range(3)])
    assert torch.equal(numbers[:50], dense) and not numbers[50:].any()
