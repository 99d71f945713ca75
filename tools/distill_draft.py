"""Distil `tiny-draft` from `tiny`: one layer that proposes what `tiny` would say, for speculative decoding.

    python tools/distill_draft.py --out engine/checkpoints/tiny-draft

No text is needed: the teacher's own samples, drawn at several temperatures and greedily, are what the draft
is to continue. Its loss is the divergence of its distribution from the teacher's plus the total variation
between them: 1 minus that is the share of draft tokens that a lossless acceptance keeps (Leviathan et al.
2023, theorem 3.5). The last weights are rounded to bf16 and measured once more, in fp32, for the card.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from train_tiny import ENDS, HEAD_DIM, SHARED, device_name, learning_rate_share, make_optimizer
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

CHECKPOINTS = Path(__file__).resolve().parents[1] / "engine" / "checkpoints"
TEMPERATURES = (1.0, 1.0, 0.8, 0.6, 0.0)
"""One each for as many rows of a batch of samples; the greedy ones begin with sampled tokens."""
SAMPLED_START = 128
"""Tokens that precede a greedy continuation, drawn at temperature 1."""


@dataclass(frozen=True)
class Training:
    """How a model is trained to go on as another does, on the other's samples."""

    steps: int = 6000
    seed: int = 0
    batch: int = 16
    """Samples a step."""
    samples: int = 4096
    """Of the other; as many as one in 32 more are held out for the card."""
    sample_tokens: int = 768
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    warmup: float = 0.03
    max_seconds: float = math.inf
    """The schedule is squeezed so that training ends by then."""

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """An option for each of its settings."""
        for field in fields(cls):
            kind = float if isinstance(field.default, float) else int
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)

    @classmethod
    def given(cls, options: argparse.Namespace) -> Self:
        """The settings that the options say."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Recipe(Training):
    """How the student is trained."""

    layers: int = 1
    width: int = 128


def main() -> None:
    """Sample, train, measure, write."""
    options = parse_arguments()
    recipe = Recipe.given(options)
    torch.manual_seed(recipe.seed)
    device = options.device
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).to(device).eval()
    held_out = max(len(TEMPERATURES), recipe.samples // 32)
    begin_s = time.monotonic()
    samples = sample(teacher, recipe.samples + held_out, recipe.sample_tokens)
    print(f"{samples.numel():,} tokens sampled in {time.monotonic() - begin_s:.0f} s", flush=True)
    train, held = samples[held_out:], samples[:held_out]
    student = student_of(teacher, recipe).to(device)
    print(f"{student.num_parameters():,} parameters")
    result = distil(student, teacher, train, held, recipe)
    student = student.to(torch.bfloat16)
    options.out.mkdir(parents=True, exist_ok=True)
    student.save_pretrained(options.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(options.teacher / name, options.out / name)
    measured = agreement(student.float(), teacher, held)
    for what, (acceptance, argmax) in measured.items():
        print(f"{what}: accepts {acceptance:.3f}, same most likely token {argmax:.3f}")
    result |= {"device": device_name(device), "held out": held_out}
    (options.out / "README.md").write_text(card(student, recipe, result, measured), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", type=Path, default=CHECKPOINTS / "tiny")
    parser.add_argument("--out", type=Path, required=True, help="folder the model is written to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    Recipe.add_options(parser)
    return parser.parse_args()


def student_of(teacher: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """An untrained Llama with the teacher's vocabulary and one key-value head."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=teacher.config.vocab_size,
            hidden_size=recipe.width,
            intermediate_size=3 * recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.width // HEAD_DIM,
            num_key_value_heads=1,
            **SHARED,
        )
    )
    model.generation_config = GenerationConfig(**ENDS)
    return model


@torch.inference_mode()
def sample(teacher: PreTrainedModel, rows: int, tokens: int) -> torch.Tensor:
    """i64[rows, tokens] of the teacher's own, each row from an end of text; temperatures by row, in turn."""
    device = teacher.device
    turn = torch.arange(rows, device=device) % len(TEMPERATURES)
    temperature = torch.tensor(TEMPERATURES, device=device)[turn][:, None]
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    columns, cache = [ids], None
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for column in range(1, tokens):
            output = teacher(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[:, -1].float()
            now = torch.ones_like(temperature) if column < SAMPLED_START else temperature
            noise = -torch.log(-torch.log(torch.rand_like(logits).clamp_(1e-20, 1 - 1e-7)))
            ids = (logits + noise * now).argmax(-1, keepdim=True)
            columns.append(ids)
    return torch.cat(columns, 1).clone()


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train: torch.Tensor,
    held: torch.Tensor,
    recipe: Recipe,
) -> dict[str, Any]:
    """Train the student on the teacher's distribution at every token; steps and seconds it took."""

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=batch, use_cache=False).logits
        given = student(input_ids=batch, use_cache=False).logits
        return divergence(given.float(), wanted.float())

    def accepts() -> str:
        return f"  accepts {agreement(student, teacher, held)['at temperature 1'][0]:.3f}"

    return fit(student, loss_of, train, recipe, accepts)


