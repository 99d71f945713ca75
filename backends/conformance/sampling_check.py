"""Judge a sampler: every draw must be the one the written rule gives, near ties aside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbench.backends.conformance import oracle
from backbench.backends.conformance.finding import Finding
from backbench.backends.interface import Device, Operations, SamplingBatch
from backbench.backends.noise import gumbel_noise, noise_key

SEED = 20261124
SLACK = 1e-3
"""Two fp32 computations of logit / temperature + noise may differ by this much (measured: below 1e-4);
draws nearer a threshold or a tie than this may fall either way."""


@dataclass(frozen=True)
class SamplingCase:
    """Rows with differing parameters over one vocabulary."""

    kind: str
    """"greedy", "ties", "temperature", "filters" or "mixed"."""
    vocab_size: int
    rows: int

    @property
    def name(self) -> str:
        return f"sample {self.kind} v{self.vocab_size} s{self.rows}"


def sampling_cases(level: str) -> Iterator[SamplingCase]:
    """The sampling cases of a level."""
    sizes = ((11, 8), (1000, 16)) if level == "quick" else ((11, 8), (1000, 64), (5003, 33), (151_936, 16))
    for vocab_size, rows in sizes:
        for kind in ("greedy", "ties", "temperature", "filters", "mixed"):
            yield SamplingCase(kind, vocab_size, rows)


def check_sampling(case: SamplingCase, dtype: torch.dtype, operations: Operations, device: Device) -> Finding:
    """Every row's token must survive its filters and score best among those that do."""
    generator = torch.Generator().manual_seed(SEED)
    logits = (3 * torch.randn(case.rows, case.vocab_size, generator=generator)).to(dtype)
    if case.kind == "ties":
        best = torch.randint(0, case.vocab_size, (case.rows, 3), generator=generator)
        logits.scatter_(1, best, float(logits.max()) + 1)
    sampling = _parameters(case, generator)
    moved = {name: getattr(sampling, name).to(device.torch_device) for name in TENSORS}
    on_device = replace(sampling, **moved)
    tokens = operations.sample(logits.clone().to(device.torch_device), on_device).cpu()
    if tokens.shape != (case.rows,) or tokens.dtype != torch.int64:
        return Finding(complaints=(f"gave {tokens.dtype}{list(tokens.shape)}, not int64[{case.rows}]",))
    wrong = [row for row in range(case.rows) if not _acceptable(int(tokens[row]), row, logits, sampling)]
    if not wrong:
        return Finding()
    row = wrong[0]
    text = f"{len(wrong)} of {case.rows} draws are wrong, the first in row {row}: token {int(tokens[row])}"
    return Finding(complaints=(text,))


TENSORS = ("temperature", "top_k", "top_p", "min_p", "noise_key")


def _parameters(case: SamplingCase, generator: torch.Generator) -> SamplingBatch:
    rows = case.rows
    temperature, top_k = torch.zeros(rows), torch.zeros(rows, dtype=torch.int32)
    top_p, min_p = torch.ones(rows), torch.zeros(rows)
    if case.kind in ("temperature", "filters", "mixed"):
        temperature = 0.3 + 1.2 * torch.rand(rows, generator=generator)
    if case.kind in ("filters", "mixed"):
        largest = max(3, case.vocab_size // 4)
        top_k = torch.randint(0, largest, (rows,), generator=generator, dtype=torch.int32)
        top_p = 0.2 + 0.8 * torch.rand(rows, generator=generator)
        min_p = 0.2 * torch.rand(rows, generator=generator)
    if case.kind == "mixed":
        temperature[::3] = 0
        for parameter, off in ((top_k, 0), (top_p, 1), (min_p, 0)):
            parameter[torch.rand(rows, generator=generator) < 0.5] = off
    keys = torch.tensor([noise_key(1000 + row, row % 5) for row in range(rows)])
    return SamplingBatch(
        temperature,
        top_k,
        top_p,
        min_p,
        keys,
        all_greedy=case.kind in ("greedy", "ties"),
        any_filter=case.kind in ("filters", "mixed"),
    )


def _acceptable(token: int, row: int, logits: Tensor, sampling: SamplingBatch) -> bool:
    """Whether `token` is the draw of `row`, or so near a threshold or a tie that rounding decides."""
    temperature = float(sampling.temperature[row])
    if not 0 <= token < logits.shape[1]:
        return False
    if temperature == 0:
        return token == int((logits[row] == logits[row].max()).nonzero()[0])
    scores = logits[row].double() / temperature
    limits = int(sampling.top_k[row]), float(sampling.top_p[row]), float(sampling.min_p[row])
    perturbed = scores + gumbel_noise(sampling.noise_key[row : row + 1], logits.shape[1])[0].double()
    surely = oracle.allowed_tokens(scores, *limits, slack=-SLACK)
    perhaps = oracle.allowed_tokens(scores, *limits, slack=SLACK)
    return bool(perhaps[token]) and bool(perturbed[token] >= perturbed[surely].max() - SLACK)
