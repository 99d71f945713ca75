"""The one-shot kernel: every device writes its words into the others' memory, and sums what it was sent.

A word of four bytes travels with a flag in one store of eight, as NCCL's LL protocol has it: who reads the
flag of this call has the word, so nothing is fenced and nobody is signalled. The flag is the number of the
call, which lives on the device, so a captured graph counts on.

Two halves of the slots alternate. A device that starts call n + 2 has finished n + 1, for which it had every
other device's words of n + 1, which those sent only after they had finished n: nobody still reads the half
that n + 2 writes, and no barrier at the end is needed. Every call has the same programs, whatever its size,
so that all their counts agree.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from backbench.backends.interface import Peers
from backbench.backends.triton.launch import (
    BoundKernel,
    Launch,
    Place,
    parts,
    power_of_two,
    release_successor,
    wait_for_predecessor,
)

PROGRAMS = 32
"""Of every call. A program's words should be few, as it waits for all of them; and half a megabyte should
still be sent at the link's pace."""
INTERPRETED_PROGRAMS = 4
ALIGNMENT_WORDS = 32
LARGEST_TILE = 2048
KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BITS = "bits"
"""The kind that sums nothing."""


@triton.jit
def low_half(word, KIND: tl.constexpr):
    """The first of the two 16-bit floats in a word, as f32."""
    if KIND == "bf16":
        value = (word << 16).to(tl.float32, bitcast=True)
    else:
        value = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def high_half(word, KIND: tl.constexpr):
    """The second of the two 16-bit floats in a word, as f32."""
    if KIND == "bf16":
        value = (word & -65536).to(tl.float32, bitcast=True)
    else:
        value = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def half_bits(value, KIND: tl.constexpr):
    """f32 rounded to a 16-bit float, its bits as u32."""
    if KIND == "bf16":
        bits = value.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        bits = value.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return bits


