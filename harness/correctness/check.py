"""The record's `correctness` section: whole sequences, attention head by head, and quantized products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from backbench.errors import HarnessError
from backbench.harness.correctness.attention import AttentionCheck
from backbench.harness.correctness.products import ProductCheck
from backbench.harness.correctness.reference import Scores, Text, score, torch_decoder, wide_decoder, wider
from backbench.harness.correctness.whole import TOO_LARGE, whole_weights, why_not_comparable

if TYPE_CHECKING:
    from backbench.engine.engine import Engine
    from backbench.engine.models.checkpoint import ModelSource
    from backbench.engine.models.config import ModelConfig
    from backbench.engine.request import Completion
    from backbench.workloads.request import Workload

LENGTHS = (1, 3, 16, 17, 63, 130, 257, 600)
"""Prompt lengths: one token, both sides of a block's edge, several blocks. The run's longest comes on top."""
OUTPUTS = 24
SEED = 20_240_229
DIGITS = 6
"""Significant digits of the differences that the record keeps, and from which its totals are computed."""
LONG_FLOPS = {"cpu": 1e11, "gpu": 1.5e14}
"""What the longest sequence may cost a reference pass: a few seconds. Where the run's longest context costs
more, the sequence stops there; the attention check reaches that context whatever the model's size."""


@dataclass(frozen=True)
class Distance:
    """How far apart two sets of log-probabilities are."""

    mean: float
    """Of the absolute differences, over all positions."""
    sequence_mean: float
    """The largest mean over one sequence, so that one wrong sequence cannot hide among right ones."""
    maximum: float

    @classmethod
    def of(cls, differences: np.ndarray, sequences: int) -> Distance:
        """Of absolute differences f64[sequences * outputs]."""
        each = differences.reshape(sequences, -1).mean(axis=1)
        return cls(float(differences.mean()), float(each.max()), float(differences.max()))


FACTORS = Distance(2.0, 3.0, 4.0)
"""Each bound is this multiple of the noise: the same quantity between torch and torch in the wider dtype.

A right kernel rounds as often as torch. Were all its roundings its own, the two would differ by sqrt(2)
times the noise; as both round the same values at many places, less is usual. Right kernels measured on the
bundled models and on random ones: 0.05 to 1.3 of the mean, up to 1.7 of a sequence's (24 values that share
a context vary more), up to 2.1 of the largest. Each factor leaves at least half as much again.
"""


def longest_context(workload: Workload) -> int:
    """Prompt and output tokens of the workload's longest request."""
    return max((len(each.prompt) + each.output_tokens for each in workload.requests), default=0)


