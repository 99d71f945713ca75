"""Mixing attention roles by name."""

from __future__ import annotations

import pytest
import torch

from backbench.backends import registry
from backbench.backends.composite import CompositeRunner, split_batch
from backbench.backends.conformance import check_backend
from backbench.backends.conformance.scenario import Row, make_batch, permuted_layout
from backbench.backends.interface import AttentionSpec, device
from backbench.errors import BackendError

SPEC = AttentionSpec(8, 2, 64, torch.float32, torch.float32, 16, 0.125)


def test_a_mix_passes_conformance_and_names_both() -> None:
    mixed = registry.load("prefill=sdpa,decode=torch")
    matrix = check_backend(mixed, device.detect(prefer="cpu"))
    assert matrix.ok, "\n".join(matrix.lines())
    assert mixed.name == "prefill=sdpa,decode=torch" and mixed.base == "torch"


def test_select_takes_a_mix_as_an_override() -> None:
    selection = registry.select(
        "torch",
        device=device.detect(prefer="cpu"),
        specs=[SPEC],
        dtype=torch.float32,
        overrides={"attention": "prefill=sdpa, decode=torch"},
    )
    assert selection.used["attention"] == "prefill=sdpa,decode=torch"
    assert selection.used["linear"] == "torch"


@pytest.mark.parametrize(
    "text", ["prefill=sdpa", "prefill=sdpa,prefill=torch", "prompt=sdpa,decode=torch", "prefill=sdpa,decode"]
)
def test_malformed_roles_are_one_line(text: str) -> None:
    with pytest.raises(BackendError, match="prefill=NAME,decode=NAME"):
        registry.load(text)


def test_layouts_that_nobody_shares_are_refused_with_both_named() -> None:
    mixed = registry.load("prefill=sdpa,decode=triton").attention
    assert mixed is not None
    reasons = mixed.refusals(SPEC, device.detect(interpret=True))
    assert reasons == [
        "sdpa (token rows) and triton (head runs) keep their caches in layouts that neither shares"
    ]


def test_each_side_gets_its_rows_and_the_plan_holds_both_plans() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [Row(1, 5), Row(1, 40), Row(3, 20), Row(7, 7)]
    layout = permuted_layout([row.length for row in rows], 16, generator)
    batch = make_batch(rows, layout, torch.device("cpu"), pad_tokens=2)
    decodes, rest = split_batch(batch)
    assert decodes is not None and rest is not None
    assert (decodes.num_seqs, decodes.num_tokens, decodes.max_query) == (2, 2, 1)
    assert rest.query_start.tolist() == [0, 3, 10]
    assert rest.seq_lens.tolist() == [20, 7]
    assert rest.num_tokens == 12 and rest.num_decodes == 0
    mixed = registry.load("prefill=sdpa,decode=torch").attention
    assert mixed is not None
    runner = mixed.open(SPEC, device.cpu())
    assert isinstance(runner, CompositeRunner)
    assert runner.plan(batch) == (runner.decode.plan(decodes), runner.prefill.plan(rest))
