"""What is compiled ahead of time is what runs launch, and covers what it says."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from backbench.backends.aot.baseline import read_baseline
from backbench.backends.aot.compile import SHARED_LIMIT_BYTES, TARGETS, signature
from backbench.backends.interface import Device
from backbench.backends.triton import KERNELS, aot_cases, configs, launch
from backbench.backends.triton.aot_cases import COMMON, UNITS, WHOLE_RUN, cases, imagined, other_layers
from backbench.backends.triton.attention import TritonAttention
from backbench.backends.triton.launch import Launch, place_of
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.request import SamplingParams

HOPPER = Device("nvidia", "sm90", "H100", UNITS, 2**37, 227 * 1024, torch.device("cpu"))
"""Its tensors are on the CPU: nothing that is launched runs."""


def described(launched: Any) -> Hashable:
    """What chooses the binary of a launch: kernel, argument types, constants, options."""
    parts = (signature(launched), launched.constants, launched.options)
    return launched.kernel.__name__, *(tuple(sorted(part.items())) for part in parts)


def compiled(target: str = WHOLE_RUN) -> set[Hashable]:
    """Every launch that the check compiles for a target."""
    return {described(case.launch(target)) for case in cases() if target in (case.targets or TARGETS)}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Everything launched meanwhile, on an imagined Hopper GPU. Nothing runs: results are arbitrary."""
    found: list[Launch] = []

    def record(launched: Launch) -> None:
        found.append(launched)
        for argument in launched.arguments:
            if torch.is_tensor(argument) and argument.dtype == torch.int64:
                argument.zero_()  # drawn tokens stay inside the vocabulary

    def no_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x.new_empty(x.shape[0], weight.shape[0])

    monkeypatch.setattr(Launch, "start", record)
    monkeypatch.setattr(launch, "_facts", lambda device: (HOPPER.arch, HOPPER.units))
    monkeypatch.setattr(torch.nn.functional, "linear", no_product)
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor, *given, **named: tensor)
    place_of.cache_clear()
    yield found
    place_of.cache_clear()


def open_engine() -> Engine:
    """Two layers of Qwen3 8B (the last one needs only the last tokens) at the defaults of a GPU.

    Its weights are never written, so take no memory.
    """
    source = find_model("shape:qwen3-8b")
    source.config = replace(source.config, num_layers=2, windows=source.config.windows[:2])
    config = EngineConfig(block_size=64)
    return Engine.open(source, backend="triton", device=HOPPER, dtype=torch.bfloat16, config=config)


def test_what_a_run_launches_is_compiled(launches: list[Launch]) -> None:
    """Prompts and decodes, alone and up to 256 at once, greedy, random and filtered."""
    engine = open_engine()
    kinds = [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}]
    rng = random.Random(0)
    served = 0
    for sequences, length in ((1, 900), (1, 3), (7, 5), (20, 40), (90, 8), (256, 4), (3, 3000)):
        for kind in kinds:
            for _ in range(sequences):
                prompt = [rng.randrange(1000) for _ in range(length)]
                engine.add_request(str(served), prompt, SamplingParams(3, ignore_eos=True, **kind))
                served += 1
            while engine.has_work:
                engine.step()
    known = compiled()
    missing = {described(launched) for launched in launches} - known
    assert not missing, f"{len(missing)} launches are not compiled, such as {next(iter(missing))}"
    kernels = {launched.kernel.__name__ for launched in launches}
    assert kernels >= {
        "decode_kernel", "prefill_kernel", "rotate_and_write_kernel", "rms_norm_kernel", "gate_kernel",
        "embed_kernel", "matrix_vector_kernel", "split_gemm_kernel", "greedy_chunk_kernel",
        "random_chunk_kernel", "best_of_row_kernel", "group_maxima_kernel", "candidate_threshold_kernel",
        "row_threshold_kernel",
    }  # fmt: skip
    prefill = next(each for each in launches if each.kernel.__name__ == "prefill_kernel")
    assert prefill.constants["DESCRIPTOR"] and prefill.constants["BLOCK_SIZE"] == 64, "Hopper's own way"
    decodes = [each.constants["ROWS"] for each in launches if each.kernel.__name__ == "decode_kernel"]
    assert set(decodes) == {16, 256}, "few and many sequences"


