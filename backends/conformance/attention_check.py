"""Judge an attention implementation, case by case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import torch

from backbench.backends.conformance import attention_run as runs
from backbench.backends.conformance.attention_cases import AttentionCase
from backbench.backends.conformance.attention_run import Setup
from backbench.backends.conformance.finding import Finding, same_bits
from backbench.backends.conformance.fused_write import check_fused_write
from backbench.backends.conformance.graph import check_graph
from backbench.backends.conformance.matrix import CheckRow, Status
from backbench.backends.conformance.scenario import Row, Sequences, permuted_layout, random_sequences
from backbench.backends.conformance.tolerance import Deviation, deviation, limit
from backbench.backends.interface import Attention, AttentionRunner, Device, Operations
from backbench.backends.quantization import kept_heads


class AttentionChecker:
    """Runs cases on one attention implementation; `reference` is torch's, for its error in the same dtype."""

    def __init__(
        self, attention: Attention, operations: Operations, reference: Attention, device: Device
    ) -> None:
        self.attention = attention
        self.operations = operations
        self.reference = reference
        self.device = device

    def check(self, case: AttentionCase) -> CheckRow:
        """The row of one case; an exception from the backend is a wrong result."""
        name = str(case.spec.dtype).removeprefix("torch.")
        if reasons := self.attention.refusals(case.spec, self.device):
            return CheckRow("attention", case.name, name, Status.REFUSED, "; ".join(reasons))
        judge: dict[str, Callable[[AttentionCase, AttentionRunner], Finding]] = {
            "values": self._values,
            "padding": self._values,
            "fork": self._fork,
            "invariance": self._invariance,
            "graph": lambda case, runner: check_graph(case, runner, self.device, self._limit),
            "fused write": lambda case, runner: check_fused_write(case, runner, self.operations, self.device),
        }
        try:
            finding = judge[case.kind](case, self.attention.open(case.spec, self.device))
        except Exception as error:
            detail = f"raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return CheckRow("attention", case.name, name, Status.WRONG, detail)
        return finding.row("attention", case.name, name)

    def _limit(self, setup: Setup) -> Deviation:
        """What this case may be off by: torch's own deviation on the same stored values decides."""
        spec = setup.case.spec
        plain = replace(spec, kv_dtype=spec.dtype)
        rounded = Sequences(
            setup.data.q,
            tuple(kept_heads(k, spec.kv_dtype).to(spec.dtype) for k in setup.data.k),
            tuple(kept_heads(v, spec.kv_dtype).to(spec.dtype) for v in setup.data.v),
        )
        same = replace(setup, case=replace(setup.case, spec=plain), data=rounded)
        device = self.device.torch_device
        runner = self.reference.open(plain, self.device)
        out = runs.run_step(runner, runs.filled_cache(runner, same, device), same, device)
        return limit(deviation(out, setup.expected), setup.expected, spec.dtype)

    def _values(self, case: AttentionCase, runner: AttentionRunner) -> Finding:
        setup, device = runs.set_up(case), self.device.torch_device
        cache = runs.filled_cache(runner, setup, device)
        out = runs.run_step(runner, cache, setup, device)
        finding = Finding.measure(out, setup.expected, self._limit(setup))
        return finding.also(cache_complaints(runner, cache, setup, device))

    def _fork(self, case: AttentionCase, runner: AttentionRunner) -> Finding:
        """Two sequences share full blocks; the last, partial one is copied, then both go separate ways."""
        setup, device = forked_setup(case), self.device.torch_device
        cache = runs.poisoned_cache(runner, setup.layout, case.spec, device)
        context = setup.case.rows[0].context
        runs.write_positions(runner, cache, setup, 0, 0, context, device)
        source, target = setup.layout.blocks[0][-1], setup.layout.blocks[1][-1]
        ids = torch.tensor([source, target], device=device)
        runner.copy_blocks(cache, ids[:1], ids[1:])
        copied = runner.read(cache, ids)
        out = runs.run_step(runner, cache, setup, device)
        finding = Finding.measure(out, setup.expected, self._limit_of_fork(setup))
        equal = all(same_bits(x[0], x[1]) for x in copied)
        return finding.also([] if equal else ["copy_blocks left the copy different from its source"])

    def _limit_of_fork(self, setup: Setup) -> Deviation:
        """As `_limit`, with blocks of their own for both sequences."""
        lengths = [row.length for row in setup.case.rows]
        generator = torch.Generator().manual_seed(runs.SEED)
        own = permuted_layout(lengths, setup.case.spec.block_size, generator)
        return self._limit(replace(setup, layout=own))

    def _invariance(self, case: AttentionCase, runner: AttentionRunner) -> Finding:
        """Each sequence alone and in company: the same bits, where the runner says so."""
        setup, device = runs.set_up(case), self.device.torch_device
        whole = runs.run_step(runner, runs.filled_cache(runner, setup, device), setup, device)
        # Where it is not declared, the answer is a note: the first and the last sequence are enough.
        last = len(case.rows) - 1
        chosen = range(last + 1) if runner.batch_invariant else sorted({0, last})
        ends = list(accumulate((row.query for row in case.rows), initial=0))
        same = True
        for row in chosen:
            single = runs.part(setup, [row])
            alone = runs.run_step(runner, runs.filled_cache(runner, single, device), single, device)
            same = same and same_bits(whole[ends[row] : ends[row + 1]], alone)
        finding = Finding.measure(whole, setup.expected, self._limit(setup))
        if runner.batch_invariant:
            return finding.also([] if same else ["declared batch invariant, yet bits depend on the batch"])
        seen = "agree" if same else "differ"
        return replace(finding, note=f"not declared batch invariant; alone and in company, bits {seen}")


