"""A step's inputs: filled on the host, copied once, read by every launch from fixed device addresses.

All numbers of a step travel in one pinned buffer to one device buffer, so a captured graph needs
nothing but that copy before its replay. Host buffers take turns: one can be filled while the copy from
another is still under way, and is only filled again once its own copy is done.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backbench.backends.interface import Batch, SamplingBatch
from backbench.backends.noise import noise_key
from backbench.engine.execution.device_queue import DeviceQueue, Done, Mark
from backbench.engine.execution.step_arrays import StepArrays, StepSizes, arrays_in, num_bytes
from backbench.engine.execution.step_shape import StepShape
from backbench.engine.limits import EngineLimits
from backbench.engine.models.decoder import Wanted
from backbench.engine.request import SamplingParams
from backbench.engine.scheduling.scheduler import StepPlan


class RequestTables:
    """What lasts from step to step of each sequence, by row. The last row is padding's."""

    def __init__(self, limits: EngineLimits, device: torch.device) -> None:
        shape = (limits.num_rows + 1, limits.blocks_per_seq)
        self.padding_row = limits.num_rows
        self.host_blocks = np.zeros(shape, dtype=np.int32)
        """The block table as of the step filled last."""
        self.blocks = torch.zeros(shape, dtype=torch.int32, device=device)
        """The block table as of the step the device is at."""
        self.last_tokens = torch.zeros(shape[0], dtype=torch.int64, device=device)
        """The token sampled last in each row."""


@dataclass
class Staging:
    """One host side of the buffers, pinned where the device is a GPU."""

    flat: Tensor
    """All of it; the others are views."""
    integers: Tensor
    floats: Tensor
    arrays: StepArrays[np.ndarray]
    uploaded: Mark
    """Until here the device may read it."""
    num_updates: int
    """Block table entries that may be in it; those that follow are padding's."""


