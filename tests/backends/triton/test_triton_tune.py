"""What the Triton backend offers to offline tuning; checked in the interpreter, timed by a fake."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from backbench.backends.interface import AttentionSpec, Device, Scheme
from backbench.backends.interface import device as devices
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import SCHEMES
from backbench.backends.triton import configs, gemm_tune, quantized_tune, tune
from backbench.backends.triton.configs import (
    ATTENTION_BUCKETS,
    KERNEL_BUCKETS,
    ROW_BUCKETS,
    RULED,
    GemmConfig,
    ZeroBias,
    decode_launches,
    gemm_launches,
    prefill_launches,
    written_attention,
)
from backbench.backends.triton.gemm_tune import GemmProblem
from backbench.backends.triton.quantized_configs import BUCKETS
from backbench.backends.triton.quantized_tune import QuantizedProblem
from backbench.backends.triton.tune import AttentionProblem, TritonTuner
from backbench.backends.tuning.search import Problem, parallel_compiler, sweep

HERE = devices.gpu(0) if torch.cuda.is_available() else cpu(interpret=True)
H200 = Device("nvidia", "sm90", "H200", 132, 2**37, 227 * 1024, torch.device("cpu"))
MI300 = replace(H200, vendor="amd", arch="gfx942", units=304, shared_bytes=64 * 1024)
SPEC = AttentionSpec(32, 8, 128, torch.bfloat16, torch.bfloat16, 64, 128**-0.5)
SMALL = AttentionSpec(4, 2, 16, torch.float32, torch.float32, 16, 0.25)


def small_product(rows: int = 1) -> GemmProblem:
    return GemmProblem(rows, 48, 64, torch.bfloat16, HERE, cold_bytes=20_000, read_bytes=20_000)


def small_attention(kind: str) -> AttentionProblem:
    return AttentionProblem(SMALL, kind, HERE, ((2, 40),))


def test_every_bucket_of_the_model_is_a_problem_once() -> None:
    weights = [(64, 32), (96, 32), (64, 32)]
    specs = [SPEC, replace(SPEC, window=128), replace(SPEC, block_size=16)]
    tuner = TritonTuner()
    problems = [*tuner.products(weights, torch.bfloat16, H200), *tuner.attention(specs, H200)]
    keys = [(problem.operation, problem.bucket, problem.dtype) for problem in problems]
    assert len(keys) == len(set(keys)) == 2 * len(ROW_BUCKETS) + 2 * len(ATTENTION_BUCKETS)
    assert tuner.file(H200).name == "sm90-132.json"


def test_every_bucket_of_a_quantized_product_is_a_problem_once() -> None:
    schemes = (Scheme(), SCHEMES["fp8"], SCHEMES["int4-g128"])
    weights = [(256, 256), (512, 256), (256, 256)]
    problems = [*TritonTuner().products(weights, torch.bfloat16, H200, schemes)]
    keys = [(problem.operation, problem.bucket, problem.dtype) for problem in problems]
    assert len(keys) == len(set(keys)) == 2 * (len(ROW_BUCKETS) + 2 * len(BUCKETS))
    assert pickle.loads(pickle.dumps(problems[-1])) == problems[-1]


def test_compilers_in_other_processes_answer_whatever_happens_there() -> None:
    """Without a GPU nothing can be compiled for one: that is left to the sweep to find out."""
    with parallel_compiler(1) as compile_all:
        compile_all(small_product(), [asdict(GemmConfig(0, 4, 64, 4, 1))])


@pytest.mark.parametrize("make", [small_product, lambda: small_attention("decode")])
def test_a_problem_travels_to_another_process(make: Callable[[], Problem]) -> None:
    problem = pickle.loads(pickle.dumps(make()))
    assert problem == make()
    assert problem.sources == make().sources


def test_right_products_pass_and_wrong_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small_product(16)
    launch = asdict(GemmConfig(16, 16, 64, 4, 2))
    assert problem.error(launch) < problem.tolerance
    assert len(problem.weights) > 1
    assert not torch.equal(problem.weights[0], problem.weights[1])
    from backbench.backends.triton import gemm

    multiply = gemm.multiply
    monkeypatch.setattr(gemm, "multiply", lambda *given, **more: 1.02 * multiply(*given, **more))
    assert problem.error(launch) > problem.tolerance


@pytest.mark.parametrize("kind", ATTENTION_BUCKETS)
def test_right_attention_passes_and_wrong_does_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small_attention(kind)
    launch = problem.baseline()
    assert launch.keys().isdisjoint(RULED)
    assert problem.error(launch) < problem.tolerance

    class Broken:
        """Forgets the last sequence."""

        def __init__(self, runner: Any) -> None:
            self.spec, self.read, self._run = runner.spec, runner.read, runner.run

        def run(self, q: Any, cache: Any, batch: Any, out: Any) -> None:
            self._run(q, cache, batch, out)
            out[batch.num_tokens // batch.num_seqs :] = 0

    made = problem.runner(launch)
    monkeypatch.setattr(problem, "runner", lambda config: Broken(made))
    assert problem.error(launch) > problem.tolerance


def test_products_are_timed_on_rotating_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequence[Any]] = []

    def timer(calls: Sequence[Any], replays: int) -> tuple[float, float]:
        seen.append(calls)
        for call in calls[:2]:
            call()
        return 5.0, 0.1

    monkeypatch.setattr(gemm_tune, "graph_time_us", timer)
    problem = small_product()
    assert problem.times_us(None) == [5.0]
    assert problem.times_us(asdict(GemmConfig(0, 4, 64, 4, 1))) == [5.0]
    for calls in seen:
        assert len(calls) * problem.weight_bytes >= problem.read_bytes
        assert len({call.args[-1].data_ptr() for call in calls}) == len(problem.weights)


def launched_tile(call: Any) -> float:
    """Outputs a program of the timed call computes; 9 for the library's."""
    config = call.args[0]
    return float(config["block_n"]) if config else 9.0


