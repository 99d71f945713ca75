"""Sampled tokens equal the torch reference's, draw by draw; in the interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backbench.backends.interface import SamplingBatch
from backbench.backends.noise import noise_key
from backbench.backends.torch.operations import TorchOperations, filter_logits
from backbench.backends.triton.launch import place_of
from backbench.backends.triton.sampling import sample
from backbench.backends.triton.thresholds import threshold_launches

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parameters(
    rows: int,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    draw: int = 0,
) -> SamplingBatch:
    """The same parameters in every row, different keys."""
    keys = [noise_key(row, draw) for row in range(rows)]
    return SamplingBatch(
        temperature=torch.full((rows,), temperature, device=DEVICE),
        top_k=torch.full((rows,), top_k, dtype=torch.int32, device=DEVICE),
        top_p=torch.full((rows,), top_p, device=DEVICE),
        min_p=torch.full((rows,), min_p, device=DEVICE),
        noise_key=torch.tensor(keys, device=DEVICE),
        all_greedy=temperature == 0,
        any_filter=top_k > 0 or top_p < 1 or min_p > 0,
    )


def thresholds(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """f32[S]: the scaled logit each row's tokens must reach."""
    found = torch.empty(logits.shape[0], device=logits.device)
    for launch in threshold_launches(place_of(logits.device), logits, sampling, found):
        launch.start()
    return found


def random_logits(rows: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, vocab_size, generator=generator)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [7, 5001])
def test_draws_equal_the_reference(dtype: torch.dtype, vocab_size: int) -> None:
    logits = random_logits(3, vocab_size, dtype)
    for draw in range(2):
        for temperature in (0.0, 0.6):
            batch = parameters(3, temperature, draw=draw)
            assert torch.equal(sample(logits, batch), TorchOperations().sample(logits, batch))


def test_the_first_maximum_wins() -> None:
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[1, [4321, 70, 2500]] = 1.0
    logits[2, [4999, 4096]] = 2.0
    assert sample(logits, parameters(3, temperature=0)).tolist() == [0, 70, 4096]


def test_rows_of_minus_infinity_give_a_token() -> None:
    logits = torch.full((1, 3000), -torch.inf, device=DEVICE)
    assert sample(logits, parameters(1, temperature=0)).tolist() == [0]


def test_strided_logits() -> None:
    wide = random_logits(4, 3000)
    batch = parameters(4)
    assert torch.equal(sample(wide[:, :2000], batch), sample(wide[:, :2000].contiguous(), batch))


def test_greedy_and_random_rows_in_one_batch() -> None:
    logits = random_logits(4, 2500)
    batch = parameters(4, 0.8, top_k=20)
    batch.temperature[1] = 0
    batch.temperature[3] = 0
    assert torch.equal(sample(logits, batch), TorchOperations().sample(logits, batch))


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 300},
        {"top_k": 5000},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"top_p": 0.97},
        {"min_p": 0.05},
        {"top_k": 50, "top_p": 0.7, "min_p": 0.02},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filters_keep_the_reference_set(filters: dict[str, float], dtype: torch.dtype) -> None:
    logits = random_logits(3, 3001, dtype)
    batch = parameters(3, 0.7, **filters)  # type: ignore[arg-type]
    scaled = logits.float() / batch.temperature[:, None]
    kept = filter_logits(scaled, batch.top_k, batch.top_p, batch.min_p) > -torch.inf
    threshold = thresholds(logits, batch)
    assert torch.equal(scaled >= threshold[:, None], kept)
    assert torch.equal(sample(logits, batch), TorchOperations().sample(logits, batch))


def test_rows_the_candidates_do_not_cover() -> None:
    """Flat rows under top-p keep most tokens, and ties fill more groups than are examined."""
    vocab_size = 40_000
    flat = torch.linspace(-1, 1, vocab_size, device=DEVICE)[None]
    tied = torch.zeros(1, vocab_size, device=DEVICE)
    peaked = tied.clone()
    peaked[0, -5:] = 1  # in the last group, after more tied groups than are examined
    for logits, filters in (
        (flat, {"top_p": 0.8}),
        (flat, {"top_k": 1000}),
        (tied, {"top_k": 3}),
        (peaked, {"top_k": 3}),
    ):
        batch = parameters(1, 1.0, **filters)  # type: ignore[arg-type]
        kept = filter_logits(logits, batch.top_k, batch.top_p, batch.min_p) > -torch.inf
        actual = logits >= thresholds(logits, batch)[:, None]
        # Where the mass reaches p, sums of 40,000 terms in another order may differ by a few tokens.
        assert int((actual != kept).sum()) <= (4 if "top_p" in filters else 0)


def test_ties_with_the_threshold_stay() -> None:
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, -1.0, -0.0, 0.0]], device=DEVICE)
    threshold = thresholds(logits, parameters(1, 1.0, top_k=2))
    assert (logits >= threshold[:, None]).tolist() == [[True, True, True, True, False, False, False]]
    threshold = thresholds(logits, parameters(1, 1.0, top_k=5))
    assert (logits >= threshold[:, None]).tolist() == [[True] * 4 + [False, True, True]]


def test_draws_follow_the_distribution() -> None:
    """Chi-squared of 100 draws from four tokens: 99.9 % of correct samplers stay below 16.27."""
    probability = torch.tensor([0.1, 0.2, 0.3, 0.4], device=DEVICE)
    batch = parameters(100, 1.0)
    tokens = sample(probability.log().expand(100, 4).contiguous(), batch)
    counts = tokens.bincount(minlength=4).double()
    expected = probability.double() * 100
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.27
