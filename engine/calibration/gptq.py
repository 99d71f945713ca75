"""GPTQ: rounding one input feature after the other, each error made up for by the features still to come.

Source: Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", algorithm 1; zeros that must stay as in Frantar and Alistarh 2023, "SparseGPT".
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbench.backends.interface import Scheme, Weight
from backbench.backends.quantization import nearest, on_scales_of, quantize, step_sizes
from backbench.errors import EngineError

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to its diagonal (section 3.3, step 3)."""
COLUMNS_AT_ONCE = 128
"""Features after which the others are brought up to date (step 2)."""


def inverse_factor(gram: Tensor) -> Tensor:
    """f32 [K, K], upper triangular U with U^T U = (gram + damping)^-1, of the f64 sum of x x^T.

    A feature that is always 0 is on its own: no other makes up for its error, nor it for theirs.

    Raises:
        EngineError: the matrix is not positive definite even when damped.
    """
    damped = gram.double().clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return torch.linalg.cholesky(inverse, upper=True).float()
    except torch.linalg.LinAlgError as error:
        raise EngineError(
            f"The inputs of a product of {len(gram)} features cannot be inverted ({error}); calibrate on "
            "more, or other, text."
        ) from error


def gptq(dense: Tensor, scheme: Scheme, factor: Tensor, scale_dtype: torch.dtype) -> Weight:
    """[N, K] in fp32 rounded in `scheme` so that outputs change little on the calibration's inputs.

    The scales are those of rounding to nearest, taken before any feature is changed, as for static groups;
    features keep their order. Where the scheme is sparse, what is 0 in `dense` stays 0.

    factor: `inverse_factor` of the inputs. scale_dtype: of scales that are floats.
    """
    grid = quantize(dense, scheme, scale_dtype)
    steps = step_sizes(grid).repeat_interleave(scheme.group_n, 0)[: len(dense)]
    kept = dense != 0 if scheme.sparsity is not None else None
    left, k = dense.clone(), dense.shape[1]
    group = scheme.group or k
    for start in range(0, k, COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, k)
        errors = left.new_empty(len(left), stop - start)
        for column in range(start, stop):
            step = steps[:, column // group]
            rounded = nearest((left[:, column] / step)[:, None], scheme.weight)[:, 0] * step
            if kept is not None:
                rounded = rounded * kept[:, column]
            error = (left[:, column] - rounded) / factor[column, column]
            left[:, column] = rounded
            left[:, column + 1 : stop] -= error[:, None] * factor[column, column + 1 : stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return on_scales_of(grid, left)