def forked_setup(case: AttentionCase) -> Setup:
    """Two decodes after one shared context that ends inside a block; only the last block differs."""
    spec = case.spec
    context = 2 * spec.block_size + spec.block_size // 2
    rows = (Row(1, context + 1), Row(1, context + 1))
    generator = torch.Generator().manual_seed(runs.SEED)
    layout = permuted_layout([context + 1, 1], spec.block_size, generator)
    first, second = layout.blocks
    layout = replace(layout, blocks=(first, (*first[:-1], *second)))
    data = random_sequences(rows, spec, generator)
    k = (data.k[0], torch.cat((data.k[0][:context], data.k[1][context:])))
    v = (data.v[0], torch.cat((data.v[0][:context], data.v[1][context:])))
    forked = Sequences(data.q, k, v)
    return Setup(replace(case, rows=rows), layout, forked, runs.expected_output(forked, spec))


def cache_complaints(runner: AttentionRunner, cache: object, setup: Setup, device: torch.device) -> list[str]:
    """Every live slot reads back as written, and every other one still holds its poison."""
    spec, layout = setup.case.spec, setup.layout
    ids = torch.arange(layout.num_blocks, device=device)
    read_k, read_v = (x.flatten(0, 1).cpu().float() for x in runner.read(cache, ids))
    expected = (layout.num_blocks, spec.block_size, spec.kv_heads, spec.head_dim)
    if read_k.shape != (expected[0] * expected[1], *expected[2:]):
        return [f"read gave {tuple(read_k.shape)} flattened, the canonical layout is {expected}"]
    poison = runs.poison_value(runner)
    wanted_k, wanted_v = torch.full_like(read_k, poison), torch.full_like(read_v, poison)
    live = torch.zeros(len(read_k), dtype=torch.bool)
    for i, row in enumerate(setup.case.rows):
        slots = torch.tensor(layout.slots(i, 0, row.length))
        wanted_k[slots] = kept_heads(setup.data.k[i], spec.kv_dtype).float()
        wanted_v[slots] = kept_heads(setup.data.v[i], spec.kv_dtype).float()
        live[slots] = True
    complaints = []
    for name, wanted, got in (("K", wanted_k, read_k), ("V", wanted_v, read_v)):
        if not torch.equal(wanted[live], got[live]):
            complaints.append(f"{name} does not read back as it was written")
        if not torch.equal(got[~live].nan_to_num(nan=-1e4), wanted[~live].nan_to_num(nan=-1e4)):
            complaints.append(f"{name} was written to slots that belong to no token of the batch")
    return complaints
