"""Judge collectives between devices: right sums, the same bits on everyone, call after call and in a graph.

Every member of a group runs the same cases at once. What a member puts in follows from its rank and the
turn, so each knows what should come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backbench.backends.conformance.finding import Finding, same_bits
from backbench.backends.conformance.matrix import CheckRow, Status
from backbench.backends.conformance.tolerance import deviation, limit
from backbench.backends.interface import Collectives, Communicator, Peers

SEED = 20261128
TURNS = 6
"""Calls one after the other with other numbers: what a call before left behind would show."""
REPLAYS = 3


@dataclass(frozen=True)
class CollectiveCase:
    """One operation on `elements` numbers of each member."""

    operation: str
    """"all_reduce", "all_gather", "ring" (send and receive) or "graph" (all_reduce, captured)."""
    elements: int

    @property
    def name(self) -> str:
        return f"{self.operation} n{self.elements}"


def collective_cases(level: str) -> Iterator[CollectiveCase]:
    """The cases of a level: odd and even sizes, from a few numbers to more than one shot serves."""
    quick, full = (2, 7, 2048, 150_000), (2, 7, 64, 2048, 16_384, 20_000, 131_072, 1_048_576, 3_000_001)
    sizes = quick if level == "quick" else full
    for elements in sizes:
        yield CollectiveCase("all_reduce", elements)
        yield CollectiveCase("graph", elements)
    for elements in (3, 4096, 150_000) if level == "quick" else (3, 4096, 75_968, 300_000):
        yield CollectiveCase("all_gather", elements)
    yield CollectiveCase("ring", 1000)


def check_collectives(
    collectives: Collectives,
    reference: Collectives,
    peers: Peers,
    level: str = "quick",
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16, torch.float32),
) -> list[CheckRow]:
    """A row a case, as this member sees it; the reference's error in the same dtype is the measure."""
    if reasons := collectives.refusals(peers.device, peers.world):
        return [CheckRow("collectives", "all", "all", Status.REFUSED, "; ".join(reasons))]
    checker = CollectiveChecker(collectives.open(peers), reference.open(peers))
    rows = [checker.check(case, dtype) for dtype in dtypes for case in collective_cases(level)]
    checker.communicator.close()
    return rows


class CollectiveChecker:
    """Runs cases on one communicator."""

    def __init__(self, communicator: Communicator, reference: Communicator) -> None:
        self.communicator = communicator
        self.reference = reference

    def check(self, case: CollectiveCase, dtype: torch.dtype) -> CheckRow:
        """The row of one case; an exception is a wrong result."""
        run: dict[str, Callable[[CollectiveCase, torch.dtype], Finding]] = {
            "all_reduce": self._all_reduce,
            "graph": self._graph,
            "all_gather": self._all_gather,
            "ring": self._ring,
        }
        name = str(dtype).removeprefix("torch.")
        try:
            return run[case.operation](case, dtype).row("collectives", case.name, name)
        except Exception as error:
            detail = f"raised {type(error).__name__}: {error}".splitlines()[0]
            return CheckRow("collectives", case.name, name, Status.WRONG, detail)

    def _inputs(self, case: CollectiveCase, dtype: torch.dtype, turn: int) -> list[Tensor]:
        """What every member puts in, on the CPU."""
        found = []
        for rank in range(self.communicator.world):
            generator = torch.Generator().manual_seed(SEED + 1000 * turn + rank)
            found.append(torch.randn(case.elements, generator=generator).to(dtype))
        return found

    def _own(self, inputs: Sequence[Tensor]) -> Tensor:
        return inputs[self.communicator.rank].to(self.communicator.peers.torch_device)

    def _judged(self, got: Tensor, inputs: Sequence[Tensor]) -> Finding:
        """The sum against fp64, and against every other member's bits."""
        wanted = torch.stack(list(inputs)).double().sum(0)
        plain = self.reference.all_reduce(self._own(inputs).clone())
        finding = Finding.measure(got, wanted, limit(deviation(plain, wanted), wanted, got.dtype))
        everyone = self.reference.all_gather(got.contiguous())
        apart = [str(rank) for rank, other in enumerate(everyone) if not same_bits(other, got)]
        return finding.also([f"other bits than rank {', '.join(apart)}"] if apart else [])

    def _all_reduce(self, case: CollectiveCase, dtype: torch.dtype) -> Finding:
        rounds = [self._inputs(case, dtype, turn) for turn in range(TURNS)]
        results = [self.communicator.all_reduce(self._own(inputs).clone()) for inputs in rounds]
        findings = [self._judged(got, inputs) for got, inputs in zip(results, rounds, strict=True)]
        return _worst(findings)

    def _graph(self, case: CollectiveCase, dtype: torch.dtype) -> Finding:
        if not self.communicator.capturable:
            return Finding(refused="graphs need a GPU")
        fixed = torch.zeros(case.elements, dtype=dtype, device=self.communicator.peers.torch_device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.communicator.all_reduce(fixed.clone())
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            once = self.communicator.all_reduce(fixed.clone())
            again = self.communicator.all_reduce(fixed.clone())
        findings = []
        for turn in range(REPLAYS):
            inputs = self._inputs(case, dtype, turn)
            fixed.copy_(self._own(inputs))
            graph.replay()
            torch.cuda.synchronize()
            findings += [self._judged(got.clone(), inputs) for got in (once, again)]
        del graph
        return _worst(findings)

    def _all_gather(self, case: CollectiveCase, dtype: torch.dtype) -> Finding:
        complaints = []
        for turn in range(TURNS):
            inputs = self._inputs(case, dtype, turn)
            got = self.communicator.all_gather(self._own(inputs)).cpu()
            if not same_bits(got, torch.stack(inputs)):
                complaints.append(f"turn {turn}: not what was put in")
        return Finding(0.0, 0.0, tuple(complaints))

    def _ring(self, case: CollectiveCase, dtype: torch.dtype) -> Finding:
        """Everyone's numbers to the next one; even ranks send first."""
        rank, world = self.communicator.rank, self.communicator.world
        inputs = self._inputs(case, dtype, 0)
        got = torch.empty_like(self._own(inputs))
        before, after = (rank - 1) % world, (rank + 1) % world
        if rank % 2 == 0:
            self.communicator.send(self._own(inputs), after)
        self.communicator.recv(got, before)
        if rank % 2:
            self.communicator.send(self._own(inputs), after)
        right = same_bits(got.cpu(), inputs[before])
        return Finding(0.0, 0.0, () if right else (f"not what rank {before} sent",))


def _worst(findings: Sequence[Finding]) -> Finding:
    worst = findings[0]
    for finding in findings[1:]:
        worst = worst.merged(finding)
    return worst
