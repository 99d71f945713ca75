"""One-shot collectives over the memory that devices of one host map of each other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from backbench.backends.interface import Collectives, Communicator, Device, Peers, Way
from backbench.backends.interface.device import kernels_refused
from backbench.backends.torch.collectives import TorchCommunicator, default_group
from backbench.errors import BackendError

MOST_DEVICES = 8
LARGEST_BYTES = {2: 8 * 2**20, 3: 2**20, 4: 512 * 2**10}
"""Devices -> the largest input that one shot serves: it sends everything to everyone, which costs a library's
two-phase sum less from there on. On two H100s it took 3.7 us for 256 KiB, NCCL 20.6. For more devices an
estimate from how much is sent."""
LARGEST_OF_MORE = 256 * 2**10
LARGEST_FLAGGED_BYTES = 512 * 2**10
"""Up to which each word travels with a flag; see `oneshot`."""
WORD_BYTES = 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def largest_bytes(world: int) -> int:
    """Of one device's input that one shot serves."""
    return LARGEST_BYTES.get(world, LARGEST_OF_MORE)


class OneShotCollectives(Collectives):
    """Inputs up to a size by one kernel over peers' memory, everything else by the vendor's library."""

    name = "oneshot"

    def refusals(self, device: Device, world: int) -> list[str]:
        reasons = kernels_refused(device)
        if world > MOST_DEVICES:
            reasons.append(f"one shot is for at most {MOST_DEVICES} devices of one host, not {world}")
        return reasons

    def open(self, peers: Peers) -> Communicator:
        return OneShotCommunicator(peers, TorchCommunicator(peers))


class OneShotCommunicator(Communicator):
    """Slots in every device's memory that the others write to, and the kernel that sums them.

    How it works stands beside the kernel, in `oneshot`.
    """

    def __init__(self, peers: Peers, library: Communicator, programs: int | None = None) -> None:
        """library: serves what is larger. programs: of every call; None = what was found best."""
        from backbench.backends.triton.oneshot import INTERPRETED_PROGRAMS, PROGRAMS, Areas, Slots

        super().__init__(peers)
        self.library = library
        self.capturable = library.capturable
        self.largest_bytes = largest_bytes(peers.world)
        usual = INTERPRETED_PROGRAMS if peers.torch_device.type == "cpu" else PROGRAMS
        areas = Areas(
            peers.world,
            programs or usual,
            min(LARGEST_FLAGGED_BYTES, self.largest_bytes) // WORD_BYTES,
            self.largest_bytes // WORD_BYTES,
        )
        shared = _mapped_files if peers.torch_device.type == "cpu" else _peer_memory
        self._slots = Slots(peers, shared(peers, areas.length), areas)

    def all_reduce(self, x: Tensor) -> Tensor:
        if not self._serves(x) or x.dtype not in DTYPES:
            return self.library.all_reduce(x)
        self._slots.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return self._slots.all_gather(x) if self._serves(x) else self.library.all_gather(x)

    def _serves(self, x: Tensor) -> bool:
        return 0 < x.nbytes <= self.largest_bytes and x.nbytes % WORD_BYTES == 0

    def send(self, x: Tensor, to: int) -> None:
        self.library.send(x, to)

    def recv(self, x: Tensor, source: int) -> None:
        self.library.recv(x, source)

    def ways(self) -> list[Way]:
        found = []
        for way in self.library.ways():
            found += [Way(way.operation, self.largest_bytes, "oneshot"), way]
        return found

    def abort(self) -> None:
        self._slots.abort()
        self.library.abort()

    def close(self) -> None:
        self._slots.close()
        self.library.close()


def _peer_memory(peers: Peers, length: int) -> list[Tensor]:
    """i64[length] of zeros of every device, by rank, each mapped here; BackendError where that is impossible.

    Through `torch.distributed._symmetric_memory`, without multicast.
    """
    try:
        import torch.distributed._symmetric_memory as symmetric_memory

        own = symmetric_memory.empty(length, dtype=torch.int64, device=peers.torch_device)
        own.zero_()
        torch.cuda.synchronize(peers.torch_device)
        # Ends when everyone is here, and so has zeroed what is its own.
        handle = symmetric_memory.rendezvous(own, default_group().group_name)
        return [
            own if rank == peers.rank else handle.get_buffer(rank, (length,), torch.int64)
            for rank in range(peers.world)
        ]
    except (ImportError, RuntimeError) as error:
        why = " ".join(str(error).split())[:120]
        raise BackendError(
            f"oneshot collectives cannot map the other devices' memory here ({why}); use --collectives torch."
        ) from error


def _mapped_files(peers: Peers, length: int) -> list[Tensor]:
    """The same on a CPU, for Triton's interpreter: files that every process maps."""
    assert peers.folder is not None
    paths = [peers.folder / f"slots-{rank}" for rank in range(peers.world)]
    own = torch.from_file(str(paths[peers.rank]), shared=True, size=length, dtype=torch.int64)
    own.zero_()
    dist.barrier()
    found = [
        own if rank == peers.rank else torch.from_file(str(path), shared=True, size=length, dtype=torch.int64)
        for rank, path in enumerate(paths)
    ]
    dist.barrier()
    paths[peers.rank].unlink()
    return found
