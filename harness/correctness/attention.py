"""Each layer's attention as the backend computes it, head by head, on the model's own queries and keys.

Log-probabilities see little of one head: on random weights attention hardly moves them. Here a layer's
projections of the sample's tokens are laid out as sequences, up to the longest context of the run, over
permuted blocks; the backend rotates, stores and attends to them as it does while serving, and three things
are compared: the queries it makes, the keys and values that its cache gives back, and its output, given
those. Torch in the same dtype on the same inputs says what rounding alone does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbench.backends.conformance import oracle
from backbench.backends.conformance.scenario import Layout, Row, make_batch, permuted_layout, write_batch
from backbench.backends.conformance.tolerance import TORCH_FACTOR, rounding
from backbench.backends.interface import AttentionRunner, AttentionSpec, Batch, Device, Rotation
from backbench.backends.quantization import kept_heads
from backbench.backends.torch.attention import TorchAttention, TorchRunner
from backbench.backends.torch.operations import TorchOperations
from backbench.engine.models.decoder import Decoder
from backbench.harness.correctness.reference import WideOperations, wider

SEED = 20_261_125
DECODES = (1, 16, 17, 65, 130, 257, 600)
"""Contexts of decodes: both sides of a block's edge, several blocks. The longest and its half come on top."""
PROMPTS = (Row(1, 33), Row(17, 17), Row(130, 130), Row(5, 44), Row(33, 257), Row(40, 600))
"""A mixed step: a decode, whole prompts, prompts behind a stored prefix. One at the longest comes on top."""
LONG_QUERIES = 16
"""Queries of the prompt at the longest context, its last ones."""
TYPICAL_SCORE = 2.0
"""Root mean square of the scores that the queries are made to have at least, as in conformance's cases."""
CHUNK_TOKENS = 4096
"""Tokens whose queries, keys and values are compared at once: bounds memory at long contexts."""
SCORED_TOKENS = 256
"""Tokens from which that is estimated."""


@dataclass(frozen=True)
class Piece:
    """Tokens that one step computes: which of the sample's they are, where they stand, and their batch."""

    tokens: Tensor
    positions: Tensor
    batch: Batch


@dataclass(frozen=True)
class Stage:
    """One step of the backend over sequences whose contexts are stored before."""

    rows: tuple[Row, ...]
    num_blocks: int
    contexts: tuple[Piece, ...]
    step: Piece
    tokens: tuple[Tensor, ...]
    """Which of the sample's tokens stand at the positions of each sequence, i64[length]."""
    slots: tuple[Tensor, ...]
    """Where the cache keeps them, i64[length]."""


@dataclass(frozen=True)
class Worst:
    """The place nearest to its bound, or furthest beyond it."""

    share: float
    """Its error over the bound."""
    error: float
    """Root mean square over the head's dimensions, relative to that of the right values."""
    limit: float
    layer: int
    what: str
    """"query", "key", "value" or "output"."""
    head: int
    row: Row
    """The sequence: its new queries, and its keys."""
    position: int

    def describe(self) -> str:
        """The place in words, as an error line names it."""
        step = "decode" if self.row.query == 1 else f"prompt's last {self.row.query} tokens"
        return (
            f"layer {self.layer}, {self.what} of head {self.head}, position {self.position} (a {step}, "
            f"context {self.row.length}): off by {100 * self.error:.3g} % of the head's norm, at most "
            f"{100 * self.limit:.3g} %"
        )


