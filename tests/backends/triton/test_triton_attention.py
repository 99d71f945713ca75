"""Triton attention against an fp64 oracle, with the torch backend's error as the measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from backbench.backends.conformance.attention_cases import AttentionCase, make_case
from backbench.backends.conformance.attention_run import (
    Setup,
    expected_output,
    filled_cache,
    run_step,
    set_up,
    step_inputs,
)
from backbench.backends.conformance.scenario import Row, write_batch
from backbench.backends.conformance.tolerance import Deviation, complaint, deviation, limit
from backbench.backends.interface import (
    AttentionRunner,
    AttentionSpec,
    Device,
    GraphSupport,
    Rotary,
    Rotation,
)
from backbench.backends.interface import device as devices
from backbench.backends.quantization import rounded_heads
from backbench.backends.torch.attention import TorchAttention
from backbench.backends.triton.attention import TritonAttention, TritonRunner
from backbench.backends.triton.configs import ATTENTION_BUCKETS, attention_config, small_batch
from backbench.backends.triton.operations import TritonOperations
from backbench.errors import BackendError

DEVICE = devices.gpu(0) if torch.cuda.is_available() else devices.cpu(interpret=True)
PLACE = DEVICE.torch_device


def problem(case: AttentionCase, **replaced: Any) -> str:
    """What is wrong with the Triton backend in `case`; empty when nothing."""
    setup = set_up(case)
    runner = TritonRunner(case.spec, DEVICE, **replaced)
    actual = deviation(step(runner, setup), setup.expected)
    torch_attention = TorchAttention()
    if torch_attention.refusals(case.spec, DEVICE):
        reference = Deviation(float("inf"), float("inf"))  # only the ceiling in roundings holds
    else:
        reference = deviation(step(torch_attention.open(case.spec, DEVICE), setup), setup.expected)
    return complaint(actual, limit(reference, setup.expected, case.spec.dtype))


def step(runner: AttentionRunner, setup: Setup) -> torch.Tensor:
    return run_step(runner, filled_cache(runner, setup, PLACE), setup, PLACE)


def short(case: AttentionCase, *rows: Row) -> AttentionCase:
    """The same case over fewer and shorter sequences: the interpreter is slow."""
    return replace(case, rows=rows)


MIXED = (Row(1, 33), Row(1, 9), Row(5, 5), Row(18, 41))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_batch(dtype: torch.dtype) -> None:
    assert not problem(short(make_case("mixed", dtype), *MIXED))


@pytest.mark.parametrize(
    "geometry",
    [
        {"head_dim": 32, "group": 7, "block_size": 32},
        {"head_dim": 80, "group": 1, "block_size": 64},
        {"head_dim": 96, "group": 16, "block_size": 128},
        {"head_dim": 128, "window": 20},
        {"head_dim": 64, "softcap": 20.0},
        {"head_dim": 64, "kv_dtype": torch.float8_e4m3fn},
        {"head_dim": 64, "kv_dtype": torch.int8},
        {"head_dim": 80, "group": 7, "window": 20, "softcap": 20.0, "kv_dtype": torch.int8},
        {"head_dim": 64, "kind": "padding", "pad": 2},
    ],
    ids=str,
)
def test_geometry(geometry: dict[str, Any]) -> None:
    assert not problem(short(make_case("mixed", torch.bfloat16, **geometry), *MIXED))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_fp8_cache_is_decoded(dtype: torch.dtype) -> None:
    fp8 = torch.float8_e4m3fn
    case = short(make_case("decode", dtype, head_dim=64, kv_dtype=fp8), Row(1, 33), Row(1, 1), Row(1, 70))
    assert not problem(case, decode={"programs_per_unit": 5, "CHUNK": 2})


INT8 = torch.int8


@pytest.mark.parametrize("paired", [True, False], ids=["paired", "byte by byte"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_int8_cache_is_decoded(dtype: torch.dtype, paired: bool) -> None:
    case = short(make_case("decode", dtype, head_dim=64, kv_dtype=INT8), Row(1, 33), Row(1, 1), Row(1, 70))
    setup = set_up(case)
    runner = TritonRunner(case.spec, DEVICE, decode={"programs_per_unit": 5, "CHUNK": 2})
    runner.paired = paired
    reference = deviation(step(TorchAttention().open(case.spec, DEVICE), setup), setup.expected)
    found = deviation(step(runner, setup), setup.expected)
    assert not complaint(found, limit(reference, setup.expected, dtype))


@pytest.mark.parametrize("query", [1, 9], ids=["decode", "prefill"])
@pytest.mark.parametrize("paired", [True, False], ids=["paired", "byte by byte"])
def test_values_whose_scales_fp16_cannot_hold(query: int, paired: bool) -> None:
    """Scales of 1e-7 and of 500 in one sequence: products with weights would be 0 and infinity."""
    spec = make_case("mixed", torch.float16, head_dim=32, kv_dtype=INT8).spec
    case = AttentionCase("", "values", spec, (Row(query, 40),))
    for size in (1e-5, 1.0, 6e4):
        setup = set_up(case)
        v = setup.data.v[0].clamp(-1, 1) * size
        v[::2] *= 1e-2
        data = replace(setup.data, v=(v,))
        setup = replace(setup, data=data, expected=expected_output(data, spec))
        runner = TritonRunner(spec, DEVICE)
        runner.paired = paired
        found = deviation(step(runner, setup), setup.expected)
        # fp16's own steps are 2^-24 in the end; one unit for them.
        allowed = limit(Deviation(0.0, 0.0), setup.expected, torch.float16)
        widest = Deviation(4 * allowed.largest + 2**-24, 4 * allowed.rms + 2**-24)
        assert not complaint(found, widest), size


@pytest.mark.parametrize("descriptor", [True, False], ids=["boxes", "pointers"])
def test_prefill_over_an_int8_cache(descriptor: bool) -> None:
    case = make_case("prefix", torch.float16, block_size=32, window=24, kv_dtype=INT8)
    assert not problem(
        short(case, Row(9, 40), Row(12, 12)), prefill={"DESCRIPTOR": descriptor, "TILE": 16, "M": 16}
    )


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_written_to_an_int8_cache_is_what_torch_would(fused: bool) -> None:
    """Bit for bit; and padding writes nothing."""
    spec = replace(make_case("mixed", torch.bfloat16, head_dim=80).spec, kv_dtype=INT8)
    heads, tokens = spec.q_heads + 2 * spec.kv_heads, 11
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(tokens, heads, spec.head_dim, generator=generator).to(spec.dtype)
    qkv[3, -1] = 0.0
    angles = torch.rand(64, spec.head_dim // 2, generator=generator)
    rotary = Rotary(torch.cat([angles.cos(), angles.sin()], -1).to(PLACE), spec.head_dim)
    positions = torch.arange(tokens, device=PLACE)
    slots = torch.tensor([0, 5, 40, 41, -1, 63, 2, 3, 17, 16, -1], device=PLACE)
    batch = write_batch(slots, torch.arange(4, dtype=torch.int32, device=PLACE)[None])
    runner = TritonRunner(spec, DEVICE)
    cache = runner.new_cache(4)
    for part in cache.tensors():
        part.fill_(77)
    flat, rotation = qkv.flatten(1).to(PLACE), Rotation(rotary)
    _, k, v = TritonOperations().rotate(flat, positions, rotation, spec)
    if fused:
        runner.rotate_and_write(flat, positions, rotation, cache, batch)
    else:
        runner.write(cache, k, v, batch)
    live = slots >= 0
    for x, codes, scales in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        assert scales is not None
        expected, scale = rounded_heads(x[live])
        rows, kept = (part.transpose(1, 2).flatten(0, 1) for part in (codes, scales))
        assert torch.equal(rows[slots[live]], expected)
        assert torch.equal(kept[slots[live]], scale)
        untouched = torch.ones(64, dtype=torch.bool, device=PLACE)
        untouched[slots[live]] = False
        assert bool((rows[untouched] == 77).all()) and bool((kept[untouched] == 77).all())


def test_an_int8_cache_is_served_where_fp8_cannot_be_converted() -> None:
    ampere = Device("nvidia", "sm80", "A100", 108, 2**36, 163 * 1024, torch.device("cpu"))
    spec = AttentionSpec(32, 8, 128, torch.bfloat16, INT8, 64, 128**-0.5)
    assert TritonAttention().refusals(spec, ampere) == []
    (reason,) = TritonAttention().refusals(replace(spec, kv_dtype=torch.float8_e4m3fn), ampere)
    assert "use int8 or" in reason


DRAFTS = (Row(5, 44), Row(3, 66), Row(4, 4), Row(1, 20), Row(2, 33))


@pytest.mark.parametrize(
    "geometry",
    [
        {"head_dim": 32, "group": 2, "block_size": 32},
        {"head_dim": 32, "group": 1, "window": 3},
        {"head_dim": 80, "group": 7, "window": 20, "softcap": 20.0},
        {"head_dim": 64, "group": 8, "window": 16, "kv_dtype": torch.float8_e4m3fn},
        {"head_dim": 32, "group": 4, "window": 40, "kv_dtype": torch.int8},
        {"head_dim": 32, "group": 2, "kind": "padding", "pad": 2},
    ],
    ids=str,
)
def test_drafts_are_verified_by_the_decode_kernel(geometry: dict[str, Any]) -> None:
    """Each token sees the keys up to its own, in one tile with the others of its sequence."""
    case = short(make_case("drafts", torch.bfloat16, **geometry), *DRAFTS)
    assert TritonRunner(case.spec, DEVICE).plan(step_inputs(set_up(case), PLACE)[3])[-1] == "few"
    assert not problem(case)


@pytest.mark.parametrize(("programs", "lead_in"), [(1, 1), (7, 0), (13, 3), (40, 1)])
@pytest.mark.parametrize("window", [None, 3])
def test_drafts_are_right_however_the_work_is_cut(programs: int, lead_in: int, window: int | None) -> None:
    """Pieces in which some rows see no key: those after their own, or all behind a window."""
    case = short(make_case("drafts", torch.float32, head_dim=32, group=2, window=window), *DRAFTS)
    assert not problem(case, decode={"programs_per_unit": programs, "LEAD_IN": lead_in})


def test_more_drafts_than_a_tile_has_rows_for_are_a_prompts_tokens() -> None:
    case = short(make_case("drafts", torch.float32, head_dim=32, group=16), Row(5, 20), Row(2, 9))
    runner = TritonRunner(case.spec, DEVICE)
    assert runner.few_queries == 4
    assert runner.plan(step_inputs(set_up(case), PLACE)[3])[-1] != "few"
    assert not problem(case)


def test_head_dim_256() -> None:
    assert not problem(short(make_case("mixed", torch.float16, head_dim=256), Row(1, 20), Row(9, 12)))


@pytest.mark.parametrize("lead_in", [0, 1, 3])
@pytest.mark.parametrize("programs", [1, 2, 5, 13, 40])
def test_decode_is_right_however_the_work_is_cut(programs: int, lead_in: int) -> None:
    """Parts that end inside a pair or before its first tile, span pairs, or number more than the tiles."""
    rows = (Row(1, 70), Row(1, 1), Row(1, 33), Row(1, 17))
    case = short(make_case("decode", torch.float32, head_dim=32), *rows)
    # In the interpreter a device has one unit.
    assert not problem(case, decode={"programs_per_unit": programs, "CHUNK": 2, "LEAD_IN": lead_in})


@pytest.mark.parametrize("programs", [1, 2, 5, 13])
def test_equal_lengths_are_cut_alike(programs: int) -> None:
    case = short(make_case("decode", torch.float32, head_dim=32), *[Row(1, 40)] * 3)
    assert not problem(case, decode={"programs_per_unit": programs, "CHUNK": 2, "LEAD_IN": 3})


def test_counters_are_left_at_zero_so_that_a_graph_can_run_again() -> None:
    setup = set_up(short(make_case("decode", torch.float32, head_dim=32), Row(1, 60), Row(1, 20)))
    runner = TritonRunner(setup.case.spec, DEVICE, decode={"programs_per_unit": 4})
    first, second = step(runner, setup), step(runner, setup)
    assert torch.equal(first, second)
    assert int(runner._counters.abs().sum()) == 0


def test_a_batch_of_inert_rows_alone_does_nothing() -> None:
    setup = set_up(short(make_case("decode", torch.float32, head_dim=32), Row(1, 20), Row(1, 5)))
    runner = TritonRunner(setup.case.spec, DEVICE)
    q, _, _, batch = step_inputs(setup, PLACE)
    batch.seq_lens.zero_()
    out = torch.full_like(q, 7.0)
    runner.run(q, runner.new_cache(setup.layout.num_blocks), batch, out)
    assert bool((out == 7.0).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a graph")
def test_one_graph_serves_every_length() -> None:
    """Captured over inert rows, replayed over live ones: bit for bit what an eager run gives."""
    setup = set_up(make_case("wide decode", torch.bfloat16, head_dim=128))
    runner = TritonRunner(setup.case.spec, DEVICE)
    cache = filled_cache(runner, setup, PLACE)
    q, k, v, batch = step_inputs(setup, PLACE)
    runner.write(cache, k, v, batch)
    eager, captured = torch.zeros_like(q), torch.zeros_like(q)
    runner.run(q, cache, batch, eager)
    lengths = batch.seq_lens.clone()
    batch.seq_lens.zero_()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        runner.run(q, cache, batch, captured)
    batch.seq_lens.copy_(lengths)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(eager, captured)


def fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Triton's interpreter compute fp32 a * b + c with one rounding, as a GPU does; numpy rounds twice.

    Where both terms are huge and nearly cancel, the product's rounding error is all that is left.
    """
    multiply = interpreter_builder.create_fmul

    def product(left: TensorHandle, right: TensorHandle) -> TensorHandle:
        result = multiply(left, right)
        if result.data.dtype == np.float32:
            # Two fp32 factors have an exact product in fp64.
            with np.errstate(all="ignore"):
                result.set_attr("exact", left.data.astype(np.float64) * right.data)
        return result

    def fused(operation: Callable[..., TensorHandle], function: Any) -> Callable[..., TensorHandle]:
        def apply(left: TensorHandle, right: TensorHandle) -> TensorHandle:
            result = operation(left, right)
            exact = left.attr.get("exact")
            if exact is not None:
                with np.errstate(all="ignore"):
                    result.data = function(exact, right.data.astype(np.float64)).astype(np.float32)
            return result

        return apply

    monkeypatch.setattr(interpreter_builder, "create_fmul", product)
    for name, function in (("create_fadd", np.add), ("create_fsub", np.subtract)):
        operation = fused(getattr(interpreter_builder, name), function)
        monkeypatch.setattr(interpreter_builder, name, operation)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU fuses by itself")
