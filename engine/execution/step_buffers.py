"""A step's inputs: filled on the host, copied once, read by every launch from fixed device addresses.

All integers of a step travel in one pinned buffer to one device buffer, so a captured graph needs
nothing but that copy before its replay. Two host buffers alternate: one can be filled while the
copy from the other, one step earlier, may still be under way.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from backbench.backends.interface import Batch, SamplingBatch
from backbench.backends.noise import noise_key
from backbench.engine.execution.step_shape import StepShape
from backbench.engine.models.decoder import Wanted
from backbench.engine.scheduling.scheduler import StepPlan


class StepBuffers:
    """Host and device buffers for steps of at most `max_tokens` tokens and `max_seqs` sequences.

    A negative token id -1 - row stands for "the last token sampled in that row", which may still be
    on its way when the host fills the buffers.
    """

    def __init__(
        self, max_tokens: int, max_seqs: int, table: np.ndarray, block_size: int, device: torch.device
    ) -> None:
        """`table`: the host's copy of the block table, i32[rows + 1, B]; its last row is padding's."""
        self._table = table
        self.dummy_row = len(table) - 1
        self.block_size = block_size
        self.max_updates = 2 * max_seqs + -(-max_tokens // block_size)
        """Block table entries one step can change by computing tokens; prefix hits may change more."""
        sizes = {
            "ids": max_tokens,
            "positions": max_tokens,
            "slots": max_tokens,
            "query_start": max_seqs + 1,
            "seq_lens": max_seqs,
            "rows": max_seqs,
            "sample_tokens": max_seqs,
            "sample_seqs": max_seqs,
            "sample_rows": max_seqs,
            "noise_keys": max_seqs,
            "forced": max_seqs,
            "top_k": max_seqs,
            "update_rows": self.max_updates,
            "update_columns": self.max_updates,
            "update_blocks": self.max_updates,
        }
        float_sizes = {"temperature": max_seqs, "top_p": max_seqs, "min_p": max_seqs}
        pinned = device.type != "cpu"
        total, float_total = sum(sizes.values()), sum(float_sizes.values())
        self._hosts = [
            (
                torch.zeros(total, dtype=torch.int64, pin_memory=pinned),
                torch.zeros(float_total, dtype=torch.float32, pin_memory=pinned),
            )
            for _ in range(2)
        ]
        self._device_ints = torch.zeros(total, dtype=torch.int64, device=device)
        self._device_floats = torch.zeros(float_total, dtype=torch.float32, device=device)
        self._views = [_split(h.numpy(), sizes) | _split(f.numpy(), float_sizes) for h, f in self._hosts]
        self.on_device: dict[str, Tensor] = _split(self._device_ints, sizes) | _split(
            self._device_floats, float_sizes
        )
        self._turn = 0
        self._query_start = torch.zeros(max_seqs + 1, dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros(max_seqs, dtype=torch.int32, device=device)
        self._block_table = torch.zeros(max_seqs, table.shape[1], dtype=torch.int32, device=device)

    def fill(self, plan: StepPlan, captured: StepShape | None = None) -> StepInputs:
        """Write `plan` into the next host buffer: as it is, or padded to a captured shape that holds it."""
        self._turn ^= 1
        host = self._views[self._turn]
        live = plan.shape
        shape = captured or live
        inputs = StepInputs(shape)
        if captured is None:
            inputs.num_samples = sum(part.samples for part in plan.slices)
            inputs.max_query = max((part.num_tokens for part in plan.slices[plan.num_decodes :]), default=1)
        self._fill_decodes(plan, host)
        self._fill_prefills(plan, host, shape)
        self._fill_padding(host, shape, live)
        self._fill_updates(plan, host)
        self._fill_sampling(plan, host, inputs)
        lengths = host["seq_lens"][: shape.num_seqs]
        inputs.max_len = int(lengths.max())
        inputs.context_tokens = int(lengths.sum())
        return inputs

    def fill_inert(self, shape: StepShape) -> None:
        """Fill the next host buffer with padding only, as graph capture needs it."""
        self._turn ^= 1
        host = self._views[self._turn]
        self._fill_padding(host, shape, StepShape(0))
        self._fill_updates(StepPlan(), host)
        host["sample_tokens"][:] = 0
        host["sample_seqs"][:] = 0
        host["sample_rows"][:] = self.dummy_row
        host["forced"][:] = -1
        host["temperature"][:] = 0.0

    def upload(self) -> None:
        """Copy the buffer filled last to the device; asynchronous on a GPU."""
        ints, floats = self._hosts[self._turn]
        self._device_ints.copy_(ints, non_blocking=True)
        self._device_floats.copy_(floats, non_blocking=True)

    def batch(self, inputs: StepInputs) -> Batch:
        """The batch as views of this object's device buffers; `unpack` fills them."""
        shape = inputs.shape
        seqs, tokens = shape.num_seqs, shape.num_tokens
        return Batch(
            query_start=self._query_start[: seqs + 1],
            seq_lens=self._seq_lens[:seqs],
            block_table=self._block_table[:seqs],
            slots=self.on_device["slots"][:tokens],
            num_seqs=seqs,
            num_tokens=tokens,
            num_decodes=shape.decodes,
            max_query=inputs.max_query,
            max_len=inputs.max_len,
        )

    def unpack(self, inputs: StepInputs, table: Tensor, last_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids i64[T] and positions i64[T]; fills the batch's buffers from what was uploaded.

        Runs on the device only. table: the persistent block table i32[rows, B], brought up to date first.
        last_tokens: i64[rows], the token sampled last in each row.
        """
        device = self.on_device
        seqs, tokens = inputs.shape.num_seqs, inputs.shape.num_tokens
        table.index_put_(
            (device["update_rows"], device["update_columns"]), device["update_blocks"].to(torch.int32)
        )
        torch.index_select(table, 0, device["rows"][:seqs], out=self._block_table[:seqs])
        ids = device["ids"][:tokens]
        ids = torch.where(ids < 0, last_tokens[(-1 - ids).clamp_min_(0)], ids)
        self._query_start[: seqs + 1].copy_(device["query_start"][: seqs + 1])
        self._seq_lens[:seqs].copy_(device["seq_lens"][:seqs])
        return ids, device["positions"][:tokens]

    def wanted(self, inputs: StepInputs, batch: Batch) -> Wanted:
        """The tokens that sample, for steps that compute others too."""
        count = inputs.num_samples
        tokens, seqs = (self.on_device[name][:count] for name in ("sample_tokens", "sample_seqs"))
        return Wanted.of(batch, tokens, seqs)

    def sampling(self, inputs: StepInputs) -> SamplingBatch:
        """Sampling parameters of the rows that sample."""
        device, count = self.on_device, inputs.num_samples
        return SamplingBatch(
            temperature=device["temperature"][:count],
            top_k=device["top_k"][:count].to(torch.int32),
            top_p=device["top_p"][:count],
            min_p=device["min_p"][:count],
            noise_key=device["noise_keys"][:count],
            all_greedy=inputs.all_greedy,
            any_filter=inputs.any_filter,
        )

    def _fill_decodes(self, plan: StepPlan, host: dict[str, np.ndarray]) -> None:
        count, size = plan.num_decodes, self.block_size
        ids, starts, rows = [], [], []
        for part in plan.slices[:count]:
            sequence, start = part.sequence, part.start
            row, known = sequence.row, sequence.token_ids
            ids.append(known[start] if start < len(known) else -1 - row)
            starts.append(start)
            rows.append(row)
        positions = host["positions"][:count]
        positions[:] = starts
        host["ids"][:count] = ids
        host["rows"][:count] = rows
        host["slots"][:count] = self._table[rows, positions // size] * size + positions % size
        host["seq_lens"][:count] = host["positions"][:count] + 1

    def _fill_prefills(self, plan: StepPlan, host: dict[str, np.ndarray], shape: StepShape) -> None:
        size, offset = self.block_size, shape.decodes
        for i, part in enumerate(plan.slices[plan.num_decodes :], start=shape.decodes):
            sequence, start, count = part.sequence, part.start, part.num_tokens
            tokens = slice(offset, offset + count)
            known = sequence.token_ids[start : start + count]
            host["ids"][tokens] = known + [-1 - sequence.row] * (count - len(known))
            position = np.arange(start, start + count)
            host["positions"][tokens] = position
            host["slots"][tokens] = self._table[sequence.row, position // size] * size + position % size
            host["rows"][i] = sequence.row
            host["seq_lens"][i] = start + count
            offset += count
            host["query_start"][i + 1] = offset

    def _fill_padding(self, host: dict[str, np.ndarray], shape: StepShape, live: StepShape) -> None:
        """What follows the live decodes, up to the prompts, and what follows the live prompts.

        Padded decodes have a token, padded prompts none: `query_start` says so.
        """
        end = shape.decodes + live.prompt_tokens
        gaps = (
            (slice(live.decodes, shape.decodes), slice(live.decodes, shape.decodes)),
            (slice(shape.decodes + live.prompts, shape.num_seqs), slice(end, shape.num_tokens)),
        )
        for seqs, tokens in gaps:
            host["ids"][tokens] = 0
            host["positions"][tokens] = 0
            host["slots"][tokens] = -1
            host["rows"][seqs] = self.dummy_row
            host["seq_lens"][seqs] = 0
        host["query_start"][: shape.decodes + 1] = np.arange(shape.decodes + 1)
        host["query_start"][shape.decodes + live.prompts + 1 : shape.num_seqs + 1] = end

    def _fill_updates(self, plan: StepPlan, host: dict[str, np.ndarray]) -> None:
        count = len(plan.table_updates)
        if count:
            entries = np.asarray(list(plan.table_updates))
            host["update_rows"][:count] = entries[:, 0]
            host["update_columns"][:count] = entries[:, 1]
            host["update_blocks"][:count] = list(plan.table_updates.values())
        host["update_rows"][count:] = self.dummy_row
        host["update_columns"][count:] = 0
        host["update_blocks"][count:] = 0

    def _fill_sampling(self, plan: StepPlan, host: dict[str, np.ndarray], inputs: StepInputs) -> None:
        seqs, rows, keys, forced, params = [], [], [], [], []
        padding = inputs.shape.decodes - plan.num_decodes
        for i, part in enumerate(plan.slices):
            if not part.samples:
                continue
            sequence = part.sequence
            seqs.append(i if i < plan.num_decodes else i + padding)
            rows.append(sequence.row)
            params.append(sequence.params)
            if sequence.params.temperature:
                inputs.all_greedy = False
                keys.append(noise_key(sequence.seed, part.draw))
            else:
                keys.append(0)
            replay = sequence.params.forced_tokens
            forced.append(-1 if replay is None else replay[part.draw])
        live, padded = len(seqs), inputs.num_samples
        host["sample_tokens"][:live] = host["query_start"][1:][seqs] - 1
        host["sample_seqs"][:live] = seqs
        host["sample_rows"][:live] = rows
        host["forced"][:live] = forced
        host["sample_tokens"][live:padded] = 0
        host["sample_seqs"][live:padded] = 0
        host["sample_rows"][live:padded] = self.dummy_row
        host["forced"][live:padded] = -1
        inputs.any_forced = any(token >= 0 for token in forced)
        inputs.logprobs = any(p.logprobs for p in params)
        host["temperature"][:live] = 0.0
        if not inputs.all_greedy:
            inputs.any_filter = any(p.top_k or p.top_p < 1 or p.min_p for p in params if p.temperature)
            host["noise_keys"][:live] = keys
            host["temperature"][:live] = [p.temperature for p in params]
            host["top_k"][:live] = [p.top_k for p in params]
            host["top_p"][:live] = [p.top_p for p in params]
            host["min_p"][:live] = [p.min_p for p in params]
        host["temperature"][live:padded] = 0.0


class StepInputs:
    """Host-side facts about a filled step: its shape, and what its live part asks for.

    A new one speaks of a captured shape, where every row samples and one prompt may have all the tokens.
    """

    __slots__ = (
        "all_greedy",
        "any_filter",
        "any_forced",
        "context_tokens",
        "logprobs",
        "max_len",
        "max_query",
        "num_samples",
        "shape",
    )

    def __init__(self, shape: StepShape) -> None:
        self.shape = shape
        self.num_samples = shape.num_seqs
        self.max_query = max(shape.prompt_tokens, 1)
        self.max_len = 0
        self.context_tokens = 0
        self.all_greedy = True
        self.any_filter = False
        self.any_forced = False
        self.logprobs = False


Flat = TypeVar("Flat", np.ndarray, Tensor)


def _split(buffer: Flat, sizes: dict[str, int]) -> dict[str, Flat]:
    """Consecutive named views of a flat array or tensor."""
    views, start = {}, 0
    for name, size in sizes.items():
        views[name] = buffer[start : start + size]
        start += size
    return views