def rows_of(spec: AttentionSpec, longest: int) -> tuple[list[Row], list[Row]]:
    """(decodes, a mixed step) for one layer, up to `longest` keys, also around its window's edge."""
    longest = min(longest, spec.max_len)
    edges = [] if spec.window is None else [spec.window - 1, spec.window, spec.window + 1, 2 * spec.window]
    contexts = sorted({*DECODES, *edges, max(1, longest // 2), longest})
    behind = [Row(min(20, spec.window), spec.window + 7)] if spec.window is not None else []
    prompts = [*PROMPTS, *behind, Row(min(LONG_QUERIES, longest), longest)]
    return [Row(1, n) for n in contexts if 1 <= n <= longest], [
        row for row in prompts if row.length <= longest
    ]


def stages(spec: AttentionSpec, longest: int, sample_tokens: int, device: torch.device) -> list[Stage]:
    """The steps for layers of `spec`, as small as its limits on sequences and tokens ask for."""
    generator = torch.Generator().manual_seed(SEED)
    return [
        _stage(rows, spec, sample_tokens, device, generator)
        for group in rows_of(spec, longest)
        for rows in _packed(group, spec)
    ]


def _packed(rows: Sequence[Row], spec: AttentionSpec) -> Iterator[tuple[Row, ...]]:
    """The rows as batches of at most `max_seqs` sequences and `max_tokens` tokens."""
    batch: list[Row] = []
    for row in rows:
        row = Row(min(row.query, spec.max_tokens), row.length)
        full = sum(each.query for each in batch) + row.query > spec.max_tokens
        if batch and (len(batch) == spec.max_seqs or full):
            yield tuple(batch)
            batch = []
        batch.append(row)
    if batch:
        yield tuple(batch)


def _stage(
    rows: tuple[Row, ...],
    spec: AttentionSpec,
    sample_tokens: int,
    device: torch.device,
    generator: torch.Generator,
) -> Stage:
    layout = permuted_layout([row.length for row in rows], spec.block_size, generator)
    tokens = [torch.randint(0, sample_tokens, (row.length,), generator=generator).to(device) for row in rows]
    positions = [torch.arange(row.length, device=device) for row in rows]

    def piece(parts: Sequence[tuple[int, int, int]]) -> Piece:
        """Positions start to end of each row of `parts`."""
        owned = tuple(layout.blocks[row] for row, _, _ in parts)
        some = Layout(owned, layout.num_blocks, layout.block_size, layout.spare)
        batch = make_batch([Row(end - start, end) for _, start, end in parts], some, device)
        return Piece(
            torch.cat([tokens[row][start:end] for row, start, end in parts]),
            torch.cat([positions[row][start:end] for row, start, end in parts]),
            batch,
        )

    contexts = [
        piece([(i, start, min(start + spec.max_tokens, row.context))])
        for i, row in enumerate(rows)
        for start in range(0, row.context, spec.max_tokens)
    ]
    return Stage(
        rows,
        layout.num_blocks,
        tuple(contexts),
        piece([(i, row.context, row.length) for i, row in enumerate(rows)]),
        tuple(tokens),
        tuple(torch.tensor(layout.slots(i, 0, row.length), device=device) for i, row in enumerate(rows)),
    )


class AttentionCheck:
    """Compares the attention of `decoder`'s layers as a torch pass over the same model meets them."""

    def __init__(self, decoder: Decoder, longest: int) -> None:
        self.decoder = decoder
        self.longest = longest
        self.worst: Worst | None = None
        self.num_layers = 0
        self._stages: dict[AttentionSpec, list[Stage]] = {}
        self._wide = WideOperations(wider(decoder.dtype))
        self._unit = rounding(decoder.dtype)

    @property
    def passed(self) -> bool:
        return self.worst is not None and self.worst.share <= 1

    def attention(self) -> TorchAttention:
        """Torch's attention, which shows this check each layer's projections on its way."""
        return _ShowingAttention(self._layer)

    def to_json(self) -> dict[str, Any]:
        """What the record keeps."""
        worst = self.worst
        rows = {row for steps in self._stages.values() for stage in steps for row in stage.rows}
        found: dict[str, Any] = {
            "passed": self.passed,
            "layers": self.num_layers,
            "longest_context": max((row.length for row in rows), default=0),
        }
        if worst is not None:
            found |= {
                "worst_share_of_limit": worst.share if math.isfinite(worst.share) else None,
                "worst": worst.describe(),
            }
        return found

    def _layer(self, qkv: Tensor, rotation: Rotation) -> None:
        """Check the next layer on its projections qkv [T, (q_heads + 2 * kv_heads) * head_dim]."""
        spec = self.decoder.layers[self.num_layers].spec
        qkv = self._sharpened(qkv, rotation, spec)
        if spec not in self._stages:
            self._stages[spec] = stages(spec, self.longest, len(qkv), qkv.device)
        for stage in self._stages[spec]:
            self._check(stage, qkv, rotation)
        self.num_layers += 1

    def _sharpened(self, qkv: Tensor, rotation: Rotation, spec: AttentionSpec) -> Tensor:
        """With larger queries where every score is near 0, as on random weights: all keys then look alike.

        A layer that normalises its queries takes no notice.
        """
        count = min(SCORED_TOKENS, len(rotation.rotary.cos_sin))
        some = qkv[:count].to(self._wide.dtype)
        at = torch.arange(len(some), device=qkv.device)
        q, k, _ = self._wide.rotate(some, at, rotation, spec)
        score = float(q.square().mean() * k.square().mean()) ** 0.5 * spec.head_dim**0.5 * spec.scale
        if not 0 < score < TYPICAL_SCORE:
            return qkv
        sharp = qkv.clone()
        sharp[:, : spec.q_heads * spec.head_dim] *= TYPICAL_SCORE / score
        return sharp

    def _check(self, stage: Stage, qkv: Tensor, rotation: Rotation) -> None:
        layer = self.decoder.layers[self.num_layers]
        runner, spec = layer.runner, layer.spec
        cache = runner.new_cache(stage.num_blocks)
        for piece in stage.contexts:
            self._store(runner, cache, qkv, piece, rotation, spec)
        q = self._store(runner, cache, qkv, stage.step, rotation, spec)
        out = torch.full_like(q, torch.nan)
        runner.plan(stage.step.batch)
        runner.run(q, cache, stage.step.batch, out)
        kept = [x.flatten(0, 1) for x in runner.read(cache, torch.arange(stage.num_blocks, device=q.device))]
        self._compare_stored(stage, qkv, rotation, spec, q, kept)
        self._compare_output(stage, spec, q, kept, out)

    def _store(
        self,
        runner: AttentionRunner,
        cache: Any,
        qkv: Tensor,
        piece: Piece,
        rotation: Rotation,
        spec: AttentionSpec,
    ) -> Tensor:
        """As the decoder does: the rotated queries; keys and values go into the cache."""
        some = qkv[piece.tokens]
        if runner.fused_write:
            return runner.rotate_and_write(some, piece.positions, rotation, cache, piece.batch)
        q, k, v = self.decoder.operations.rotate(some, piece.positions, rotation, spec)
        runner.write(cache, k, v, piece.batch)
        return q

    def _compare_stored(
        self,
        stage: Stage,
        qkv: Tensor,
        rotation: Rotation,
        spec: AttentionSpec,
        q: Tensor,
        kept: list[Tensor],
    ) -> None:
        """Queries, keys and values against torch's rotation in the same dtype and in the wider one."""
        narrow, first, device = TorchOperations(), 0, qkv.device
        for row, tokens, slots in zip(stage.rows, stage.tokens, stage.slots, strict=True):
            for start in range(0, row.length, CHUNK_TOKENS):
                end = min(start + CHUNK_TOKENS, row.length)
                some, at = qkv[tokens[start:end]], torch.arange(start, end, device=device)
                plain = narrow.rotate(some, at, rotation, spec)
                right = self._wide.rotate(some.to(self._wide.dtype), at, rotation, spec)
                for what, x, torchs, wanted in zip(("key", "value"), kept, plain[1:], right[1:], strict=True):
                    wanted, torchs = _as_kept(wanted, torchs, spec)
                    self._judge(what, row, x[slots[start:end]], torchs, wanted, start)
                new = max(0, row.context - start)
                count = end - start - new
                if count > 0:
                    made = q[first : first + count]
                    self._judge("query", row, made, plain[0][new:], right[0][new:], start + new)
                    first += count

    def _compare_output(
        self, stage: Stage, spec: AttentionSpec, q: Tensor, kept: list[Tensor], out: Tensor
    ) -> None:
        """The output against the oracle's and torch's, all from what the backend made and stored."""
        device = self.decoder.device
        reference = TorchRunner(spec, device)
        cache = reference.new_cache(stage.num_blocks)
        slots = torch.cat(stage.slots)
        k, v = (x[slots] if spec.scaled else x[slots].to(spec.kv_dtype) for x in kept)
        reference.write(cache, k, v, write_batch(slots, stage.step.batch.block_table))
        plain = torch.empty_like(q)
        reference.run(q.to(spec.dtype), cache, stage.step.batch, plain)
        first = 0
        for row, where in zip(stage.rows, stage.slots, strict=True):
            part = slice(first, first + row.query)
            right = oracle.attention(q[part], kept[0][where], kept[1][where], spec)
            self._judge("output", row, out[part], plain[part], right, row.context)
            first += row.query

    def _judge(self, what: str, row: Row, got: Tensor, plain: Tensor, right: Tensor, start: int) -> None:
        """Compare [tokens, heads, head_dim], each token's each head by itself, relative to its own norm.

        The bound is conformance's: twice torch's own error in the same dtype, and one rounding, to the dtype
        in which it is kept. Torch's is taken where it is largest, there or on average over the heads, as one
        head's dimensions are few.
        """
        wide = right.dtype
        unit = rounding(self.decoder.kv_dtype) if what in ("key", "value") else self._unit
        norm = _rms(right)
        error = _rms(got.to(wide) - right).nan_to_num(torch.inf, posinf=torch.inf)
        torch_error = (_rms(plain.to(wide) - right) / norm).nan_to_num(0.0)
        typical = torch_error.square().mean().sqrt()
        limit = (TORCH_FACTOR * torch_error.clamp_min(float(typical)) + unit) * norm
        share = torch.where(error > 0, error / limit, torch.zeros_like(error))
        place = int(share.argmax())
        if self.worst is not None and float(share.flatten()[place]) <= self.worst.share:
            return
        token, head = divmod(place, right.shape[1])
        error_here, limit_here, norm_here = (float(x.flatten()[place]) for x in (error, limit, norm))
        scale = norm_here or 1.0
        self.worst = Worst(
            float(share.flatten()[place]),
            error_here / scale,
            limit_here / scale,
            self.num_layers,
            what,
            head,
            row,
            start + token,
        )


def _as_kept(right: Tensor, torchs: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """The right keys or values, and torch's, as far as the cache's rounding is no part of the bound already.

    A float's is, but beyond its largest number. An int8's depends on the head's largest number: torch's own
    error says what it does.
    """
    if spec.scaled:
        return right, kept_heads(torchs, spec.kv_dtype)
    most = torch.finfo(spec.kv_dtype).max
    return right.clamp(-most, most), torchs


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


class _ShowingAttention(TorchAttention):
    def __init__(self, show: Any) -> None:
        self._show = show

    def open(self, spec: AttentionSpec, device: Device) -> TorchRunner:
        return _ShowingRunner(spec, device, self._show)


class _ShowingRunner(TorchRunner):
    """Shows the projections it is given, then computes as torch does."""

    fused_write = True

    def __init__(self, spec: AttentionSpec, device: Device, show: Any) -> None:
        super().__init__(spec, device)
        self._show = show

    def rotate_and_write(
        self, qkv: Tensor, positions: Tensor, rotation: Rotation, cache: Any, batch: Batch
    ) -> Tensor:
        self._show(qkv, rotation)
        q, k, v = TorchOperations().rotate(qkv, positions, rotation, self.spec)
        self.write(cache, k, v, batch)
        return q
