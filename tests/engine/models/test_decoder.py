"""Forward passes without an engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from engine_fixtures import open_small
from torch import Tensor
from two_layers import two_layers

from backbench.backends.interface import RoundedRows, Weight
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import rounded_rows
from backbench.backends.torch.linear import TorchLinear
from backbench.backends.torch.operations import TorchOperations
from backbench.backends.triton.operations import TritonOperations
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.models.decoder import Decoder, whole_sequences


def hidden_states(decoder: Decoder, lengths: list[int]) -> Tensor:
    ids = torch.cat([torch.arange(length) + 3 * length for length in lengths])
    positions = torch.cat([torch.arange(length) for length in lengths])
    blocks = sum(-(-length // decoder.limits.block_size) for length in lengths)
    batch = whole_sequences(lengths, decoder.limits.block_size, torch.device("cpu"))
    return decoder.forward(ids, positions, batch, decoder.new_caches(blocks))


def test_whole_sequences_side_by_side_equal_each_alone() -> None:
    decoder, lengths = open_small().decoder, [9, 4, 1]
    alone = torch.cat([hidden_states(decoder, [length]) for length in lengths])
    torch.testing.assert_close(hidden_states(decoder, lengths), alone)


def test_a_profile_serves_every_step_that_fits() -> None:
    decoder = open_small().decoder
    for lengths in ([1], [20, 20, 7], [5] * 8):
        decoder.profile(lengths, 8)


class Rounding(TorchOperations):
    """Norm and gate that leave fp8 codes."""

    roundings = frozenset({"fp8-token"})

    def rounded_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, activation: str
    ) -> tuple[RoundedRows, Tensor]:
        normed, total = self.add_rms_norm(x, residual, weight, eps)
        return RoundedRows(*rounded_rows(normed, activation), x.dtype), total

    def rounded_gate(self, gate_up: Tensor, activation: str) -> RoundedRows:
        return RoundedRows(*rounded_rows(self.gate(gate_up), activation), gate_up.dtype)


class Taking(TorchLinear):
    """Takes rows in the codes of its weight, and remembers how many features they had."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def rounding(self, packed: Any) -> str | None:
        return packed.scheme.activation if isinstance(packed, Weight) else None

    def run_rounded(self, rows: RoundedRows, packed: Any, bias: Tensor | None = None) -> Tensor:
        self.taken.append(rows.shape[1])
        plain = replace(packed, scheme=replace(packed.scheme, activation=None))
        return self.run((rows.codes.float() * rows.scale).to(rows.dtype), plain, bias)


def test_norm_and_gate_leave_codes_where_both_sides_can() -> None:
    """Of every product but the first, which nothing is added before, and those of attention."""
    config = EngineConfig(quantize="fp8", max_seqs=4, block_size=8, num_blocks=16, max_len=64)
    decoder = Engine.open(find_model("tiny"), backend="torch", device=cpu(), config=config).decoder
    expected = hidden_states(decoder, [9, 4])
    decoder.linear = taking = Taking()
    assert torch.equal(hidden_states(decoder, [9, 4]), expected)
    assert taking.taken == []
    decoder.operations = Rounding()
    assert torch.equal(hidden_states(decoder, [9, 4]), expected)
    hidden, ffn = decoder.config.hidden_size, decoder.layers[0].down.k
    assert taking.taken == ([hidden, hidden, ffn] * decoder.num_layers)[1:]


def test_the_triton_backends_norm_and_gate_change_no_bit() -> None:
    config = EngineConfig(quantize="fp8", max_seqs=2, block_size=16, num_blocks=4, max_len=32)
    device = cpu(interpret=True)
    # Two layers: the interpreter takes a second for each of a layer's products.
    decoder = Engine.open(two_layers(), backend="triton", device=device, config=config).decoder
    fused = hidden_states(decoder, [3])
    decoder.operations = plain = TritonOperations()
    plain.roundings = frozenset()
    assert torch.equal(hidden_states(decoder, [3]), fused)