def fit(
    model: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    train: torch.Tensor,
    recipe: Training,
    look: Callable[[], str] = str,
) -> dict[str, Any]:
    """AdamW under bf16 autocast on a GPU; warm-up, then cosine to zero, by steps or seconds; both it took.

    loss_of: of a batch i64[recipe.batch, tokens] of `train`. look: what is said beside the loss, ten times.
    """
    optimizer = make_optimizer(model, recipe.learning_rate, recipe.weight_decay)
    begin_s, step, progress, next_look = time.monotonic(), 0, 0.0, 0.1
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_share(progress, recipe.warmup)
        batch = train[torch.randint(len(train), (recipe.batch,), device=train.device)]
        with torch.autocast(train.device.type, torch.bfloat16, enabled=train.is_cuda):
            loss = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 10 == 0:
            loss.item()  # waits for the device: the clock below must not run ahead of it
        progress = max(step / recipe.steps, (time.monotonic() - begin_s) / recipe.max_seconds)
        if progress >= next_look:
            next_look += 0.1
            said, seconds = look(), time.monotonic() - begin_s
            print(f"step {step:6d}  {seconds:6.1f} s  loss {loss.item():.4f}{said}", flush=True)
    return {"steps": step, "seconds": time.monotonic() - begin_s}


def divergence(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the teacher from the student plus total variation, mean of a token."""
    p, log_q = F.softmax(wanted, -1), F.log_softmax(given, -1)
    kl = (p * (F.log_softmax(wanted, -1) - log_q)).sum(-1)
    variation = 1 - torch.minimum(p, log_q.exp()).sum(-1)
    return (kl + variation).mean()


@torch.inference_mode()
def agreement(
    student: PreTrainedModel, teacher: PreTrainedModel, held: torch.Tensor
) -> dict[str, tuple[float, float]]:
    """(share of drafts that lossless acceptance keeps at temperature 1, share of equal argmax) by text.

    The first `SAMPLED_START` tokens of a row are not counted.
    """
    student.eval()
    found = {}
    for what, temperature in (("at temperature 1", 1.0), ("greedy", 0.0)):
        rows = held[[i for i in range(len(held)) if TEMPERATURES[i % len(TEMPERATURES)] == temperature]]
        accepted = argmax = count = 0.0
        for batch in rows.split(8):
            wanted = teacher(input_ids=batch, use_cache=False).logits[:, SAMPLED_START:].float()
            given = student(input_ids=batch, use_cache=False).logits[:, SAMPLED_START:].float()
            accepted += torch.minimum(wanted.softmax(-1), given.softmax(-1)).sum().item()
            argmax += (wanted.argmax(-1) == given.argmax(-1)).sum().item()
            count += wanted.shape[0] * wanted.shape[1]
        found[what] = (accepted / count, argmax / count)
    student.train()
    return found


def card(
    student: PreTrainedModel, recipe: Recipe, result: dict[str, Any], measured: dict[str, tuple[float, float]]
) -> str:
    """The README.md beside the weights."""
    config = student.config
    plain, greedy = measured["at temperature 1"], measured["greedy"]
    layers = "1 layer" if recipe.layers == 1 else f"{recipe.layers} layers"
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---

# tiny-draft

A bundled model of Backbench: the draft for `tiny` in speculative decoding. It is of no use beyond that.

| | |
| --- | --- |
| Architecture | {config.architectures[0]}, {layers}, hidden {config.hidden_size}, \
{config.num_attention_heads} query and {config.num_key_value_heads} key-value heads of {config.head_dim}, \
feed-forward {config.intermediate_size}, tied embeddings |
| Parameters | {student.num_parameters():,} (bf16) |
| Tokenizer | that of `tiny` |
| Context | {config.max_position_embeddings} tokens |
| On text sampled from `tiny` at temperature 1 | **{plain[0]:.1%}** of its tokens are kept by lossless \
acceptance; {plain[1]:.1%} of its most likely tokens are those of `tiny` |
| On greedy text of `tiny` | {greedy[1]:.1%} of its most likely tokens are those of `tiny` |

Measured on {result["held out"]} samples of the teacher that it was not trained on (stored bf16 weights, \
computed in fp32).

## Data

None but the teacher's: {recipe.samples:,} samples of {recipe.sample_tokens} tokens, drawn from `tiny` at \
temperatures {", ".join(f"{each:g}" for each in sorted(set(TEMPERATURES)))}. \
The texts that `tiny` was trained on are named in its card.
The weights are under Backbench's licence, Apache-2.0.

## Training

{result["steps"]:,} steps of {recipe.batch} samples in {result["seconds"]:.0f} s on {result["device"]}: \
the teacher's distribution at every token, Kullback-Leibler divergence plus total variation.
AdamW in bf16 autocast, peak learning rate {recipe.learning_rate:g}, warm-up and cosine to zero, \
weight decay \
{recipe.weight_decay:g}, seed {recipe.seed}.

To retrain:

    python tools/distill_draft.py --out engine/checkpoints/tiny-draft --layers {recipe.layers} \
--width {recipe.width} \\
        --steps {result["steps"]} --batch {recipe.batch} --samples {recipe.samples} \
--sample-tokens {recipe.sample_tokens} \\
        --learning-rate {recipe.learning_rate:g} --weight-decay {recipe.weight_decay:g} --seed {recipe.seed}
"""


if __name__ == "__main__":
    main()