@pytest.mark.parametrize("head_dim", [32, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_windows_stand_fused_arithmetic(
    head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that see no key of a window's first tile: the rounding of a huge hidden score must not show.

    Whether it would depends on head_dim, through the scale's last bits: 64 and 80 are among those.
    """
    fuse(monkeypatch)
    rows = (Row(1, 33), Row(20, 52), Row(3, 70))
    assert not problem(short(make_case("mixed", dtype, head_dim=head_dim, window=24), *rows))


def test_prefill_by_descriptor() -> None:
    case = short(make_case("prefix", torch.float16, block_size=32, window=24), Row(9, 40), Row(12, 12))
    assert not problem(case, prefill={"DESCRIPTOR": True, "TILE": 16, "M": 16})


def test_window_longer_than_the_sequence_changes_nothing() -> None:
    case = short(make_case("mixed", torch.float32, head_dim=32), Row(1, 30), Row(7, 20))
    wide = replace(case, spec=replace(case.spec, window=1000))
    outputs = [step(TritonRunner(c.spec, DEVICE), set_up(c)) for c in (case, wide)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)  # tiles start elsewhere: fp32 sums differ


def test_plan_changes_with_every_integer_a_launch_bakes_in() -> None:
    setup = set_up(make_case("mixed", torch.float32))
    runner = TritonRunner(setup.case.spec, DEVICE)
    batch = step_inputs(setup, PLACE)[3]
    plans = {
        runner.plan(b)
        for b in (
            batch,
            replace(batch, num_seqs=batch.num_seqs + 1),
            replace(batch, num_decodes=batch.num_decodes - 1),
            replace(batch, num_tokens=batch.num_tokens + 64),
        )
    }
    assert len(plans) == 4
    assert runner.plan(batch) == runner.plan(replace(batch, max_len=2 * batch.max_len))


def test_the_grid_has_room_for_every_query_tile() -> None:
    """One token over a full tile in each sequence is the worst case."""
    spec = make_case("prefill", torch.float32).spec
    runner = TritonRunner(spec, DEVICE)
    tokens = runner.prefill["M"] // runner.group
    rows = tuple(Row(tokens + 1, tokens + 1) for _ in range(3))
    batch = step_inputs(set_up(short(make_case("prefill", torch.float32), *rows)), PLACE)[3]
    assert runner._query_tiles(batch) >= 6


def test_copy_and_read_move_whole_blocks() -> None:
    spec = make_case("decode", torch.bfloat16, kv_dtype=torch.float8_e4m3fn).spec
    runner = TritonRunner(spec, DEVICE)
    cache = runner.new_cache(6)
    values = torch.randn(cache.k.shape)
    cache.k.copy_(values.to(spec.kv_dtype))
    cache.v.copy_((values + 1).to(spec.kv_dtype))
    source, target = torch.tensor([1, 4], device=PLACE), torch.tensor([0, 5], device=PLACE)
    runner.copy_blocks(cache, source, target)
    (k_source, v_source), (k_target, v_target) = runner.read(cache, source), runner.read(cache, target)
    assert k_source.shape == (2, spec.block_size, spec.kv_heads, spec.head_dim)
    assert torch.equal(k_source.float(), k_target.float())
    assert torch.equal(v_source.float(), v_target.float())
    assert torch.equal(k_source[0].float().transpose(0, 1), cache.k[1].float())


def test_copy_and_read_take_scales_along() -> None:
    spec = make_case("decode", torch.bfloat16, kv_dtype=INT8).spec
    runner = TritonRunner(spec, DEVICE)
    cache = runner.new_cache(6)
    for part in cache.tensors():
        part.copy_(torch.randint(-100, 100, part.shape))
    source, target = torch.tensor([1, 4], device=PLACE), torch.tensor([0, 5], device=PLACE)
    runner.copy_blocks(cache, source, target)
    for part in cache.tensors():
        assert torch.equal(part[source], part[target])
    assert cache.k_scale is not None
    k, _ = runner.read(cache, source)
    assert k.shape == (2, spec.block_size, spec.kv_heads, spec.head_dim)
    expected = cache.k[1].float() * cache.k_scale[1][..., None]
    assert torch.equal(k[0].transpose(0, 1), expected)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_cache_bytes(kv_dtype: torch.dtype) -> None:
    runner = TritonRunner(make_case("decode", torch.bfloat16, kv_dtype=kv_dtype).spec, DEVICE)
    cache = runner.new_cache(3)
    assert runner.cache_bytes_per_block() * 3 == sum(part.nbytes for part in cache.tensors())


def test_refusals_name_what_is_wrong_and_what_would_work() -> None:
    spec = make_case("decode", torch.bfloat16).spec
    attention = TritonAttention()
    assert attention.refusals(spec, DEVICE) == []
    (reason,) = attention.refusals(spec, devices.cpu())
    assert "--backend torch" in reason
    assert "--interpret" in reason
    for wrong in ({"head_dim": 300}, {"kv_dtype": torch.int16}, {"dtype": torch.float64}, {"q_heads": 3}):
        assert attention.refusals(replace(spec, **wrong), DEVICE)
    with pytest.raises(BackendError, match="head_dim 300"):
        attention.open(replace(spec, head_dim=300), DEVICE)


def test_mixed_batches_may_be_captured() -> None:
    assert TritonRunner.graph == GraphSupport.MIXED


@pytest.mark.parametrize("arch", ["sm80", "sm89", "sm90", "sm120", "gfx942", "gfx1100"])
def test_small_and_large_decode_batches_have_a_configuration(arch: str) -> None:
    device = replace(DEVICE, vendor="amd" if arch.startswith("gfx") else "nvidia", arch=arch, units=132)
    spec = AttentionSpec(32, 8, 128, torch.bfloat16, torch.bfloat16, 16, 1.0)
    assert small_batch(device, spec) == 16
    for bucket in ATTENTION_BUCKETS:
        config = attention_config(device, spec, bucket)
        assert config["TILE"] >= 16
        assert config["STAGES"] >= 1
