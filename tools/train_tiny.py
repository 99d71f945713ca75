"""Train the bundled model `tiny` from a folder of plain texts; `distill_draft.py` makes its draft of it.

    python tools/train_tiny.py --data TEXTS --out engine/checkpoints/tiny

TEXTS holds UTF-8 files ending in .txt, .md, .txt.gz or .md.gz. Every text is cut into documents of about
8 KB that end with a paragraph; every 50th document is held out. The tokenizer (byte-level BPE) is learned
from the training documents alone and is the same on every machine, so the second model may either take it
with `--tokenizer` or learn it again. The last weights are rounded to bf16, written in Hugging Face format,
and measured once more in fp32 for the model card.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from tiny_texts import HELD_OUT_EVERY, SOURCES, Corpus, join_lines, read_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 4096
CONTEXT_TOKENS = 4096
HEAD_DIM = 64
"""Every attention kernel library supports it."""
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
"""As generation_config.json they mean greedy unless asked otherwise."""
SHARED: dict[str, Any] = {
    "head_dim": HEAD_DIM,
    "max_position_embeddings": CONTEXT_TOKENS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
} | ENDS
"""What the configurations of `tiny` and of its draft agree in."""
VALIDATIONS = 12  # times a run looks at the held-out documents on its way


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; the command line may replace any of it."""

    steps: int
    seed: int = 0
    batch: int = 8
    """Windows a step."""
    window_tokens: int = CONTEXT_TOKENS
    """Tokens a window predicts; the whole context, so that every position is trained."""
    learning_rate: float = 3e-3
    weight_decay: float = 0.5
    dropout: float = 0.1
    """On the embeddings and on what every attention and feed-forward block adds; off after training."""
    warmup: float = 0.03
    """Share of the run over which the learning rate rises."""
    max_seconds: float = math.inf
    """The schedule is squeezed so that training ends by then; inf = the steps alone decide."""


RECIPE = Recipe(steps=2000, weight_decay=1.5)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one model as the command line says."""
    options = parse_arguments(arguments)
    given = {name: getattr(options, name) for name in Recipe.__dataclass_fields__}
    recipe = replace(RECIPE, **{k: v for k, v in given.items() if v is not None})
    corpus = read_corpus(options.data)
    if options.tokenizer is None:
        tokenizer = train_tokenizer(corpus.train)
    else:
        tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    options.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, options.out)
    if options.tokenizer_only:
        return

    torch.manual_seed(recipe.seed)
    model = build_model(tokenizer.get_vocab_size())
    if options.start is not None:
        load_model(model, options.start / "model.safetensors")
    model = model.to(options.device)
    documents = [*corpus.train, *map(join_lines, corpus.train)] if options.join_lines else corpus.train
    train = encode_documents(tokenizer, documents).to(options.device)
    held_out = encode_documents(tokenizer, corpus.held_out).to(options.device)
    print(
        f"{model.num_parameters():,} parameters, {len(train):,} training, {len(held_out):,} held-out tokens"
    )
    result = train_model(model, train, held_out, recipe)

    model = model.to(torch.bfloat16)
    model.save_pretrained(options.out)
    loss = validation_loss(model.float(), held_out, autocast=False)
    result |= {
        "training tokens": len(train),
        "held-out tokens": len(held_out),
        "loss": loss,
        "bits per byte": loss * (len(held_out) - 1) / math.log(2) / corpus.held_out_bytes,
        "device": device_name(options.device),
        "precision": "bf16 autocast" if train.is_cuda else "fp32",
        "options": text_options(options),
    }
    card = model_card(model, corpus, recipe, result)
    (options.out / "README.md").write_text(card, encoding="utf-8")
    print(f"validation loss {loss:.4f} nats/token, {result['bits per byte']:.4f} bits/byte (stored weights)")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what the recipe decides is None unless given."""
    parser = argparse.ArgumentParser(description="Train the bundled model of Backbench.")
    parser.add_argument("--data", type=Path, required=True, help="folder of .txt, .md, .txt.gz, .md.gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder the model is written to")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a tokenizer.json to take instead of learning one"
    )
    parser.add_argument(
        "--tokenizer-only", action="store_true", help="learn and write the tokenizer, then stop"
    )
    parser.add_argument("--start", type=Path, help="folder of a trained model to go on from")
    parser.add_argument(
        "--join-lines", action="store_true", help="train on long lines as well, see tiny_texts"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("steps", "seed", "batch", "window_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in ("learning_rate", "weight_decay", "dropout", "warmup", "max_seconds"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float)
    return parser.parse_args(arguments)


def train_tokenizer(documents: Sequence[str]) -> Tokenizer:
    """Byte-level BPE whose token 0 ends a document; every byte string can be written with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json without white space (a third of its size) and its configuration."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    path = out / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def text_options(options: argparse.Namespace) -> str:
    """The options that decide what is trained on what, as the card repeats them."""
    words = []
    if options.tokenizer is not None:
        words.append(f"--tokenizer {options.tokenizer}")
    if options.start is not None:
        words.append(f"--start {options.start}")
    if options.join_lines:
        words.append("--join-lines")
    return " ".join(words)


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> torch.Tensor:
    """One int64 stream, shape (tokens,): an end-of-text token, then each document and another."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream = [end]
    for encoding in tokenizer.encode_batch(list(documents)):
        stream += encoding.ids
        stream.append(end)
    return torch.tensor(stream)


def build_model(vocabulary_size: int) -> PreTrainedModel:
    """The untrained model, fp32."""
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary_size,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            **SHARED,
        )
    )
    model.generation_config = GenerationConfig(**ENDS)
    return model


