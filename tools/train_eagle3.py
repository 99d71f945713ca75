"""Train an EAGLE-3 head for `tiny`: one layer over its hidden states that drafts, for speculative decoding.

    python tools/train_eagle3.py --out HEAD
    bench run -m tiny --speculate eagle3:HEAD:3

No text is needed: the target's own samples are what the head is to continue. As in Li et al. 2025 (section
3.2, training-time test) it learns to go on from its own states: from every token it drafts several, each pass
over the states that came out of the one before. What is written is the layout of EAGLE's authors, rounded to
bf16 and measured once more in fp32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from distill_draft import CHECKPOINTS, SAMPLED_START, TEMPERATURES, Training, divergence, fit, sample
from safetensors.torch import save_file
from torch import Tensor, nn
from train_tiny import HEAD_DIM, device_name
from transformers import AutoModelForCausalLM, PreTrainedModel

LAYERS = (1, 2, 4)
"""What enters these layers of the target is given to the head."""
AHEAD = 3
"""Tokens drafted from every token in training."""
LATER_WEIGHT = 0.8
"""Of a pass's loss, to that of the pass before it."""


@dataclass(frozen=True)
class Recipe(Training):
    """How the head is trained."""

    steps: int = 4000
    samples: int = 2048
    sample_tokens: int = 512
    learning_rate: float = 2e-3
    draft_vocab: int = 2048
    """The most frequent tokens of the samples, which the head can draft."""