@triton.jit
def slots_of(peers, MEMBER: tl.constexpr):
    """Where a device's slots begin, from the table of addresses."""
    return tl.multiple_of(tl.load(peers + MEMBER).to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def push(value, word, inside, peers, call, capacity, RANK: tl.constexpr, WORLD: tl.constexpr):
    """Write this device's words, with the call's flag, into its slot at every other device."""
    pair = (call.to(tl.int64) << 32) | value.to(tl.uint32, bitcast=True).to(tl.int64)
    slot = ((call & 1) * WORLD + RANK) * capacity
    for step in tl.static_range(1, WORLD):
        target = slots_of(peers, (RANK + step) % WORLD)
        tl.store(target + slot + word, pair, mask=inside, cache_modifier=".wt")


@triton.jit
def pull(own, word, inside, call, capacity, stop, SOURCE: tl.constexpr, WORLD: tl.constexpr):
    """The words i32 that device SOURCE sent, once all of them are here, or the group is given up."""
    place = own + ((call & 1) * WORLD + SOURCE) * capacity + word
    pair = tl.load(place, mask=inside, other=0, volatile=True)
    late = tl.max((inside & ((pair >> 32).to(tl.int32) != call)).to(tl.int32), axis=0)
    while late != 0:
        given_up = tl.load(stop, volatile=True)
        pair = tl.load(place, mask=inside, other=0, volatile=True)
        late = tl.max((inside & ((pair >> 32).to(tl.int32) != call)).to(tl.int32), axis=0)
        late = tl.where(given_up == 0, late, 0)
    return pair.to(tl.int32)


@triton.jit
def finish(
    mine,
    out,
    word,
    inside,
    own,
    call,
    words,
    capacity,
    stop,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    KIND: tl.constexpr,
):
    """Store the sum over all devices, added in order of rank so that all have the same bits; or, where KIND
    is "bits", everyone's words one after the other."""
    if KIND == "bits":
        for source in tl.static_range(WORLD):
            value = mine
            if source != RANK:
                value = pull(own, word, inside, call, capacity, stop, source, WORLD)
            tl.store(out + source * words + word, value, mask=inside)
    elif KIND == "fp32":
        total = tl.zeros_like(mine).to(tl.float32)
        for source in tl.static_range(WORLD):
            value = mine
            if source != RANK:
                value = pull(own, word, inside, call, capacity, stop, source, WORLD)
            total += value.to(tl.float32, bitcast=True)
        tl.store(out + word, total.to(tl.int32, bitcast=True), mask=inside)
    else:
        low = tl.zeros_like(mine).to(tl.float32)
        high = tl.zeros_like(mine).to(tl.float32)
        for source in tl.static_range(WORLD):
            value = mine
            if source != RANK:
                value = pull(own, word, inside, call, capacity, stop, source, WORLD)
            low += low_half(value, KIND)
            high += high_half(value, KIND)
        bits = half_bits(low, KIND) | (half_bits(high, KIND) << 16)
        tl.store(out + word, bits.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def one_shot_kernel(
    x,
    out,
    peers,
    calls,
    stop,
    words,
    share,
    capacity,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    KIND: tl.constexpr,
    ONE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Words i32 of `x` to every device, and of `out` from all; each program has `share` of them.

    peers: the address of each device's slots, i64[2, WORLD, capacity]. calls i32: calls so far, by program.
    ONE: the share is no longer than TILE.
    """
    release_successor(PDL)
    program = tl.program_id(0)
    lane = tl.arange(0, TILE)
    first = program * share
    wait_for_predecessor(PDL)
    call = tl.load(calls + program) + 1
    own = slots_of(peers, RANK)
    if ONE:
        word = first + lane
        inside = (lane < share) & (word < words)
        mine = tl.load(x + word, mask=inside, other=0)
        push(mine, word, inside, peers, call, capacity, RANK, WORLD)
        finish(mine, out, word, inside, own, call, words, capacity, stop, RANK, WORLD, KIND)
    else:
        # Everything is on its way before the first word is waited for.
        for start in range(0, share, TILE):
            word = first + start + lane
            inside = (start + lane < share) & (word < words)
            mine = tl.load(x + word, mask=inside, other=0)
            push(mine, word, inside, peers, call, capacity, RANK, WORLD)
        for start in range(0, share, TILE):
            word = first + start + lane
            inside = (start + lane < share) & (word < words)
            mine = tl.load(x + word, mask=inside, other=0)
            finish(mine, out, word, inside, own, call, words, capacity, stop, RANK, WORLD, KIND)
    tl.store(calls + program, call)


@cache
def _bound(place: Place, rank: int, world: int, kind: str, one: bool, tile: int) -> BoundKernel:
    # Two words a thread: its store of two pairs is the widest there is.
    warps = min(max(tile // 64, 1), 8)
    return place.bind(one_shot_kernel, RANK=rank, WORLD=world, KIND=kind, ONE=one, TILE=tile, num_warps=warps)


def one_shot_launch(
    place: Place,
    member: tuple[int, int],
    x: Tensor,
    out: Tensor,
    kind: str,
    state: tuple[Tensor, Tensor, Tensor],
    capacity: int,
) -> Launch:
    """What sums x into `out` of its shape, or gathers it there; both contiguous, of whole words.

    member: (rank, world); kind: a value of KINDS, or BITS; state: everyone's addresses, calls, stop.
    """
    words = x.numel() * x.itemsize // 4
    programs = len(state[1])
    share = parts(parts(words, programs), ALIGNMENT_WORDS) * ALIGNMENT_WORDS
    tile = min(power_of_two(share), LARGEST_TILE)
    bound = _bound(place, *member, kind, share <= tile, tile)
    given, taken = (each.view(-1).view(torch.int32) for each in (x, out))
    return Launch(bound, (programs, 1, 1), (given, taken, *state, words, share, capacity))


class Slots:
    """Where the others write to, and what counts the calls."""

    def __init__(
        self, peers: Peers, buffers: Sequence[Tensor], capacity: int, programs: int = PROGRAMS
    ) -> None:
        """buffers: by rank, i64[`length`] of zeros in each device's memory; capacity: words of a call."""
        at = peers.torch_device
        self.peers = peers
        self.capacity = capacity
        self._place = Place.of(peers.device)
        self._buffers = list(buffers)
        self._addresses = torch.tensor([each.data_ptr() for each in buffers], dtype=torch.int64, device=at)
        self._calls = torch.zeros(programs, dtype=torch.int32, device=at)
        self._stop = torch.zeros(1, dtype=torch.int32, device=at)

    @staticmethod
    def length(world: int, capacity: int) -> int:
        """Elements of each device's buffer."""
        return 2 * world * capacity

    def _start(self, x: Tensor, out: Tensor, kind: str) -> None:
        state = self._addresses, self._calls, self._stop
        one_shot_launch(
            self._place, (self.peers.rank, self.peers.world), x, out, kind, state, self.capacity
        ).start()

    def all_reduce(self, x: Tensor) -> None:
        """The sum takes the place of x, contiguous, of whole words."""
        self._start(x, x, KINDS[x.dtype])

    def all_gather(self, x: Tensor) -> Tensor:
        """[world, *x.shape] of contiguous x of whole words."""
        out = x.new_empty((self.peers.world, *x.shape))
        self._start(x, out, BITS)
        return out

    def abort(self) -> None:
        """End calls that wait; they run on, so this is written from beside their stream."""
        if self._stop.device.type == "cpu":
            self._stop.fill_(1)
            return
        with torch.cuda.stream(torch.cuda.Stream(self._stop.device)):
            self._stop.fill_(1)

    def close(self) -> None:
        """Unmap the others' memory."""
        self._buffers.clear()