def test_every_number_of_rows_is_compiled() -> None:
    known = compiled()
    place = launch.Place.of(imagined(WHOLE_RUN))
    for build in aot_cases.OPERATIONS.values():
        for rows in (*range(1, 258), 512, 513, 8192):
            assert described(build(place, torch.bfloat16, rows)) in known
    for n, k in aot_cases.WEIGHTS:
        for rows in range(1, 65):
            config = configs.choose(WHOLE_RUN, UNITS, rows, n, k, torch.bfloat16)
            if isinstance(config, configs.GemmConfig):
                built = aot_cases._product(config, torch.bfloat16, rows, n, k, place)
                assert described(built) in known


def test_every_target_meets_every_geometry_and_every_two_meet() -> None:
    kinds: list[Callable[[Any], Hashable]] = [
        lambda layer: layer.block_size,
        lambda layer: layer.head_dim,
        lambda layer: layer.group,
        lambda layer: (layer.dtype, layer.kv_dtype),
    ]
    expected: list[set[Any]] = [{16, 64, 128}, {64, 96, 128, 256}, {1, 4, 8}]
    everywhere = []
    for target in TARGETS:
        layers = [COMMON, *other_layers(target)]
        for kind, values in zip(kinds, expected, strict=False):
            assert {kind(layer) for layer in layers} == values, target
        assert len({kinds[-1](layer) for layer in layers}) == 5
        everywhere += list(other_layers(target))
    for one, other in itertools.combinations(kinds, 2):
        pairs = {(one(layer), other(layer)) for layer in everywhere}
        assert len(pairs) == (12 if other is kinds[-1] else 9), "three values of each, four kinds of dtypes"


@pytest.mark.parametrize("bucket", ["decode", "prefill"])
def test_caches_beyond_32_bits_are_compiled_too(bucket: str) -> None:
    """Their kernels did not compile: one function returned int64 or int32."""
    for target in TARGETS:
        wide = [layer for layer in other_layers(target) if layer.wide]
        assert {layer.kv_dtype for layer in wide} == {torch.float8_e4m3fn, torch.int8}
        for layer in wide:
            launched = aot_cases.attention(bucket, layer, target)
            assert launched.constants["WIDE"]
            assert launched.constants["SCALED"] == (layer.kv_dtype == torch.int8)


def test_cases_have_names_of_their_own() -> None:
    for target in TARGETS:
        names = [(c.kernel, c.variant) for c in cases() if target in (c.targets or TARGETS)]
        assert len(set(names)) == len(names)


def test_a_turing_gpu_is_told_what_its_shared_memory_lacks() -> None:
    """T4: 64 KiB a block, where prefill's compiled kernel takes 81,920 bytes."""
    turing = Device("nvidia", "sm75", "T4", 40, 2**34, 64 * 1024, torch.device("cpu"))
    half = replace(COMMON, dtype=torch.float16, kv_dtype=torch.float16)
    (reason,) = TritonAttention().refusals(half.spec, turing)
    assert reason == "prefill needs 80 KiB of shared memory a block, sm75 has 64"


def test_what_a_kernel_is_said_to_need_is_what_it_takes() -> None:
    """The compiled kernels take at least what `refusals` compares, and the check runs on every target."""
    rows = read_baseline(KERNELS.baseline)["rows"]
    seen = set()
    for target in TARGETS:
        for layer in (COMMON, *other_layers(target)):
            for bucket in configs.ATTENTION_BUCKETS:
                row = rows.get(f"attention/{bucket} {layer.name} {target}")
                if row is None or row["refused"]:
                    continue
                needed = configs.shared_bytes_needed(imagined(target), layer.spec, bucket)
                assert needed <= row["shared_bytes"] <= SHARED_LIMIT_BYTES[target]
                seen.add(target)
    assert seen == set(TARGETS)
