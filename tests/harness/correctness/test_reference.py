"""The reference passes: torch as the engine computes it, and the same in a wider dtype."""

from __future__ import annotations

import pytest
import torch
from engine_fixtures import loud_weights, small_config

from backbench.backends.interface.device import cpu
from backbench.engine.perplexity import teacher_forced
from backbench.harness.correctness import reference
from backbench.harness.correctness.reference import Text, score, torch_decoder, wide_decoder

TEXTS = [Text([1, 2, 3], [4, 5, 6, 7]), Text([9] * 70, [8]), Text([11], [12, 13])]


def test_a_pass_over_all_texts_scores_each_as_it_is_scored_alone() -> None:
    decoder = torch_decoder(small_config(), loud_weights(), cpu(), torch.float32, 128)
    found = score(decoder, TEXTS)
    alone = [teacher_forced(decoder, text.prompt + text.output) for text in TEXTS]
    expected = [each[0][-len(text.output) :] for each, text in zip(alone, TEXTS, strict=True)]
    torch.testing.assert_close(found.logprobs, torch.cat(expected).double(), atol=1e-5, rtol=0)
    top = [each[1][-len(text.output) :] for each, text in zip(alone, TEXTS, strict=True)]
    assert torch.equal(found.top_tokens, torch.cat(top))


def test_the_wider_pass_differs_by_rounding_only() -> None:
    parts = small_config(), loud_weights(), cpu()
    narrow = score(torch_decoder(*parts, torch.float32, 128), TEXTS).logprobs
    wide = score(wide_decoder(*parts, torch.float64, 128), TEXTS).logprobs
    assert 0 < float((narrow - wide).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("dtype", "wide"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float64")]
)
def test_what_is_wider(dtype: str, wide: str) -> None:
    assert reference.wider(getattr(torch, dtype)) == getattr(torch, wide)


def test_a_large_matrix_is_widened_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(10, 8)
    bias = torch.randn(10)
    monkeypatch.setattr(reference, "WIDENED_VALUES", 24)
    found = reference.WideLinear().run(x, weight, bias)
    torch.testing.assert_close(found, x @ weight.double().T + bias.double())
