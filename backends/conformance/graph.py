"""A captured attention step, replayed on other lengths than it was captured with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from backbench.backends.conformance import attention_run as runs
from backbench.backends.conformance.attention_cases import AttentionCase
from backbench.backends.conformance.attention_run import Setup
from backbench.backends.conformance.finding import Finding
from backbench.backends.conformance.tolerance import Deviation
from backbench.backends.interface import AttentionRunner, Device, GraphSupport


def check_graph(
    case: AttentionCase, runner: AttentionRunner, device: Device, limit_of: Callable[[Setup], Deviation]
) -> Finding:
    """Capture write and run on an inert batch, fill the buffers, replay: out comes the oracle's output."""
    if device.torch_device.type != "cuda":
        return Finding(refused="graphs need a GPU")
    needed = GraphSupport.DECODE if all(row.query == 1 for row in case.rows) else GraphSupport.MIXED
    if runner.graph < needed:
        return Finding(refused=f"graphs of {needed.name.lower()} batches are not offered")
    setup, torch_device = runs.set_up(case), device.torch_device
    cache = runs.filled_cache(runner, setup, torch_device)
    q, k, v, batch = runs.step_inputs(setup, torch_device)
    out = torch.full_like(q, torch.nan)
    live = {name: getattr(batch, name).clone() for name in ("query_start", "seq_lens", "slots")}

    def step() -> None:
        runner.write(cache, k, v, batch)
        runner.run(q, cache, batch, out)

    # Captured while every sequence is empty and nothing is written: what is baked in would show.
    key = runner.plan(batch)
    batch.seq_lens.zero_()
    batch.slots.fill_(-1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for name, values in live.items():
        getattr(batch, name).copy_(values)
    out.fill_(torch.nan)
    complaints = [] if runner.plan(batch) == key else ["plan() depends on device values a graph cannot know"]
    graph.replay()
    torch.cuda.synchronize()
    count = setup.expected.shape[0]
    return Finding.measure(out[:count], setup.expected, limit_of(setup)).also(complaints)
