"""Sums between devices: each backend's, and torch's own kernels over symmetric memory, beside one another.

Every device runs the same calls at once. On a GPU many calls stand in one graph, whose time is divided by
their number: how far apart the devices' hosts start it then hardly counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from backbench.backends.conformance.collective_check import check_collectives
from backbench.backends.conformance.matrix import CheckRow
from backbench.backends.conformance.tolerance import CEILING_ROUNDINGS, deviation, rounding
from backbench.backends.interface import Communicator, Device
from backbench.backends.registry import load
from backbench.backends.torch.collectives import default_group
from backbench.engine.parallel.ranks import require_devices
from backbench.engine.parallel.team import Member, Team
from backbench.errors import BackendError
from backbench.harness.kernels.measure import KernelResult
from backbench.harness.kernels.timing import ROUNDS, summary

SEED = 20261129
CALLS = {"cpu": 20, "gpu": 100}
"""In one graph, or one after the other."""


@dataclass(frozen=True)
class Sizes:
    """What is summed: rows of a model's hidden states."""

    rows: tuple[int, ...]
    hidden_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Contender:
    """One way to sum."""

    name: str
    sum: Callable[[Tensor], Tensor]
    place: Callable[[int, torch.dtype], Tensor]
    """Zeros [n] where it takes its input from."""


def measure_all_reduce(names: Sequence[str], sizes: Sizes, world: int, device: Device) -> list[KernelResult]:
    """Each named backend's all-reduce over `world` devices from this one on, as the first of them sees it.

    Raises EngineError or BackendError where there are not as many devices, or a backend is not known.
    """
    require_devices(world, device)
    for name in names:
        load(name)
    team = Team(world, device)
    try:
        results: list[KernelResult] = team.call(measure_on, tuple(names), sizes)[0]
        return results
    finally:
        team.close()


def measure_on(member: Member, names: tuple[str, ...], sizes: Sizes) -> list[KernelResult]:
    """The member's results, every contender at every size."""
    found = list(contenders(member, names))
    results = []
    for rows in sizes.rows:
        for contender in found:
            if isinstance(contender, Contender):
                empty = nothing(member, contender.name, sizes, rows)
                results.append(measured(member, contender, rows * sizes.hidden_size, sizes.dtype, empty))
            else:
                results.append(replace(nothing(member, contender[0], sizes, rows), note=contender[1]))
    return results


def nothing(member: Member, name: str, sizes: Sizes, rows: int) -> KernelResult:
    """The result of one contender at one size, before anything is measured."""
    num_bytes = rows * sizes.hidden_size * sizes.dtype.itemsize
    return KernelResult(
        "all_reduce",
        f"m{rows} {num_bytes // 1024} KiB, {member.peers.world} devices",
        str(sizes.dtype).removeprefix("torch."),
        name,
        "",
        2 * num_bytes,
        0,
    )


def contenders(member: Member, names: Sequence[str]) -> Iterator[Contender | tuple[str, str]]:
    """Each backend's, and on a GPU torch's kernels; or (name, why it cannot serve)."""
    peers = member.peers
    for name in names:
        collectives = load(name).collectives
        if collectives is None:
            yield name, f"collectives are served by {load(name).base}"
        elif reasons := collectives.refusals(peers.device, peers.world):
            yield name, "; ".join(reasons)
        else:
            try:
                yield contender_of(name, collectives.open(peers))
            except BackendError as error:
                yield name, str(error)
    if peers.torch_device.type == "cuda":
        group = default_group().group_name

        def symmetric(count: int, dtype: torch.dtype) -> Tensor:
            import torch.distributed._symmetric_memory as symmetric_memory

            tensor = symmetric_memory.empty(count, dtype=dtype, device=peers.torch_device)
            symmetric_memory.rendezvous(tensor, group)
            return tensor.zero_()

        shots = {
            "torch symm_mem one-shot": torch.ops.symm_mem.one_shot_all_reduce,
            "torch symm_mem two-shot": torch.ops.symm_mem.two_shot_all_reduce_,
        }
        for name, operation in shots.items():
            yield Contender(name, lambda x, call=operation: call(x, "sum", group), symmetric)  # type: ignore[misc]


def contender_of(name: str, communicator: Communicator) -> Contender:
    """An opened backend's way."""
    at = communicator.peers.torch_device
    return Contender(
        name, communicator.all_reduce, lambda count, dtype: torch.zeros(count, dtype=dtype, device=at)
    )


def measured(
    member: Member, contender: Contender, count: int, dtype: torch.dtype, empty: KernelResult
) -> KernelResult:
    """`empty` with its time and error; every member calls this at once."""
    on_gpu = member.peers.torch_device.type == "cuda"
    x = contender.place(count, dtype)
    try:
        error, limit = _error(member, contender, x)
    except RuntimeError as fault:
        return replace(empty, note=f"raised {' '.join(str(fault).split())[:200]}", correct=False)
    x.zero_()  # sums of sums would overflow
    calls = CALLS["gpu" if on_gpu else "cpu"]
    launch = _captured(contender, x, calls) if on_gpu else _repeated(contender, x, calls)
    rounds = [_seconds(member, launch) / calls for _ in range(ROUNDS)]
    return replace(
        empty,
        mode="graph" if on_gpu else "eager",
        timing=summary(rounds),
        error=error,
        limit=limit,
        correct=error <= limit,
    )


def _repeated(contender: Contender, x: Tensor, calls: int) -> Callable[[], None]:
    def launch() -> None:
        for _ in range(calls):
            contender.sum(x)

    return launch


def _captured(contender: Contender, x: Tensor, calls: int) -> Callable[[], None]:
    launch = _repeated(contender, x, calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        contender.sum(x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        launch()
    return graph.replay


def _error(member: Member, contender: Contender, x: Tensor) -> tuple[float, float]:
    """(largest error, what it may be) of a sum of random numbers that every member can make."""
    inputs = []
    for rank in range(member.peers.world):
        generator = torch.Generator().manual_seed(SEED + rank)
        inputs.append(torch.randn(x.numel(), generator=generator).to(x.dtype))
    x.copy_(inputs[member.peers.rank])
    wanted = torch.stack(inputs).double().sum(0)
    got = contender.sum(x)
    return deviation(got, wanted).largest, CEILING_ROUNDINGS * rounding(x.dtype) * float(wanted.abs().max())


def _seconds(member: Member, launch: Callable[[], None]) -> float:
    """Of one launch that all members start about at once."""
    dist.barrier()
    if member.peers.torch_device.type != "cuda":
        start = time.perf_counter()
        launch()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    launch()
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    launch()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def conform_on(member: Member, name: str, level: str, dtypes: tuple[torch.dtype, ...]) -> list[CheckRow]:
    """The member's rows of a backend's collectives, put through their conformance cases."""
    own, reference = load(name).collectives, load("torch").collectives
    if own is None or reference is None:
        raise BackendError(f"Backend {name!r} has no collectives of its own.")
    return check_collectives(own, reference, member.peers, level, dtypes)