def test_more_rows_try_the_library_in_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small_product(96)
    assert list(problem.candidates()) == [asdict(ZeroBias())]
    assert problem.error(asdict(ZeroBias())) < problem.tolerance
    biases = []

    def timer(calls: Sequence[Any], replays: int) -> tuple[float, float]:
        calls[0]()
        return (10.0, 0.0) if biases[-1] is None else (8.0, 0.0)

    linear = torch.nn.functional.linear

    def spy(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        biases.append(bias)
        return linear(x, weight, bias)

    monkeypatch.setattr(gemm_tune, "graph_time_us", timer)
    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    found = sweep(problem)
    assert found.entry.config == {"zero_bias": True}
    assert biases[-1] is not None
    assert int(biases[-1].abs().sum()) == 0


def test_a_whole_sweep_with_a_fake_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles are "fast"; the interpreter checks each candidate that is possible here."""
    monkeypatch.setattr(
        configs,
        "gemm_launches",
        lambda size, vendor: [GemmConfig(0, n, 64, 4, 1) for n in (8, 4, 2)] + [GemmConfig(0, 1, 7, 4, 1)],
    )
    monkeypatch.setattr(
        gemm_tune,
        "graph_time_us",
        lambda calls, replays: (launched_tile(calls[0]), 0.0),
    )
    found = sweep(small_product())
    assert found.entry.config == asdict(GemmConfig(0, 2, 64, 4, 1))
    assert found.entry.bucket == "m1 n48 k64"
    assert found.refused == ()
    assert found.tried == 4, "the library and three launches; a tile of 7 does not divide 64"


def test_attention_is_timed_on_rotating_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[torch.Tensor] = []

    def timer(calls: Sequence[Any], replays: int) -> tuple[float, float]:
        tables.extend(call.args[2].block_table for call in calls)
        return 7.0, 0.1

    monkeypatch.setattr(tune, "graph_time_us", timer)
    monkeypatch.setattr(tune, "MAX_CALLS", 2)
    problem = small_attention("decode")
    problem.shapes = ((1, 40), (2, 40))
    assert problem.times_us(problem.baseline()) == [7.0, 7.0]
    assert not torch.equal(tables[0], tables[1])


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_attention_over_an_int8_cache_is_a_problem_with_scales(kind: str) -> None:
    spec = replace(SMALL, kv_dtype=torch.int8)
    problem = AttentionProblem(spec, kind, HERE, ((2, 40),))
    assert problem.dtype == "float32 on int8"
    assert problem.error(problem.baseline()) < problem.tolerance
    cache = problem.pool.cache(spec.block_size)
    assert cache.k_scale.shape == cache.k.shape[:3] and not torch.equal(cache.k_scale, cache.v_scale)
    cache.v_scale.mul_(1.1)
    kept = problem.pool.cache(spec.block_size)
    assert torch.equal(kept.v_scale, cache.v_scale), "every block size is a view of one pool"


def test_unequal_sequences_are_checked_at_their_own_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "graph_time_us", lambda calls, replays: (7.0, 0.1))
    problem = small_attention("decode")
    runner = problem.runner({})
    pool = tune.Pool(SMALL, 256, 3, HERE.torch_device)
    assert tune.measure(pool, runner, [30, 100, 7], 1) == (7.0, 0.1)
    (batch,) = tune.batches(pool, [30, 100, 7], 1, SMALL.block_size, 1)
    assert batch.seq_lens.tolist() == [30, 100, 7]
    assert batch.block_table.shape == (3, 7)


@pytest.mark.parametrize("device", [H200, MI300], ids=["sm90", "gfx942"])
def test_candidates_suit_the_device(device: Device) -> None:
    for size in KERNEL_BUCKETS:
        launches = list(gemm_launches(size, device.vendor))
        assert launches
        assert len(set(launches)) == len(launches)
        assert all((launch.block_m == 0) == (size == 1) or launch.block_m >= size for launch in launches)
        assert device.vendor == "nvidia" or not any(launch.lines for launch in launches)
    for kind, launches in (
        ("decode", list(decode_launches())),
        ("prefill", list(prefill_launches(device, SPEC))),
    ):
        written = written_attention(device, SPEC, kind)
        assert launches
        for launch in launches:
            assert set(written) - set(RULED) <= set(launch), "an entry leaves nothing else to the rule"
            assert device.vendor == "nvidia" or "maxnreg" not in launch
    assert all(not launch["DESCRIPTOR"] for launch in prefill_launches(H200, replace(SPEC, block_size=16)))


@pytest.mark.parametrize("kind", ATTENTION_BUCKETS)
def test_representative_shapes_belong_to_their_kind(kind: str) -> None:
    problem = AttentionProblem.of(replace(SPEC, window=512, softcap=30.0), kind, H200)
    assert problem.spec.window is None
    assert problem.spec.softcap is None
    for sequences, length in problem.shapes:
        assert length <= problem.spec.max_len
        assert sequences <= problem.spec.max_seqs
        if kind != "prefill":
            assert (sequences <= 132 // 8) == (kind == "decode_small")


def test_a_quantized_product_stands_beside_the_dense_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The library's and ours, each timed once for all schemes."""
    timed = []

    def dense_timer(calls: Any, replays: int) -> tuple[float, float]:
        timed.append(calls[0].args[-1].shape)
        return 12.0 + len(timed), 0.1

    monkeypatch.setattr(gemm_tune, "graph_time_us", dense_timer)
    monkeypatch.setattr(quantized_tune, "graph_time_us", lambda calls, replays: (9.0, 0.1))
    monkeypatch.setattr(gemm_tune, "COLD_BYTES", 20_000)
    monkeypatch.setattr(gemm_tune, "READ_BYTES", 20_000)
    monkeypatch.setattr(quantized_tune, "READ_BYTES", 20_000)
    for scheme in (SCHEMES["int8"], SCHEMES["int4-g32"]):
        problem = QuantizedProblem(16, 48, 64, scheme, torch.bfloat16, HERE, cold_bytes=20_000)
        monkeypatch.setattr(problem, "candidates", tuple)
        entry = sweep(problem).entry
        assert (entry.us, entry.dense_us) == (9.0, 13.0)
    assert timed == [(48, 64)] * 2


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels on a GPU")
def test_real_sweeps_on_a_gpu() -> None:
    """Small shapes, compiled in two processes and timed for real: right launches and finite times."""
    layer = replace(SPEC, block_size=16)
    problems: list[Problem] = [GemmProblem(1, 512, 1024, torch.bfloat16, HERE, 2**22, 2**22)]
    problems += [AttentionProblem(layer, kind, HERE, ((2, 256),)) for kind in ATTENTION_BUCKETS]
    with parallel_compiler(2) as compile_all:
        for problem in problems:
            found = sweep(problem, compile_all)
            assert 0 < found.best_us <= found.baseline_us < float("inf")
            assert not any("relative error" in reason for reason in found.refused)
