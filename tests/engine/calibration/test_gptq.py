"""GPTQ against its definition, an inverse for every feature, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backbench.backends.interface import Scheme
from backbench.backends.quantization import SCHEMES, dequantize, nearest, quantize, step_sizes
from backbench.engine.calibration.awq import output_error
from backbench.engine.calibration.gptq import DAMPING, gptq, inverse_factor
from backbench.engine.models.on_the_fly import pruned
from backbench.errors import EngineError

SMALL = {
    "int4 by 8": Scheme("int4", group=8),
    "int8 by row": Scheme("int8"),
    "fp8 by 16x8": Scheme("fp8", group=8, group_n=16),
    "nvfp4": SCHEMES["nvfp4"],
}


def correlated(k: int, rows: int = 512) -> Tensor:
    """f64 [k, k]: the sum of x x^T of rows whose features resemble each other."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(k, k, generator=generator) / k**0.5 + 0.5 * torch.eye(k)
    x = torch.randn(rows, k, generator=generator) @ mixed
    return (x.T @ x).double()


def dense_weights(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(4))


def by_definition(dense: Tensor, scheme: Scheme, gram: Tensor) -> Tensor:
    """Frantar et al. 2023, equation 2, in fp64: the errors of a feature are spread by the inverse of the
    Hessian of those that remain."""
    grid = quantize(dense, scheme)
    steps = step_sizes(grid).repeat_interleave(scheme.group_n, 0)[: len(dense)].double()
    k = dense.shape[1]
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    left = dense.double().clone()
    for column in range(k):
        inverse = torch.linalg.inv(damped[column:, column:])
        step = steps[:, column // (scheme.group or k)]
        rounded = nearest((left[:, column] / step).float()[:, None], scheme.weight)[:, 0] * step
        error = (left[:, column] - rounded) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
        left[:, column] = rounded
    return left.float()


@pytest.mark.parametrize("name", SMALL)
def test_every_feature_makes_up_for_those_before(name: str) -> None:
    dense, gram, scheme = dense_weights(20, 192), correlated(192), SMALL[name]
    found = dequantize(gptq(dense, scheme, inverse_factor(gram), torch.float32), torch.float32)
    expected = by_definition(dense, scheme, gram)
    # A sum's last bits decide a code between two now and then, and all that follow in its row.
    same = (found - expected).abs() <= 1e-5 * expected.abs()
    assert int(same.all(1).sum()) >= 19
    nearest_ones = dequantize(quantize(dense, scheme), torch.float32)
    assert not (found - nearest_ones).abs().max() <= 1e-5


@pytest.mark.parametrize("name", SCHEMES)
def test_outputs_change_less_than_by_rounding_to_nearest(name: str) -> None:
    """Without zero slack: the quadratic error is what GPTQ lowers; measured 0.25 to 0.5 of the other."""
    dense, gram, scheme = dense_weights(64, 256), correlated(256), SCHEMES[name]
    found = gptq(dense, scheme, inverse_factor(gram), torch.float32)
    to_nearest = quantize(dense, scheme)
    errors = [output_error(dequantize(each, torch.float32), dense, gram) for each in (found, to_nearest)]
    assert errors[0] < 0.8 * errors[1]
    assert torch.equal(found.scale.view(torch.uint8), to_nearest.scale.view(torch.uint8))  # type: ignore[union-attr]


def test_zeros_stay() -> None:
    dense, gram = dense_weights(16, 128), correlated(128)
    scheme = Scheme("int4", group=32, sparsity="2:4")
    sparse = pruned(dense, "2:4")
    found = dequantize(gptq(sparse, scheme, inverse_factor(gram), torch.float32), torch.float32)
    assert bool((found[sparse == 0] == 0).all())
    assert int((found.view(-1, 4) == 0).sum(1).min()) >= 2


def test_features_that_are_always_0_are_rounded_to_nearest() -> None:
    dense, gram, scheme = dense_weights(8, 64), correlated(64), Scheme("int4", group=32)
    gram[[5, 40]] = 0
    gram[:, [5, 40]] = 0
    found = dequantize(gptq(dense, scheme, inverse_factor(gram), torch.float32), torch.float32)
    expected = dequantize(quantize(dense, scheme), torch.float32)
    assert torch.equal(found[:, [5, 40]], expected[:, [5, 40]])


def test_inputs_that_are_not_finite_are_one_line() -> None:
    gram = correlated(16)
    gram[0, 0] = -1e9
    with pytest.raises(EngineError, match="cannot be inverted"):
        inverse_factor(gram)
