"""The one-shot kernel: every device writes its words into the others' memory, and sums what it was sent.

A word of four bytes travels with a flag in one store of eight, as NCCL's LL protocol has it: who reads the
flag of this call has the word, so nothing is fenced and nobody is signalled. The flag is the number of the
call, which lives on the device, so a captured graph counts on.

Flags double what is sent. Beyond a size words travel alone, and each program signals when its own are there,
which costs about two microseconds more and half of the traffic.

Two halves of the slots alternate. A device that starts call n + 2 has finished n + 1, for which it had every
other device's words of n + 1, which those sent only after they had finished n: nobody still reads the half
that n + 2 writes, and no barrier at the end is needed. Every call has the same programs, whatever its size,
so that all their counts agree.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

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

PROGRAMS = 64
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
def base_of(peers, MEMBER: tl.constexpr):
    """Where a device's buffer begins, from the table of addresses."""
    return tl.load(peers + MEMBER)


@triton.jit
def push(
    value,
    word,
    inside,
    peers,
    call,
    capacity,
    area,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    SIGNALLED: tl.constexpr,
):
    """Write this device's words into its slot at every other device: as they are, or with the call's flag."""
    slot = ((call & 1) * WORLD + RANK) * capacity
    for step in tl.static_range(1, WORLD):
        start = base_of(peers, (RANK + step) % WORLD) + area
        if SIGNALLED:
            target = tl.multiple_of(start.to(tl.pointer_type(tl.int32)), 16)
            tl.store(target + slot + word, value, mask=inside)
        else:
            pair = (call.to(tl.int64) << 32) | value.to(tl.uint32, bitcast=True).to(tl.int64)
            target = tl.multiple_of(start.to(tl.pointer_type(tl.int64)), 16)
            tl.store(target + slot + word, pair, mask=inside, cache_modifier=".wt")


@triton.jit
def pull(
    own,
    word,
    inside,
    call,
    capacity,
    stop,
    SOURCE: tl.constexpr,
    WORLD: tl.constexpr,
    SIGNALLED: tl.constexpr,
):
    """The words i32 that device SOURCE sent, once all of them are here, or the group is given up."""
    slot = ((call & 1) * WORLD + SOURCE) * capacity
    if SIGNALLED:
        source = tl.multiple_of(own.to(tl.pointer_type(tl.int32)), 16)
        words = tl.load(source + slot + word, mask=inside, other=0, cache_modifier=".cg")
    else:
        place = tl.multiple_of(own.to(tl.pointer_type(tl.int64)), 16) + slot + word
        pair = tl.load(place, mask=inside, other=0, volatile=True)
        late = tl.max((inside & ((pair >> 32).to(tl.int32) != call)).to(tl.int32), axis=0)
        while late != 0:
            given_up = tl.load(stop, volatile=True)
            pair = tl.load(place, mask=inside, other=0, volatile=True)
            late = tl.max((inside & ((pair >> 32).to(tl.int32) != call)).to(tl.int32), axis=0)
            late = tl.where(given_up == 0, late, 0)
        words = pair.to(tl.int32)
    return words


