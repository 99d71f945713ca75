"""What a backend is asked of a model's products, and what it answers for each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backbench.backends import registry
from backbench.backends.interface import AttentionSpec, Backend, Scheme, Weight, WeightSpec
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import SCHEMES
from backbench.backends.torch.linear import TorchLinear
from backbench.engine.models.checkpoint import find_model
from backbench.errors import BackendError

SPEC = AttentionSpec(4, 2, 32, torch.float32, torch.float32, 16, 0.2)
WEIGHTS = find_model("tiny").config.spec.weight_specs(torch.float32)


class Headless(TorchLinear):
    """Serves every product but one, as a kernel with a bound on its outputs would."""

    name = "headless"

    def refusals(self, spec, device):
        return super().refusals(spec, device) + (["too many outputs"] if spec.role == "head" else [])


@pytest.fixture
def headless(monkeypatch):
    loaded = registry.load
    backend = Backend("headless", "No head.", linear=Headless())
    monkeypatch.setattr(registry, "load", lambda name: backend if name == "headless" else loaded(name))


def select(name, weights):
    return registry.select(name, device=cpu(), specs=[SPEC], dtype=torch.float32, weights=weights)


def test_a_backend_is_asked_for_every_role(headless):
    assert [spec.role for spec in WEIGHTS] == ["qkv", "attention_output", "gate_up", "down", "head"]
    with pytest.raises(BackendError, match="headless linear: too many outputs"):
        select("headless", WEIGHTS)
    assert select("headless", WEIGHTS[:-1]).weights == WEIGHTS[:-1]


class Dense(TorchLinear):
    name = "dense"

    def refusals(self, spec, device):
        return [] if spec.scheme.dense else ["only dense weights are served"]


def test_a_role_is_refused_with_its_scheme_and_nothing_falls_back(monkeypatch):
    loaded = registry.load
    backend = Backend("dense", "Dense weights.", linear=Dense())
    monkeypatch.setattr(registry, "load", lambda name: backend if name == "dense" else loaded(name))
    kept = [
        replace(spec, scheme=SCHEMES["int4-g128"]) if spec.role in ("qkv", "down") else spec
        for spec in WEIGHTS
    ]
    with pytest.raises(BackendError) as raised:
        select("dense", kept)
    said = str(raised.value)
    assert "dense linear qkv as int4-g128, linear down as int4-g128: only dense weights are served" in said
    assert "these would: torch" in said and "gate_up" not in said
    assert len(said) < 300


def test_auto_takes_the_first_of_its_order_that_serves_the_schemes(monkeypatch):
    loaded = registry.load
    backend = Backend("dense", "Dense weights.", linear=Dense())
    monkeypatch.setattr(registry, "load", lambda name: backend if name == "dense" else loaded(name))
    monkeypatch.setattr(registry, "names", lambda: ["dense", "torch"])
    monkeypatch.setattr(registry, "AUTO_ORDER", {"cpu": ("dense", "torch")})
    assert select("auto", WEIGHTS).linear.name == "dense"
    kept = [replace(spec, scheme=SCHEMES["int8"]) for spec in WEIGHTS]
    selection = select("auto", kept)
    assert selection.linear.name == "torch"
    assert "as int8: only dense" in selection.passed_over["dense"][0]


def test_the_selection_carries_what_was_asked():
    assert select("torch", WEIGHTS).weights == WEIGHTS
    (ordinary,) = select("torch", ()).weights
    assert (ordinary.n, ordinary.k) == (128, 128)


def test_a_weight_knows_its_bytes_and_what_is_asked_of_it():
    scale = torch.ones(8, 2, dtype=torch.float16)
    weight = Weight(Scheme("int4", group=16), torch.zeros(8, 16, dtype=torch.uint8), scale=scale)
    assert (weight.n, weight.k) == (8, 32)
    assert weight.num_bytes == 8 * 16 + 8 * 2 * 2
    dense = Weight(Scheme(), torch.zeros(8, 16))
    assert dense.spec("down") == WeightSpec("down", 8, 16, Scheme(), torch.float32)
    assert dense.num_bytes == 8 * 16 * 4