class StepBuffers:
    """Host and device buffers for steps of at most `max_tokens` tokens, within the engine's limits."""

    def __init__(
        self,
        limits: EngineLimits,
        tables: RequestTables,
        device: torch.device,
        queue: DeviceQueue,
        max_tokens: int | None = None,
        *,
        num_stagings: int = 2,
        ids_ahead: int = 0,
    ) -> None:
        """max_tokens: None = those of the largest step. num_stagings: host buffers used in turn. ids_ahead:
        as `Runner.ids_ahead`."""
        self.tables = tables
        self.block_size = limits.block_size
        self.ids_ahead = ids_ahead
        self._queue = queue
        max_seqs, tokens = limits.max_seqs, limits.max_batch_tokens if max_tokens is None else max_tokens
        self.max_updates = 2 * max_seqs + -(-tokens // limits.block_size)
        """Block table entries one step can change by computing tokens; prefix hits may change more."""
        samples = min(limits.max_samples, max(tokens, max_seqs))
        sizes = StepSizes(tokens, max_seqs, self.max_updates, samples)
        self._stagings = [_staging(sizes, pinned=device.type != "cpu") for _ in range(num_stagings)]
        self._turn = 0
        self._counted = np.arange(max_seqs + 1)
        self._device_flat = torch.zeros(self.filled.flat.numel(), dtype=torch.uint8, device=device)
        self.on_device = StepArrays.over(*arrays_in(self._device_flat, sizes), sizes)
        self._query_start = torch.zeros(max_seqs + 1, dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros(max_seqs, dtype=torch.int32, device=device)
        self._block_table = torch.zeros(max_seqs, limits.blocks_per_seq, dtype=torch.int32, device=device)

    def fill(
        self, plan: StepPlan, captured: StepShape | None = None, into: Staging | None = None
    ) -> StepInputs:
        """Write `plan` into the next host buffer: as it is, or padded to a captured shape that holds it.

        into: a host buffer that no copy reads before the caller lets it; None = the next one.
        """
        staging = into or self._next_staging()
        host, live = staging.arrays, plan.shape
        if live.query and captured is not None and not captured.query:
            live = StepShape(plan.num_tokens)  # one decode a token
        shape = captured or live
        inputs = StepInputs(shape)
        if captured is None:
            inputs.num_samples = sum(part.samples for part in plan.slices)
            inputs.max_query = max((part.num_tokens for part in plan.slices[live.decodes :]), default=1)
        self._fill_updates(plan, staging, inputs)
        self._fill_copies(plan, host, inputs)
        if plan.num_drafted == 0:
            self._fill_decodes(plan, host)
            self._fill_prefills(plan, host, shape)
        else:
            self._fill_drafted(plan, host, live)
        self._fill_padding(host, shape, live)
        self._fill_sampling(plan, host, inputs)
        if plan.num_drafted:  # a sequence in several rows has its keys once
            keys = [part.start + part.num_tokens for part in plan.slices]
            inputs.max_len, inputs.context_tokens = max(keys), sum(keys)
        else:
            lengths = host.seq_lens[: shape.num_seqs]
            inputs.max_len, inputs.context_tokens = int(lengths.max()), int(lengths.sum())
        return inputs

    def fill_inert(self, shape: StepShape, into: Staging | None = None) -> StepInputs:
        """Fill the next host buffer, or `into`, with padding alone, which writes nothing anyone reads."""
        staging = into or self._next_staging()
        host, inputs = staging.arrays, StepInputs(shape)
        self._fill_updates(StepPlan(), staging, inputs)
        self._fill_padding(host, shape, StepShape(0))
        host.logits_indices[:] = 0
        host.logits_seqs[:] = 0
        host.logits_rows[:] = self.tables.padding_row
        host.forced[:] = -1
        host.temperature[:] = 0.0
        return inputs

    @property
    def filled(self) -> Staging:
        """The host buffer filled last."""
        return self._stagings[self._turn]

    def take(self, integers: np.ndarray, floats: np.ndarray) -> None:
        """Fill the next host buffer with what another rank's buffer of this size was filled with."""
        staging = self._next_staging()
        staging.integers.numpy()[:] = integers
        staging.floats.numpy()[:] = floats
        staging.num_updates = self.max_updates

    def upload(self, inputs: StepInputs) -> None:
        """Copy the buffer filled last to the device; asynchronous on a GPU."""
        staging = self.filled

        def copy() -> None:
            self._device_flat.copy_(staging.flat, non_blocking=True)
            if inputs.more_updates is not None:
                rows, columns, blocks = inputs.more_updates.to(self._device_flat.device)
                self.tables.blocks.index_put_((rows, columns), blocks.to(torch.int32))

        self._queue.submit(copy)
        staging.uploaded = self._queue.mark()

    def batch(self, inputs: StepInputs) -> Batch:
        """The batch as views of this object's device buffers; `unpack` fills them."""
        shape = inputs.shape
        seqs, tokens = shape.num_seqs, shape.num_tokens
        return Batch(
            query_start=self._query_start[: seqs + 1],
            seq_lens=self._seq_lens[:seqs],
            block_table=self._block_table[:seqs],
            slots=self.on_device.slot_mapping[:tokens],
            num_seqs=seqs,
            num_tokens=tokens,
            num_decodes=shape.decodes,
            max_query=inputs.max_query,
            max_len=inputs.max_len,
            drafted=shape.query > 0,
        )

    def unpack(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Token ids i64[T] and positions i64[T]; fills the batch's buffers from what was uploaded.

        Runs on the device only. Brings the block table up to date first.
        """
        device, tables = self.on_device, self.tables
        seqs, tokens = inputs.shape.num_seqs, inputs.shape.num_tokens
        tables.blocks.index_put_(
            (device.update_rows, device.update_columns), device.update_blocks.to(torch.int32)
        )
        torch.index_select(tables.blocks, 0, device.rows[:seqs], out=self._block_table[:seqs])
        ids = device.ids[:tokens]
        ids = torch.where(ids < 0, tables.last_tokens[(-1 - ids).clamp_min_(0)], ids)
        self._query_start[: seqs + 1].copy_(device.query_start[: seqs + 1])
        self._seq_lens[:seqs].copy_(device.seq_lens[:seqs])
        return ids, device.positions[:tokens]

    def copies(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Source and destination blocks i64[n] of the copies that the step needs before it writes."""
        device, count = self.on_device, inputs.num_copies
        return device.copy_sources[:count], device.copy_targets[:count]

    def wanted(self, inputs: StepInputs, batch: Batch) -> Wanted:
        """The tokens that sample, for steps that compute others too."""
        device, count = self.on_device, inputs.num_samples
        return Wanted.of(batch, device.logits_indices[:count], device.logits_seqs[:count])

    def sampling(self, inputs: StepInputs) -> SamplingBatch:
        """Sampling parameters of the rows that sample."""
        device, count = self.on_device, inputs.num_samples
        return SamplingBatch(
            temperature=device.temperature[:count],
            top_k=device.top_k[:count].to(torch.int32),
            top_p=device.top_p[:count],
            min_p=device.min_p[:count],
            noise_key=device.noise_keys[:count],
            all_greedy=inputs.all_greedy,
            any_filter=inputs.any_filter,
        )

    def keep(self, inputs: StepInputs, tokens: Tensor) -> Tensor:
        """The step's tokens i64[S], some of those sampled replaced by force; kept for the next step's ids."""
        device, count = self.on_device, inputs.num_samples
        if inputs.any_forced:
            forced = device.forced[:count]
            tokens = torch.where(forced >= 0, forced, tokens)
        self.tables.last_tokens.index_put_((device.logits_rows[:count],), tokens)
        return tokens

    def _next_staging(self) -> Staging:
        self._turn = (self._turn + 1) % len(self._stagings)
        staging = self._stagings[self._turn]
        # However many steps are under way, what an upload still reads is not written over.
        staging.uploaded.synchronize()
        return staging

    def _fill_decodes(self, plan: StepPlan, host: StepArrays[np.ndarray]) -> None:
        count, size, table = plan.num_decodes, self.block_size, self.tables.host_blocks
        ids, starts, rows = [], [], []
        for part in plan.slices[:count]:
            sequence, start = part.sequence, part.start
            row, known = sequence.row, sequence.token_ids
            place = start + self.ids_ahead
            ids.append(known[place] if place < len(known) else -1 - row)
            starts.append(start)
            rows.append(row)
        positions = host.positions[:count]
        positions[:] = starts
        host.ids[:count] = ids
        host.rows[:count] = rows
        host.slot_mapping[:count] = table[rows, positions // size] * size + positions % size
        host.seq_lens[:count] = host.positions[:count] + 1

    def _fill_drafted(self, plan: StepPlan, host: StepArrays[np.ndarray], live: StepShape) -> None:
        """Known and drafted tokens: a sequence's row has all of its own or, laid out as decodes, each has one
        and sees the keys up to its own position. The host knows every token of such a step."""
        count, size = plan.num_tokens, self.block_size
        ids, places, slots = list[int](), list[int](), list[int]()
        rows, ends, lengths = list[int](), list[int](), list[int]()
        # Python's lists: the few tokens of most such steps take less than calls of numpy would.
        for part in plan.slices:
            sequence, end = part.sequence, part.start + part.num_tokens
            here, blocks = range(part.start, end), sequence.blocks
            ids += sequence.token_ids[part.start : end]
            ids += part.draft
            places += here
            slots += [blocks[place // size] * size + place % size for place in here]
            if live.query:
                rows.append(sequence.row)
                ends.append(len(ids))
                lengths.append(end)
            else:
                rows += [sequence.row] * part.num_tokens
                lengths += range(part.start + 1, end + 1)
        host.ids[:count] = ids
        host.positions[:count] = places
        host.slot_mapping[:count] = slots
        host.rows[: len(rows)] = rows
        host.seq_lens[: len(rows)] = lengths
        host.query_start[1 : len(ends) + 1] = ends

    def _fill_prefills(self, plan: StepPlan, host: StepArrays[np.ndarray], shape: StepShape) -> None:
        size, table, offset = self.block_size, self.tables.host_blocks, shape.decodes
        for i, part in enumerate(plan.slices[plan.num_decodes :], start=shape.decodes):
            sequence, start, count = part.sequence, part.start, part.num_tokens
            tokens = slice(offset, offset + count)
            first = start + self.ids_ahead
            known = sequence.token_ids[first : first + count]
            host.ids[tokens] = known + [-1 - sequence.row] * (count - len(known))
            position = np.arange(start, start + count)
            host.positions[tokens] = position
            host.slot_mapping[tokens] = table[sequence.row, position // size] * size + position % size
            host.rows[i] = sequence.row
            host.seq_lens[i] = start + count
            offset += count
            host.query_start[i + 1] = offset

    def _fill_padding(self, host: StepArrays[np.ndarray], shape: StepShape, live: StepShape) -> None:
        """What follows the live decodes, up to the prompts, and what follows the live prompts.

        Padded decodes have a token, padded prompts none: `query_start` says so.
        """
        end = shape.decodes + live.prompt_tokens
        gaps = (
            (slice(live.decodes, shape.decodes), slice(live.decodes, shape.decodes)),
            (slice(shape.decodes + live.prompts, shape.num_seqs), slice(end, shape.num_tokens)),
        )
        for seqs, tokens in gaps:
            if tokens.start < tokens.stop:
                host.ids[tokens] = 0
                host.positions[tokens] = 0
                host.slot_mapping[tokens] = -1
            if seqs.start < seqs.stop:
                host.rows[seqs] = self.tables.padding_row
                host.seq_lens[seqs] = 0
        host.query_start[: shape.decodes + 1] = self._counted[: shape.decodes + 1]
        if shape.prompts > live.prompts:
            host.query_start[shape.decodes + live.prompts + 1 : shape.num_seqs + 1] = end

    def _fill_updates(self, plan: StepPlan, staging: Staging, inputs: StepInputs) -> None:
        """Bring the host's block table up to date, and tell the device: in the buffers, or beside them."""
        host, count = staging.arrays, len(plan.table_updates)
        if count:
            rows, columns = np.array(list(plan.table_updates)).T
            blocks = np.array(list(plan.table_updates.values()))
            self.tables.host_blocks[rows, columns] = blocks
            if count > self.max_updates:
                inputs.more_updates = torch.from_numpy(np.stack((rows, columns, blocks)))
                count = 0
            else:
                host.update_rows[:count] = rows
                host.update_columns[:count] = columns
                host.update_blocks[:count] = blocks
        if count < staging.num_updates:
            stale = slice(count, staging.num_updates)
            host.update_rows[stale] = self.tables.padding_row
            host.update_columns[stale] = 0
            host.update_blocks[stale] = 0
        staging.num_updates = count

    def _fill_copies(self, plan: StepPlan, host: StepArrays[np.ndarray], inputs: StepInputs) -> None:
        inputs.num_copies = count = len(plan.copies)
        if count:
            host.copy_sources[:count], host.copy_targets[:count] = np.array(plan.copies).T

    def _fill_sampling(self, plan: StepPlan, host: StepArrays[np.ndarray], inputs: StepInputs) -> None:
        if plan.num_drafted:
            self._fill_verified(plan, host, inputs)
            return
        seqs, rows, keys, forced, params = [], [], [], [], []
        padding = inputs.shape.decodes - plan.num_decodes
        for i, part in enumerate(plan.slices):
            if not part.samples:
                continue
            sequence = part.sequence
            if sequence.num_candidates > inputs.candidates:
                inputs.candidates = sequence.num_candidates
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
        host.logits_indices[: len(seqs)] = host.query_start[1:][seqs] - 1
        host.logits_seqs[: len(seqs)] = seqs
        self._fill_draws(host, inputs, rows, keys, forced, params)

    def _fill_verified(self, plan: StepPlan, host: StepArrays[np.ndarray], inputs: StepInputs) -> None:
        """Several draws of a sequence: one at each of its drafted tokens, and the one before them."""
        indices, rows, keys, params = list[int](), list[int](), list[int](), list[SamplingParams]()
        end = 0
        for part in plan.slices:
            end += part.num_tokens
            sequence = part.sequence
            draws = range(part.draw, part.draw + part.samples)
            indices += range(end - part.samples, end)
            rows += [sequence.row] * part.samples
            params += [sequence.params] * part.samples
            if sequence.params.temperature and part.samples:
                inputs.all_greedy = False
                keys += [noise_key(sequence.seed, draw) for draw in draws]
            else:
                keys += [0] * part.samples
        host.logits_indices[: len(indices)] = indices
        host.logits_seqs[: len(indices)] = 0  # nobody asks which of its own tokens a sequence wants
        self._fill_draws(host, inputs, rows, keys, [-1] * len(rows), params)

    def _fill_draws(
        self,
        host: StepArrays[np.ndarray],
        inputs: StepInputs,
        rows: list[int],
        keys: list[int],
        forced: list[int],
        params: list[SamplingParams],
    ) -> None:
        """How each live draw is made, and that nothing comes of padded ones."""
        inputs.num_live_samples = live = len(rows)
        padded = inputs.num_samples
        host.logits_rows[:live] = rows
        host.forced[:live] = forced
        if live < padded:
            host.logits_indices[live:padded] = 0
            host.logits_seqs[live:padded] = 0
            host.logits_rows[live:padded] = self.tables.padding_row
            host.forced[live:padded] = -1
        inputs.any_forced = max(forced, default=-1) >= 0
        inputs.logprobs = any(p.logprobs for p in params)
        host.temperature[:padded] = 0.0
        if not inputs.all_greedy:
            inputs.any_filter = any(p.filters for p in params if p.temperature)
            host.noise_keys[:live] = keys
            host.temperature[:live] = [p.temperature for p in params]
            host.top_k[:live] = [p.top_k for p in params]
            host.top_p[:live] = [p.top_p for p in params]
            host.min_p[:live] = [p.min_p for p in params]


class StepInputs:
    """Host-side facts about a filled step: its shape, and what its live part asks for.

    A new one speaks of a captured shape, where every row samples and one prompt may have all the tokens.
    """

    __slots__ = (
        "all_greedy",
        "any_filter",
        "any_forced",
        "candidates",
        "context_tokens",
        "logprobs",
        "max_len",
        "max_query",
        "more_updates",
        "num_copies",
        "num_live_samples",
        "num_samples",
        "shape",
    )

    def __init__(self, shape: StepShape) -> None:
        self.shape = shape
        self.num_samples = shape.num_samples
        self.num_live_samples = 0
        """The first of them, which are not padding."""
        self.num_copies = 0
        self.more_updates: Tensor | None = None
        """Rows, columns and blocks i64[3, N] of a block table update too large for the buffers."""
        self.max_query = shape.query or max(shape.prompt_tokens, 1)
        self.max_len = 0
        self.context_tokens = 0
        self.all_greedy = True
        self.any_filter = False
        self.any_forced = False
        self.logprobs = False
        self.candidates = 0
        """Most likely tokens to be returned of each row that samples."""


def _staging(sizes: StepSizes, pinned: bool) -> Staging:
    flat = torch.zeros(num_bytes(sizes), dtype=torch.uint8, pin_memory=pinned)
    integers, floats = arrays_in(flat, sizes)
    arrays = StepArrays.over(integers.numpy(), floats.numpy(), sizes)
    return Staging(flat, integers, floats, arrays, Done(), sizes.updates)
