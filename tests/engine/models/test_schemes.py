"""Rules that say a linear's scheme, by hand."""

from __future__ import annotations

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from backbench.backends.interface import Scheme
from backbench.engine.models.schemes import Schemes, exactly, unconverted
from backbench.errors import EngineError

INT4, BLOCK = Scheme("int4", group=128), Scheme("fp8", group=128, group_n=128)
LAYER = "model.layers.0.self_attn."


def test_the_first_rule_that_matches_says_it():
    schemes = Schemes((*exactly(["lm_head"]), (".*down", BLOCK), (".*", INT4)))
    assert schemes.of("lm_head").dense
    assert schemes.of("lm_head_2") == INT4
    assert schemes.of("model.layers.3.mlp.down_proj") == BLOCK
    assert Schemes(()).of("anything").dense


def test_linears_of_one_product_must_be_kept_alike():
    schemes = Schemes(((".*[qk]_proj", INT4),))
    assert schemes.of_product({f"{LAYER}q_proj": 256, f"{LAYER}k_proj": 128}) == INT4
    with pytest.raises(EngineError) as caught:
        schemes.of_product({f"{LAYER}q_proj": 256, f"{LAYER}v_proj": 128})
    assert str(caught.value) == (
        "model.layers.0.self_attn keeps q_proj as int4(group=128), v_proj as dense, which are multiplied at "
        "once and must be alike."
    )


def test_a_block_that_would_span_two_linears_is_spread_over_its_rows():
    schemes = Schemes(((".*", BLOCK),))
    assert schemes.of_product({"q": 256, "k": 128, "v": 100}).group_n == 128
    assert schemes.of_product({"q": 256, "k": 64, "v": 64}) == Scheme("fp8", group=128, group_n=1)


@pytest.mark.parametrize("key", ["lm_head", "model.layers.1", "mlp.gate", "model.layers.*.mlp", "down_proj"])
def test_unconverted_is_what_transformers_means(key):
    names = ["lm_head", "model.layers.1.mlp.gate_proj", "model.layers.11.mlp.down_proj", "mlp.gate_proj"]
    schemes = Schemes((*unconverted([key]), (".*", INT4)))
    assert [not schemes.of(name).dense for name in names] == [
        should_convert_module(name, [key]) for name in names
    ]


def test_what_is_no_expression_is_named():
    with pytest.raises(EngineError, match=r"has '\(\[', which is no regular expression"):
        Schemes((("([", INT4),))