@triton.jit
def meet(peers, program, call, stop, signals, RANK: tl.constexpr, WORLD: tl.constexpr):
    """Tell every other device that this program's words are there, and wait until theirs are.

    A signal is the number of the latest call; a device may be one call ahead.
    """
    programs = tl.num_programs(0)
    tl.debug_barrier()  # what the others' signal makes visible are the writes of all threads
    for step in tl.static_range(1, WORLD):
        start = base_of(peers, (RANK + step) % WORLD) + signals
        theirs = start.to(tl.pointer_type(tl.int32)) + RANK * programs + program
        tl.atomic_xchg(theirs, call, sem="release", scope="sys")
    own = (base_of(peers, RANK) + signals).to(tl.pointer_type(tl.int32))
    for step in tl.static_range(1, WORLD):
        signal = own + ((RANK + step) % WORLD) * programs + program
        late = call - tl.atomic_add(signal, 0, sem="acquire", scope="sys")
        while late > 0:
            given_up = tl.load(stop, volatile=True)
            late = call - tl.atomic_add(signal, 0, sem="acquire", scope="sys")
            late = tl.where(given_up == 0, late, 0)
    tl.debug_barrier()


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
    SIGNALLED: tl.constexpr,
):
    """Store the sum over all devices, added in order of rank so that all have the same bits; or, where KIND
    is "bits", everyone's words one after the other."""
    if KIND == "bits":
        for source in tl.static_range(WORLD):
            value = mine
            if source != RANK:
                value = pull(own, word, inside, call, capacity, stop, source, WORLD, SIGNALLED)
            tl.store(out + source * words + word, value, mask=inside)
    elif KIND == "fp32":
        total = tl.zeros_like(mine).to(tl.float32)
        for source in tl.static_range(WORLD):
            value = mine
            if source != RANK:
                value = pull(own, word, inside, call, capacity, stop, source, WORLD, SIGNALLED)
            total += value.to(tl.float32, bitcast=True)
        tl.store(out + word, total.to(tl.int32, bitcast=True), mask=inside)
    else:
        low = tl.zeros_like(mine).to(tl.float32)
        high = tl.zeros_like(mine).to(tl.float32)
        for source in tl.static_range(WORLD):
            value = mine
            if source != RANK:
                value = pull(own, word, inside, call, capacity, stop, source, WORLD, SIGNALLED)
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
    area,
    signals,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    KIND: tl.constexpr,
    ONE: tl.constexpr,
    SIGNALLED: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Words i32 of `x` to every device, and of `out` from all; each program has `share` of them.

    peers: the address of each device's buffer, in which slots [2, WORLD, capacity] begin at byte `area`, of
    words and flags i64; where SIGNALLED, of words i32, with signals i32 [WORLD, programs] at byte `signals`.
    calls i32: calls so far, by program. ONE: the share is no longer than TILE, and not SIGNALLED.
    """
    release_successor(PDL)
    program = tl.program_id(0)
    lane = tl.arange(0, TILE)
    first = program * share
    wait_for_predecessor(PDL)
    call = tl.load(calls + program) + 1
    own = base_of(peers, RANK) + area
    if ONE:
        word = first + lane
        inside = (lane < share) & (word < words)
        mine = tl.load(x + word, mask=inside, other=0)
        push(mine, word, inside, peers, call, capacity, area, RANK, WORLD, SIGNALLED)
        finish(mine, out, word, inside, own, call, words, capacity, stop, RANK, WORLD, KIND, SIGNALLED)
    else:
        # Everything is on its way before the first word is waited for.
        for start in range(0, share, TILE):
            word = first + start + lane
            inside = (start + lane < share) & (word < words)
            mine = tl.load(x + word, mask=inside, other=0)
            push(mine, word, inside, peers, call, capacity, area, RANK, WORLD, SIGNALLED)
        if SIGNALLED:
            meet(peers, program, call, stop, signals, RANK, WORLD)
        for start in range(0, share, TILE):
            word = first + start + lane
            inside = (start + lane < share) & (word < words)
            mine = tl.load(x + word, mask=inside, other=0)
            finish(mine, out, word, inside, own, call, words, capacity, stop, RANK, WORLD, KIND, SIGNALLED)
    tl.store(calls + program, call)


@cache
def _bound(
    place: Place, rank: int, world: int, kind: str, signalled: bool, one: bool, tile: int
) -> BoundKernel:
    # Two words a thread: its store of two pairs is the widest there is.
    warps = min(max(tile // 64, 1), 8)
    return place.bind(
        one_shot_kernel,
        RANK=rank,
        WORLD=world,
        KIND=kind,
        ONE=one,
        SIGNALLED=signalled,
        TILE=tile,
        num_warps=warps,
    )


class Areas(NamedTuple):
    """What a device's buffer holds, for calls of up to so many words."""

    world: int
    programs: int
    flagged: int
    """Words of the largest call whose words travel with flags."""
    signalled: int
    """Words of the largest call."""

    @property
    def signalled_start(self) -> int:
        """Bytes before the slots of words alone."""
        return 2 * self.world * self.flagged * 8

    @property
    def signals_start(self) -> int:
        """Bytes before the signals."""
        return self.signalled_start + 2 * self.world * self.signalled * 4

    @property
    def length(self) -> int:
        """Elements i64 of the buffer."""
        return (self.signals_start + self.world * self.programs * 4 + 15) // 16 * 2


def one_shot_launch(
    place: Place,
    member: tuple[int, int],
    x: Tensor,
    out: Tensor,
    kind: str,
    state: tuple[Tensor, Tensor, Tensor],
    areas: Areas,
) -> Launch:
    """What sums x into `out` of its shape, or gathers it there; both contiguous, of whole words.

    member: (rank, world); kind: a value of KINDS, or BITS; state: everyone's addresses, calls, stop.
    """
    words = x.numel() * x.itemsize // 4
    share = parts(parts(words, areas.programs), ALIGNMENT_WORDS) * ALIGNMENT_WORDS
    tile = min(power_of_two(share), LARGEST_TILE)
    signalled = words > areas.flagged
    one = share <= tile and not signalled
    bound = _bound(place, *member, kind, signalled, one, tile)
    given, taken = (each.view(-1).view(torch.int32) for each in (x, out))
    capacity = areas.signalled if signalled else areas.flagged
    start = areas.signalled_start if signalled else 0
    sizes = (words, share, capacity, start, areas.signals_start)
    return Launch(bound, (areas.programs, 1, 1), (given, taken, *state, *sizes))


class Slots:
    """Where the others write to, and what counts the calls."""

    def __init__(self, peers: Peers, buffers: Sequence[Tensor], areas: Areas) -> None:
        """buffers: by rank, i64[areas.length] of zeros in each device's memory."""
        at = peers.torch_device
        self.peers = peers
        self.areas = areas
        self._place = Place.of(peers.device)
        self._buffers = list(buffers)
        self._addresses = torch.tensor([each.data_ptr() for each in buffers], dtype=torch.int64, device=at)
        self._calls = torch.zeros(areas.programs, dtype=torch.int32, device=at)
        self._stop = torch.zeros(1, dtype=torch.int32, device=at)

    def _start(self, x: Tensor, out: Tensor, kind: str) -> None:
        state = self._addresses, self._calls, self._stop
        member = self.peers.rank, self.peers.world
        one_shot_launch(self._place, member, x, out, kind, state, self.areas).start()

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