def train_model(
    model: PreTrainedModel, train: torch.Tensor, held_out: torch.Tensor, recipe: Recipe
) -> dict[str, float]:
    """AdamW on random windows of the training stream, under bf16 autocast on a GPU.

    The learning rate rises over the warm-up and falls to zero along a cosine; `progress` is the larger of
    the share of steps and the share of seconds used, so that a timed stop is annealed as well.
    """
    optimizer = make_optimizer(model, recipe.learning_rate, recipe.weight_decay)
    hooks = add_dropout(model, recipe.dropout)
    begin_s = time.monotonic()
    next_look, step, progress = 1 / VALIDATIONS, 0, 0.0
    while progress < 1:
        rate = recipe.learning_rate * learning_rate_share(progress, recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = random_windows(train, recipe.batch, recipe.window_tokens)
        model.train()
        with torch.autocast(train.device.type, torch.bfloat16, enabled=train.is_cuda):
            logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 10 == 0:
            loss.item()  # waits for the device: the clock below must not run ahead of it
        progress = max(step / recipe.steps, (time.monotonic() - begin_s) / recipe.max_seconds)
        if progress >= next_look:
            next_look += 1 / VALIDATIONS
            held = validation_loss(model, held_out, autocast=train.is_cuda)
            print(
                f"step {step:6d}  {time.monotonic() - begin_s:6.1f} s  rate {rate:.2e}  "
                f"train {loss.item():.4f}  validation {held:.4f}",
                flush=True,
            )
    for hook in hooks:
        hook.remove()
    return {"steps": step, "seconds": time.monotonic() - begin_s}


def make_optimizer(
    model: torch.nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norm scales do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    scales = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=matrices[0].is_cuda)


def add_dropout(model: PreTrainedModel, share: float) -> list[torch.utils.hooks.RemovableHandle]:
    """Dropout where the architectures have none: eight megabytes of text are soon learned by heart."""

    def drop(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, share, training=module.training)

    if share == 0:
        return []
    places = ("embed_tokens", "o_proj", "down_proj")
    return [m.register_forward_hook(drop) for name, m in model.named_modules() if name.endswith(places)]


def learning_rate_share(progress: float, warmup: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def random_windows(stream: torch.Tensor, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both (batch, tokens), from random places of the stream."""
    starts = torch.randint(len(stream) - tokens, (batch, 1), device=stream.device)
    windows = stream[starts + torch.arange(tokens + 1, device=stream.device)]
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def validation_loss(model: PreTrainedModel, stream: torch.Tensor, autocast: bool) -> float:
    """Mean nats a token over the whole stream, read in windows of the context length."""
    model.eval()
    total = 0.0
    for start in range(0, len(stream) - 1, CONTEXT_TOKENS):
        window = stream[start : start + CONTEXT_TOKENS + 1]
        with torch.autocast(stream.device.type, torch.bfloat16, enabled=autocast):
            logits = model(input_ids=window[None, :-1], use_cache=False).logits
        total += F.cross_entropy(logits[0].float(), window[1:], reduction="sum").item()
    return total / (len(stream) - 1)


def device_name(device: str) -> str:
    """What a reader of the card would call the device."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def model_card(model: PreTrainedModel, corpus: Corpus, recipe: Recipe, result: dict[str, Any]) -> str:
    """The README.md beside the weights."""
    config = model.config
    rows = []
    for text in corpus.names:
        title, licence = SOURCES.get(text, (text, "not known to the training script"))
        rows.append(f"| {title} | {licence} |")
    seen_tokens = result["steps"] * recipe.batch * recipe.window_tokens
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---

# tiny

A bundled model of Backbench: small enough to ship and to run on a CPU, trained for real, so that
quantization, sparsity and speculative decoding have an accuracy to lose. It is of no use beyond that.

| | |
| --- | --- |
| Architecture | {config.architectures[0]}, {config.num_hidden_layers} layers, hidden {config.hidden_size}, \
{config.num_attention_heads} query and {config.num_key_value_heads} key-value heads of {config.head_dim}, \
feed-forward {config.intermediate_size}, tied embeddings |
| Parameters | {model.num_parameters():,} (bf16) |
| Tokenizer | byte-level BPE, {config.vocab_size} tokens, the same for `tiny` and `tiny-draft`; \
token 0 `{END_OF_TEXT}` ends a document |
| Context | {config.max_position_embeddings} tokens |
| Validation loss | **{result["loss"]:.4f} nats per token**, {result["bits per byte"]:.4f} bits per byte \
(stored bf16 weights, computed in fp32) |

## Data

| Text | Licence |
| --- | --- |
{chr(10).join(rows)}

Every text is cut into documents of about 8 KB that end with a paragraph. One document in {HELD_OUT_EVERY}
({result["held-out tokens"]:,} tokens, {corpus.held_out_bytes:,} bytes in all) is kept from the tokenizer \
and the training, and gives
the validation loss; {result["training tokens"]:,} tokens remain. No text ships with Backbench. The weights
are under Backbench's licence, Apache-2.0.

## Training

{result["steps"]:,} steps of {recipe.batch} x {recipe.window_tokens} tokens \
({seen_tokens / 1e6:.0f} M tokens, {seen_tokens / result["training tokens"]:.0f} epochs) in \
{result["seconds"]:.0f} s on {result["device"]}.
AdamW in {result["precision"]}, peak learning rate {recipe.learning_rate:g}, warm-up and cosine to zero, \
weight decay {recipe.weight_decay:g}, dropout {recipe.dropout:g}, seed {recipe.seed}.

To retrain, put the texts above in a folder TEXTS:

    python tools/train_tiny.py --data TEXTS --out engine/checkpoints/tiny \\
        {result["options"]} \\
        --steps {result["steps"]} --seed {recipe.seed} --batch {recipe.batch} --window-tokens \
{recipe.window_tokens} \\
        --learning-rate {recipe.learning_rate:g} --weight-decay {recipe.weight_decay:g} \
--dropout {recipe.dropout:g}
"""


if __name__ == "__main__":
    main()
