"""Random EAGLE-3 heads as checkpoints, and what a head computes in plain torch: whole sequences, no cache."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from backbench.engine.engine import Engine
from backbench.engine.models.config import ModelConfig
from backbench.engine.models.decoder import Decoder, whole_sequences
from backbench.engine.scheduling.blocks import BlockPool
from backbench.engine.scheduling.scheduler import StepPlan
from backbench.engine.speculation.eagle3 import Eagle3Proposer

HEADS, KV_HEADS, FFN = 4, 2, 80
LAYERS = (0, 1, 1)
"""Of the small model, which has two."""
DRAFT_VOCAB = 61
LAYOUTS = ("eagle", "speculators")


@dataclass(frozen=True)
class Layout:
    """How a head is written."""

    name: str = "eagle"
    draft_vocab: int | None = DRAFT_VOCAB
    """None = the target's, without d2t."""
    norm_before_residual: bool = False
    own_embedding: bool = False
    qk_norm: bool = False
    hidden_size: int | None = None
    """None = the target's."""
    head_dim: int = 16


def head_tensors(target: ModelConfig, layout: Layout, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the layout's names, loud enough that every input counts."""
    generator = torch.Generator().manual_seed(seed)
    size, vocab = layout.hidden_size or target.hidden_size, layout.draft_vocab or target.vocab_size
    prefix = "midlayer" if layout.name == "eagle" else "layers.0"

    def product(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * 2 / math.sqrt(columns)

    def norm(length: int) -> Tensor:
        return 1 + 0.3 * torch.randn(length, generator=generator)

    tensors = {
        "fc.weight": product(size, len(LAYERS) * target.hidden_size),
        f"{prefix}.input_layernorm.weight": norm(size),
        f"{prefix}.hidden_norm.weight": norm(size),
        f"{prefix}.post_attention_layernorm.weight": norm(size),
        f"{prefix}.self_attn.q_proj.weight": product(HEADS * layout.head_dim, 2 * size),
        f"{prefix}.self_attn.k_proj.weight": product(KV_HEADS * layout.head_dim, 2 * size),
        f"{prefix}.self_attn.v_proj.weight": product(KV_HEADS * layout.head_dim, 2 * size),
        f"{prefix}.self_attn.o_proj.weight": product(size, HEADS * layout.head_dim),
        f"{prefix}.mlp.gate_proj.weight": product(FFN, size),
        f"{prefix}.mlp.up_proj.weight": product(FFN, size),
        f"{prefix}.mlp.down_proj.weight": product(size, FFN),
        "norm.weight": norm(size),
        "lm_head.weight": product(vocab, size),
    }
    if layout.qk_norm:
        tensors |= {f"{prefix}.self_attn.{each}_norm.weight": norm(layout.head_dim) for each in "qk"}
    if layout.own_embedding:
        tensors["embed_tokens.weight"] = product(target.vocab_size, size)
    if layout.draft_vocab is not None:
        ids = torch.randperm(target.vocab_size, generator=generator)[:vocab].sort().values
        tensors["d2t"] = ids - torch.arange(vocab)
        tensors["t2d"] = torch.zeros(target.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    return tensors


def head_json(target: ModelConfig, layout: Layout) -> dict[str, Any]:
    """config.json of such a head."""
    layer = {
        "model_type": "qwen3" if layout.qk_norm else "llama",
        "hidden_act": "silu",
        "hidden_size": layout.hidden_size or target.hidden_size,
        "intermediate_size": FFN,
        "max_position_embeddings": 64,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 1,
        "num_key_value_heads": KV_HEADS,
        "head_dim": layout.head_dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": target.vocab_size,
    }
    head: dict[str, Any] = {"draft_vocab_size": layout.draft_vocab or target.vocab_size}
    if layout.hidden_size is not None:
        head["target_hidden_size"] = target.hidden_size
    if layout.name == "speculators":
        return head | {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_config": {"algorithm": "eagle3"},
            "norm_before_residual": layout.norm_before_residual,
            "eagle_aux_hidden_state_layer_ids": list(LAYERS),
            "transformer_layer_config": layer,
        }
    if layout.norm_before_residual:
        head["norm_before_residual"] = True
    ids = {"eagle_aux_hidden_state_layer_ids": list(LAYERS)}
    return head | layer | ids | {"architectures": ["LlamaForCausalLMEagle3"], "tie_word_embeddings": False}


def write_head(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@cache
def head_folder(target: ModelConfig, layout: Layout = Layout()) -> Path:
    """A checkpoint of such a head, for as long as the tests run."""
    folder = Path(_scratch().name) / str(len(list(Path(_scratch().name).iterdir())))
    return write_head(folder, head_json(target, layout), head_tensors(target, layout))


class Recorder:
    """A tap that remembers."""

    def __init__(self, layers: tuple[int, ...] = LAYERS) -> None:
        self.layers = layers
        self.states = torch.empty(0)
        """[T, layers * target H] of the last step."""

    def keep(self, states: Sequence[Tensor], slots: Tensor) -> None:
        self.states = torch.cat(tuple(states), -1)


def target_states(decoder: Decoder, token_ids: list[int], layers: tuple[int, ...] = LAYERS) -> Tensor:
    """The target's hidden states [T, layers * target H] of a whole sequence."""
    count, recorder, device = len(token_ids), Recorder(layers), decoder.device.torch_device
    batch = whole_sequences([count], decoder.limits.block_size, device)
    caches = decoder.new_caches(batch.block_table.shape[1])
    ids, positions = torch.tensor(token_ids, device=device), torch.arange(count, device=device)
    decoder.forward(ids, positions, batch, caches, tap=recorder)
    return recorder.states.cpu()


class PlainHead:
    """A head in a few lines of torch, from its files, after Li et al. 2025 and the code of its authors."""

    def __init__(self, folder: Path, target_embedding: Tensor) -> None:
        self.tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        layer = config.get("transformer_layer_config", config)
        self.heads, self.kv_heads = layer["num_attention_heads"], layer["num_key_value_heads"]
        self.head_dim, self.eps = layer["head_dim"], layer["rms_norm_eps"]
        self.before = bool(config.get("norm_before_residual"))
        self.prefix = "midlayer." if any("midlayer" in name for name in self.tensors) else "layers.0."
        self.embedding = self.tensors.get("embed_tokens.weight", target_embedding)
        count = len(self.tensors["lm_head.weight"])
        self.target_ids = torch.arange(count) + self.tensors.get("d2t", torch.zeros(count, dtype=torch.long))

    def fuse(self, states: Tensor) -> Tensor:
        return states @ self.tensors["fc.weight"].T

    def keys(self, hidden: Tensor, following: Tensor) -> Tensor:
        """Rotated keys [T, KV heads, head_dim]."""
        return self._heads(self._input(hidden, following), "k", self.kv_heads)

    def advance(self, hidden: Tensor, following: Tensor) -> Tensor:
        """The state after each of a whole sequence's, [T, H], of its states and the tokens after them."""
        rows = self._input(hidden, following)
        q, k = self._heads(rows, "q", self.heads), self._heads(rows, "k", self.kv_heads)
        v = (rows @ self._of("self_attn.v_proj").T).unflatten(-1, (self.kv_heads, self.head_dim))
        k, v = (each.repeat_interleave(self.heads // self.kv_heads, 1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.head_dim)
        later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
        residual = self._norm(hidden, "hidden_norm") if self.before else hidden
        residual = residual + attended @ self._of("self_attn.o_proj").T
        normed = self._norm(residual, "post_attention_layernorm")
        gate, up = normed @ self._of("mlp.gate_proj").T, normed @ self._of("mlp.up_proj").T
        return residual + (F.silu(gate) * up) @ self._of("mlp.down_proj").T

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, the head's vocabulary]"""
        return self._rms_norm(hidden, self.tensors["norm.weight"]) @ self.tensors["lm_head.weight"].T

    def draft_logits(self, states: Tensor, token_ids: list[int], drafted: list[int]) -> Tensor:
        """What each of the `drafted` tokens is drawn from, [drafted, target's vocabulary].

        states: of all of `token_ids` but the last. Every token is computed again from the first on.
        """
        hidden, found = self.fuse(states), []
        for count in range(len(drafted)):
            following = torch.tensor([*token_ids[1:], *drafted[:count]])
            out = self.advance(hidden, following)[-1:]
            hidden = torch.cat((hidden, out))
            whole = torch.full((len(self.embedding),), -torch.inf)
            whole[self.target_ids] = self.logits(out)[0]
            found.append(whole)
        return torch.stack(found)

    def _input(self, hidden: Tensor, following: Tensor) -> Tensor:
        embedded = self._norm(self.embedding[following], "input_layernorm")
        return torch.cat((embedded, self._norm(hidden, "hidden_norm")), -1)

    def _heads(self, rows: Tensor, which: str, count: int) -> Tensor:
        """Queries or keys, normed where the layer does, rotated by position."""
        size = self.head_dim
        x = (rows @ self._of(f"self_attn.{which}_proj").T).unflatten(-1, (count, size))
        norm = self.tensors.get(f"{self.prefix}self_attn.{which}_norm.weight")
        x = x if norm is None else self._rms_norm(x, norm)
        turns = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angles = (torch.arange(len(x))[:, None] * turns)[:, None].repeat(1, 1, 2)
        one, other = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-other, one), -1) * angles.sin()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return self._rms_norm(x, self.tensors[f"{self.prefix}{name}.weight"])

    def _of(self, name: str) -> Tensor:
        return self.tensors[f"{self.prefix}{name}.weight"]

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight


class Compared:
    """Holds every greedy draft of an engine's head to plain torch over the whole sequence."""

    def __init__(self, engine: Engine, folder: Path, close: float) -> None:
        """close: what a draft's logit may lack of the largest."""
        assert engine.speculator is not None
        proposer = engine.speculator.proposer
        assert isinstance(proposer, Eagle3Proposer)
        self.engine, self.proposer, self.close = engine, proposer, close
        self.plain = PlainHead(folder, engine.decoder.weights.embedding.cpu())
        self.drafts = 0
        """Tokens that were compared."""
        self._states: dict[tuple[int, ...], Tensor] = {}
        self._propose = proposer.propose
        proposer.propose = self.propose  # type: ignore[method-assign]

    def propose(self, plan: StepPlan, rooms: list[int], pool: BlockPool) -> list[list[int]]:
        drafts = self._propose(plan, rooms, pool)
        for part, drafted in zip(plan.slices, drafts, strict=False):
            known = part.sequence.token_ids
            if drafted and part.sequence.params.temperature == 0:
                logits = self.plain.draft_logits(self.states(known[:-1]), known, drafted)
                chosen = logits.gather(1, torch.tensor(drafted)[:, None])[:, 0]
                assert (chosen >= logits.amax(1) - self.close).all(), "a draft is not what the head says"
                self.drafts += len(drafted)
        return drafts

    def states(self, token_ids: list[int]) -> Tensor:
        """The target's hidden states of a sequence."""
        known = tuple(token_ids)
        if known not in self._states:
            self._states[known] = target_states(self.engine.decoder, token_ids)
        return self._states[known]