def prompts(vocab_size: int, max_len: int, longest: int = 0) -> list[list[int]]:
    """The fixed sample: seeded random token ids at `LENGTHS`, as far as the context allows.

    Where `longest` goes beyond them, one more: with its output it has `longest` tokens.
    """
    rng = np.random.default_rng(SEED)
    lengths = [length for length in LENGTHS if length + OUTPUTS <= max_len] or [1]
    long = min(longest, max_len) - OUTPUTS
    lengths += [long] if long > lengths[-1] else []
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def check(engine: Engine, source: ModelSource, longest: int | None = None) -> dict[str, Any]:
    """The record's `correctness` section.

    The engine, which must be idle, continues prompts by sampling at temperature 1, which gives text the model
    finds plausible. Torch, in the model's dtype and in a wider one, is then forced through the same
    tokens. `longest`: the longest context of the run's requests (None = the sample's own).
    """
    from backbench.engine.request import SamplingParams

    config = engine.config
    assert config.max_len is not None
    longest = min(longest or 0, config.max_len)
    outputs = min(OUTPUTS, config.max_len - 1)
    on_cpu = engine.selection.device.torch_device.type == "cpu"
    size, most = engine.pool.block_size, engine.pool.num_blocks
    within = min(_affordable(source.config, longest, LONG_FLOPS["cpu" if on_cpu else "gpu"]), size * most)
    sample = prompts(engine.model_config.vocab_size, config.max_len, within)
    if most < max(-(-(len(prompt) + outputs) // size) for prompt in sample):
        return {"passed": None, "reason": "the KV pool is too small for the sample"}
    free = SamplingParams(max_tokens=outputs, temperature=1.0, seed=SEED, ignore_eos=True, logprobs=True)
    engine.reset_prefix_cache()
    found = engine.generate(sample, free)
    engine.take_step_stats()
    used = engine.selection.used
    section = {
        "reference": "torch",
        "against_itself": all(name == "torch" for name in used.values()),
        "sequences": len(sample),
        "longest_sequence": max(map(len, sample)) + outputs,
    }
    texts = [Text(prompt, done.token_ids) for prompt, done in zip(sample, found, strict=True)]
    if fault := _fault(found, outputs, engine.model_config.vocab_size):
        return section | {"passed": False, "reason": fault}
    device, dtype = engine.selection.device, engine.decoder.dtype
    if engine.ranks is not None:
        return section | _against_the_whole(engine, source, found, texts)
    attention = AttentionCheck(engine.decoder, max(longest, max(map(len, sample)) + outputs))
    parts = source.config, engine.weights, device
    products = ProductCheck(engine.decoder)
    narrow = engine.decoder.kv_dtype if engine.decoder.kv_dtype != dtype else None
    reference = torch_decoder(
        *parts, dtype, config.max_len, attention.attention(), products.linear(), kv_dtype=narrow
    )
    plain = score(reference, texts)
    noise_dtype = wider(dtype)
    wide = score(wide_decoder(*parts, noise_dtype, config.max_len, narrow), texts)
    section |= {"noise_dtype": _text(noise_dtype), "attention": attention.to_json()}
    section |= {} if products.worst is None else {"products": products.to_json()}
    name = " + ".join(dict.fromkeys(used.values()))
    if reason := _without_numbers(name, _logprobs(found), plain, wide, dtype, texts):
        return section | {"passed": False, "reason": reason}
    compared = compare(found, plain, wide)
    passed = compared.pop("within") and attention.passed and products.passed
    reason = _reason(compared, attention, products)
    return section | {"passed": passed} | ({} if passed else {"reason": reason}) | compared


def _against_the_whole(
    engine: Engine, source: ModelSource, found: Sequence[Completion], texts: Sequence[Text]
) -> dict[str, Any]:
    """What the section says of a model divided among devices; see `whole`. Closes the engine."""
    device, dtype, max_len = engine.selection.device, engine.decoder.dtype, engine.limits.max_len
    if engine.config.tp > 1 and (reason := why_not_comparable(source.config.spec.products)):
        return {"passed": None, "reason": reason}
    weights = whole_weights(engine, source)
    if weights is None:
        return {"passed": None, "reason": TOO_LARGE}
    parts = source.config, weights, device
    kv_dtype = engine.decoder.kv_dtype if engine.decoder.kv_dtype != dtype else None
    plain = score(torch_decoder(*parts, dtype, max_len, kv_dtype=kv_dtype), texts)
    wide = score(wide_decoder(*parts, wider(dtype), max_len, kv_dtype), texts)
    section = {"against_itself": False, "noise_dtype": _text(wider(dtype))}
    name = " + ".join(dict.fromkeys(engine.selection.used.values()))
    if reason := _without_numbers(name, _logprobs(found), plain, wide, dtype, texts):
        return section | {"passed": False, "reason": reason}
    compared = compare(found, plain, wide)
    passed = compared.pop("within")
    return section | {"passed": passed} | ({} if passed else {"reason": _apart(compared)}) | compared


def _affordable(config: ModelConfig, longest: int, flops: float) -> int:
    """The longest context up to `longest` that a pass of `flops` floating-point operations reaches."""
    while longest > 1 and longest * config.flops_per_token(longest // 2) > flops:
        longest = int(0.9 * longest)
    return longest


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _logprobs(found: Sequence[Completion]) -> np.ndarray:
    return np.concatenate([each.logprobs for each in found])


def _fault(found: Sequence[Completion], outputs: int, vocab_size: int) -> str:
    """Why nothing can be compared; empty where it can."""
    if any(len(each.logprobs) != len(each.token_ids) for each in found):
        raise HarnessError("The engine returned no log-probability where one was asked for.", exit_code=5)
    for each in found:
        if len(each.token_ids) != outputs:
            return f"the engine gave {len(each.token_ids)} tokens where {outputs} were asked for"
        outside = [token for token in each.token_ids if not 0 <= token < vocab_size]
        if outside:
            return f"the engine sampled token {outside[0]} of a vocabulary of {vocab_size}"
    return ""


def _without_numbers(
    name: str, actual: np.ndarray, plain: Scores, wide: Scores, dtype: torch.dtype, texts: Sequence[Text]
) -> str:
    """Whose log-probabilities are not finite, where first, and what that points at; empty where all are."""
    everyone = {
        name: actual,
        "the torch backend": plain.logprobs.numpy(),
        f"torch in {_text(wider(dtype))}": wide.logprobs.numpy(),
    }
    reasons = {who: not_finite(who, values, texts) for who, values in everyone.items()}
    faulty = [who for who, reason in reasons.items() if reason]
    if not faulty:
        return ""
    advice = ""
    if reasons[f"torch in {_text(wider(dtype))}"]:
        advice = "; look for NaN, inf or huge values in the weights"
    elif reasons["the torch backend"]:
        advice = f"; {_text(dtype)} is too narrow for these weights"
    return not_finite(", ".join(faulty), everyone[faulty[0]], texts) + advice


def not_finite(name: str, logprobs: np.ndarray, texts: Sequence[Text]) -> str:
    """Names the first log-probability that is NaN or infinite, and its place; empty where all are finite."""
    wrong = np.flatnonzero(~np.isfinite(logprobs))
    if not len(wrong):
        return ""
    first, start = int(wrong[0]), 0
    for text in texts:
        if first < start + len(text.output):
            break
        start += len(text.output)
    kind = "NaN" if np.isnan(logprobs[first]) else "infinite"
    return (
        f"the log-probabilities of {name} are {kind} at position {len(text.prompt) + first - start} after a "
        f"prompt of {len(text.prompt)} tokens ({len(wrong)} of {len(logprobs)} are not finite)"
    )


def compare(found: Sequence[Completion], plain: Scores, wide: Scores) -> dict[str, Any]:
    """Distances of the engine's finite log-probabilities, and whether they lie within their bounds."""
    actual, torchs = _logprobs(found), plain.logprobs.numpy()
    differences = rounded(np.abs(actual - torchs))
    distance = Distance.of(differences, len(found))
    noise = Distance.of(np.abs(torchs - wide.logprobs.numpy()), len(found))
    factor, is_, may = asdict(FACTORS), asdict(distance), asdict(noise)
    bound = Distance(**{name: factor[name] * may[name] for name in factor})
    top = np.concatenate([each.top_tokens for each in found])
    return {
        # Written so that NaN, which the reference's noise may be, fails.
        "within": all(is_[name] <= asdict(bound)[name] for name in is_),
        "max_abs_logprob_diff": distance.maximum,
        "mean_abs_logprob_diff": distance.mean,
        "worst_sequence_mean_abs_logprob_diff": distance.sequence_mean,
        "top1_agreement": float((top == plain.top_tokens.numpy()).mean()),
        "tokens": len(differences),
        "tolerance": bound.maximum,
        "tolerance_mean": bound.mean,
        "tolerance_sequence_mean": bound.sequence_mean,
        "noise_max": noise.maximum,
        "noise_mean": noise.mean,
        "noise_sequence_mean": noise.sequence_mean,
        "differences": differences.tolist(),
    }


def rounded(values: np.ndarray) -> np.ndarray:
    """To `DIGITS` significant digits, as the record keeps them."""
    return np.array([float(f"{value:.{DIGITS}g}") for value in values])


def _reason(compared: dict[str, Any], attention: AttentionCheck, products: ProductCheck) -> str:
    """What is wrong, in one line: what names its place before the log-probabilities."""
    if not products.passed and products.worst is not None:
        return f"a product differs from torch's in {products.worst.describe()}"
    if not attention.passed and attention.worst is not None:
        return f"attention differs from torch's in {attention.worst.describe()}"
    return _apart(compared)


def _apart(compared: dict[str, Any]) -> str:
    """How far the log-probabilities are apart, and may be."""
    return (
        "log-probabilities differ from the torch backend's: "
        f"mean {compared['mean_abs_logprob_diff']:.3g}, at most {compared['tolerance_mean']:.3g}; "
        f"of one sequence {compared['worst_sequence_mean_abs_logprob_diff']:.3g}, "
        f"at most {compared['tolerance_sequence_mean']:.3g}; "
        f"largest {compared['max_abs_logprob_diff']:.3g}, at most {compared['tolerance']:.3g}"
    )