class Norm(nn.Module):
    """RMSNorm with a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size], normed in its last dimension."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Queries, keys and values of twice the hidden size."""

    def __init__(self, size: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(2 * size, heads * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(2 * size, kv_heads * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(2 * size, kv_heads * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(heads * HEAD_DIM, size, bias=False)
        self.repeats = heads // kv_heads

    def heads(self, rows: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [batch, heads, T, d] of rows at positions from `first` on; q and k rotated."""
        q, k, v = (
            each(rows).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = k.repeat_interleave(self.repeats, 1), v.repeat_interleave(self.repeats, 1)
        return rotated(q, first), rotated(k, first), v


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Midlayer(nn.Module):
    """The head's decoder layer, under the names of the authors' code."""

    def __init__(self, size: int, heads: int, kv_heads: int, inner: int, eps: float) -> None:
        super().__init__()
        self.input_layernorm, self.hidden_norm = Norm(size, eps), Norm(size, eps)
        self.self_attn = Attention(size, heads, kv_heads)
        self.post_attention_layernorm, self.mlp = Norm(size, eps), Mlp(size, inner)


class Head(nn.Module):
    """A head for one target, whose embedding it shares."""

    def __init__(self, target: PreTrainedModel, draft_ids: Tensor) -> None:
        """draft_ids: i64 [draft vocabulary], the target's ids of what the head can draft, in order."""
        super().__init__()
        config = target.config
        size, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(len(LAYERS) * size, size, bias=False)
        shape = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
        self.midlayer = Midlayer(size, *shape, eps)
        self.norm = Norm(size, eps)
        self.lm_head = nn.Linear(size, len(draft_ids), bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(target.get_output_embeddings().weight[draft_ids])
            self.norm.weight.copy_(target.get_decoder().norm.weight)
        self.register_buffer("d2t", draft_ids - torch.arange(len(draft_ids), device=draft_ids.device))
        known = torch.zeros(config.vocab_size, dtype=torch.bool, device=draft_ids.device)
        self.register_buffer("t2d", known.index_fill(0, draft_ids, True))

    @property
    def draft_ids(self) -> Tensor:
        """The target's id of each token of the head."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def passes(self, states: Tensor, embedded: Tensor, ahead: int) -> Iterator[Tensor]:
        """Logits of the first, second, ... token drafted from each token, [batch, T - pass, drafts].

        states: [batch, T, layers * H] of the target; embedded: [batch, T, H], of the token after each. A pass
        goes on from the states that came out of the one before, over the keys of the true states up to where
        the draft began and of its own tokens since, as the engine's head does.
        """
        layer, hidden = self.midlayer, self.fc(states)
        count = hidden.shape[1]
        later = torch.ones(count, count, dtype=torch.bool, device=states.device).triu(1)
        true_keys = true_values = None
        own: list[tuple[Tensor, Tensor]] = []
        for place in range(ahead):
            begins = count - place  # drafts from the last tokens would need tokens after the end
            inputs = layer.input_layernorm(embedded[:, place:]), layer.hidden_norm(hidden[:, :begins])
            q, k, v = layer.self_attn.heads(torch.cat(inputs, -1), place)
            if true_keys is None or true_values is None:
                true_keys, true_values = k, v
            else:
                own = [(keys[:, :, :begins], values[:, :, :begins]) for keys, values in own] + [(k, v)]
            scores = q @ true_keys.transpose(-1, -2)
            scores = scores.masked_fill(later[:begins], -torch.inf)
            beside = [(q * keys).sum(-1, keepdim=True) for keys, _ in own]
            weights = (torch.cat((scores, *beside), -1) / HEAD_DIM**0.5).softmax(-1)
            out = weights[..., :count] @ true_values
            for index, (_, values) in enumerate(own):
                out = out + weights[..., count + index, None] * values
            residual = hidden[:, :begins] + layer.self_attn.o_proj(out.transpose(1, 2).flatten(2))
            hidden = residual + layer.mlp(layer.post_attention_layernorm(residual))
            yield self.lm_head(self.norm(hidden))


def rotated(x: Tensor, first: int) -> Tensor:
    """x [..., T, d] rotated by its positions from `first` on (Su et al. 2021)."""
    turns = 10_000.0 ** (-torch.arange(0, HEAD_DIM, 2, device=x.device) / HEAD_DIM)
    angles = (torch.arange(first, first + x.shape[-2], device=x.device)[:, None] * turns).repeat(1, 2)
    one, other = x.chunk(2, -1)
    return x * angles.cos() + torch.cat((-other, one), -1) * angles.sin()


def main() -> None:
    """Sample, train, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", type=Path, default=CHECKPOINTS / "tiny")
    parser.add_argument("--out", type=Path, required=True, help="folder the head is written to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    Recipe.add_options(parser)
    options = parser.parse_args()
    recipe = Recipe.given(options)
    torch.manual_seed(recipe.seed)
    device = options.device
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.float32).to(device).eval()
    held_out = max(len(TEMPERATURES), recipe.samples // 32)
    samples = sample(target, recipe.samples + held_out, recipe.sample_tokens)
    held, train = samples[:held_out], samples[held_out:]
    counts = torch.bincount(train.flatten(), minlength=target.config.vocab_size)
    head = Head(target, counts.topk(recipe.draft_vocab).indices.sort().values).to(device)
    covered = counts[head.draft_ids].sum() / counts.sum()
    print(f"{sum(p.numel() for p in head.parameters()):,} parameters; {covered:.1%} of tokens can be drafted")
    result = fit(head, partial(drafting_loss, head, target), train, recipe)
    head.load_state_dict(rounded(head))
    measured = agreement(head, target, held)
    for what, places in measured.items():
        print(what, *(f"{place}: {accepted:.3f}, {same:.3f}" for place, (accepted, same) in places.items()))
    write(options.out, head, target)
    (options.out / "README.md").write_text(card(head, recipe, result, device, measured), encoding="utf-8")


def prepared(target: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of token ids [batch, T + 1]: the target's states, the embedding of the tokens after them, T each, and
    its logits at all tokens."""
    with torch.no_grad():
        output = target(input_ids=ids, use_cache=False, output_hidden_states=True)
        embedded = target.get_input_embeddings()(ids[:, 1:])
    states = torch.cat([output.hidden_states[layer] for layer in LAYERS], -1)
    return states[:, :-1], embedded, output.logits


def drafting_loss(head: Head, target: PreTrainedModel, batch: Tensor) -> Tensor:
    """Of drafts from every token of i64[batch, tokens]: the divergence of each pass, later ones for less."""
    states, embedded, logits = prepared(target, batch)
    wanted = logits[..., head.draft_ids].float()
    losses = [
        LATER_WEIGHT**place * divergence(given.float(), wanted[:, place + 1 :])
        for place, given in enumerate(head.passes(states, embedded, AHEAD))
    ]
    return torch.stack(losses).sum()


@torch.inference_mode()
def agreement(head: Head, target: PreTrainedModel, held: Tensor) -> dict[str, dict[int, tuple[float, float]]]:
    """By text and place in a draft: (share of drafts that lossless acceptance keeps at temperature 1, that of
    equal argmax), where all before were accepted. The first `SAMPLED_START` tokens are not counted."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for what, temperature in (("at temperature 1", 1.0), ("greedy", 0.0)):
        rows = held[[i for i in range(len(held)) if TEMPERATURES[i % len(TEMPERATURES)] == temperature]]
        sums = torch.zeros(AHEAD, 3)
        for batch in rows.split(4):
            states, embedded, logits = prepared(target, batch)
            for place, given in enumerate(head.passes(states, embedded, AHEAD)):
                wanted = logits[:, place + 1 :][:, SAMPLED_START:].float().softmax(-1)
                drafted = given[:, SAMPLED_START:].float().softmax(-1)
                kept = torch.minimum(wanted[..., head.draft_ids], drafted).sum()
                same = (head.draft_ids[drafted.argmax(-1)] == wanted.argmax(-1)).sum()
                sums[place] += torch.tensor([kept.item(), same.item(), drafted[..., 0].numel()])
        found[what] = {
            place + 1: ((kept / count).item(), (same / count).item())
            for place, (kept, same, count) in enumerate(sums)
        }
    return found


def rounded(head: Head) -> dict[str, Tensor]:
    """The head's tensors as bf16 keeps them, in their own dtypes."""
    return {
        name: tensor.bfloat16().to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in head.state_dict().items()
    }


def write(folder: Path, head: Head, target: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> None:
    """The checkpoint, as EAGLE's authors lay it out."""
    config = target.config
    settings = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "draft_vocab_size": len(head.d2t),
        "dtype": str(dtype).removeprefix("torch."),
        "eagle_aux_hidden_state_layer_ids": list(LAYERS),
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in head.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def card(
    head: Head,
    recipe: Recipe,
    result: dict[str, float],
    device: str,
    measured: dict[str, dict[int, tuple[float, float]]],
) -> str:
    """The README.md beside the weights."""
    rows = [
        f"| {what} | {place} | {accepted:.1%} | {same:.1%} |"
        for what, places in measured.items()
        for place, (accepted, same) in places.items()
    ]
    return f"""---
license: apache-2.0
---

# An EAGLE-3 head for `tiny`

It drafts for the bundled `tiny` (`--speculate eagle3:HEAD:3`) and is of no use beyond that: \
{sum(p.numel() for p in head.parameters()):,} parameters (bf16) over what enters layers \
{", ".join(map(str, LAYERS))}; {len(head.d2t):,} tokens can be drafted.

On samples of `tiny` that it was not trained on (stored bf16 weights, computed in fp32), by place in a draft \
whose earlier tokens were accepted: the share that lossless acceptance keeps at temperature 1, and the share \
of most likely tokens that are those of `tiny`.

| text | place | kept | same |
| --- | --- | --- | --- |
{chr(10).join(rows)}

Trained on {recipe.samples:,} samples of {recipe.sample_tokens} tokens of `tiny` alone, \
{result["steps"]:,.0f} steps of {recipe.batch} in {result["seconds"]:.0f} s on {device_name(device)}, by the \
divergence of its distribution from that of `tiny` over {AHEAD} passes, each from the states before it.

    python tools/train_eagle3.py --out HEAD --steps {result["steps"]:.0f} --batch {recipe.batch} \\
        --samples {recipe.samples} --sample-tokens {recipe.sample_tokens} \\
        --draft-vocab {recipe.draft_vocab} --seed {recipe.seed} \\
        --learning-rate {recipe.learning_rate:g} --weight-decay {recipe.weight_decay:g}
"""


if __name__ == "__main__":
    main()
