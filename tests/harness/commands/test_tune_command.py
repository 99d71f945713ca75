"""`bench tune`: what it asks for, what it writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backbench.backends.interface import AttentionSpec, Backend, Config, Device, Problem, Scheme, Tuner
from backbench.backends.quantization import SCHEMES
from backbench.backends.tuning import table as tuning
from backbench.backends.tuning.table import Entry, Table
from backbench.harness.cli import run_command

H200 = Device("nvidia", "sm90", "H200", 132, 2**37, 227 * 1024, torch.device("cpu"))


class FakeProblem(Problem):
    """A tile of 2 takes half the library's time; one of 1 is faster and wrong."""

    dtype = "bfloat16"
    sources = "0123456789abcdef"
    tolerance = 1e-2

    def __init__(self, operation: str, bucket: str, stop: bool = False) -> None:
        self.operation = operation
        self.bucket = bucket
        self.stop = stop

    def baseline(self) -> None:
        return None

    def candidates(self) -> Sequence[Config]:
        return [{"tile": 1}, {"tile": 2}]

    def error(self, config: Config) -> float:
        return 1.0 if config["tile"] == 1 else 0.0

    def times_us(self, config: Config | None) -> Sequence[float]:
        if self.stop:
            raise KeyboardInterrupt
        return [10.0 if config is None else 2.5 * config["tile"]]

    def compile(self, config: Config) -> None:
        pass


class FakeTuner(Tuner):
    """Remembers what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: dict[str, Any] = {}
        self.found: list[Problem] = [FakeProblem("gemm", "m1 n64 k32"), FakeProblem("gemm", "m16 n64 k32")]

    def file(self, device: Device) -> Path:
        return self.folder / "own.json"

    def products(
        self,
        weights: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: Device,
        schemes: Sequence[Scheme] = (Scheme(),),
    ) -> Iterator[Problem]:
        self.asked["products"] = [(n, k, dtype) for n, k in weights]
        self.asked["schemes"] = list(schemes)
        yield from self.found

    def attention(self, specs: Sequence[AttentionSpec], device: Device) -> Iterator[Problem]:
        self.asked["specs"] = list(specs)
        yield from ()


@pytest.fixture
def tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTuner:
    """A backend with a fake tuner, on a GPU that is not there."""
    fake = FakeTuner(tmp_path)
    monkeypatch.setattr("backbench.backends.registry.load", lambda name: Backend(name, "", tuner=fake))
    monkeypatch.setattr("backbench.backends.interface.device.detect", lambda prefer: H200)

    @contextmanager
    def nothing(workers: int) -> Iterator[None]:
        yield None

    monkeypatch.setattr("backbench.backends.tuning.search.parallel_compiler", nothing)
    return fake


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = run_command(["tune", *map(str, arguments)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_best_right_launch_is_written_and_shown(tuner: FakeTuner, bench: Any) -> None:
    code, out, err = bench("-m", "shape:qwen3-8b")
    assert code == 0, err
    table = tuning.read(tuner.folder / "own.json", "sm90-132")
    assert {key[1]: entry.config for key, entry in table.entries.items()} == {
        "m1 n64 k32": {"tile": 2},
        "m16 n64 k32": {"tile": 2},
    }
    assert "2.00×" in out
    assert "tile=2" in out
    assert "tile=1: relative error 1.0e+00" in err


def test_the_findings_as_json(tuner: FakeTuner, bench: Any) -> None:
    code, out, _ = bench("-m", "shape:qwen3-8b", "--json")
    assert code == 0
    first = json.loads(out)["findings"][0]
    assert first["entry"]["config"] == {"tile": 2}
    assert (first["baseline_us"], first["best_us"]) == pytest.approx((10.0, 5.0))


def test_the_models_shapes_are_asked_for(tuner: FakeTuner, bench: Any) -> None:
    assert bench("-m", "shape:qwen3-8b", "--dtype", "fp16", "--block-size", 16, "--block-size", 64)[0] == 0
    assert (6144, 4096, torch.float16) in tuner.asked["products"]
    assert (151936, 4096, torch.float16) in tuner.asked["products"]
    assert [(spec.block_size, spec.dtype) for spec in tuner.asked["specs"]] == [
        (16, torch.float16),
        (64, torch.float16),
    ]
    for operation, kind in (("gemm", "products"), ("attention", "specs")):
        tuner.asked.clear()
        assert bench("-m", "shape:qwen3-8b", "--operations", operation)[0] == 0
        assert kind in tuner.asked
        assert {"products", "specs"} - set(tuner.asked) == {"products", "specs"} - {kind}


def test_quantized_products_and_caches_are_asked_for(tuner: FakeTuner, bench: Any) -> None:
    assert bench("-m", "shape:qwen3-8b")[0] == 0
    assert tuner.asked["schemes"] == [Scheme()]
    assert bench("-m", "shape:qwen3-8b", "--quantize", "none,fp8,nvfp4", "--kv-dtype", "fp8")[0] == 0
    assert tuner.asked["schemes"] == [Scheme(), SCHEMES["fp8"], SCHEMES["nvfp4"]]
    assert [spec.kv_dtype for spec in tuner.asked["specs"]] == [torch.float8_e4m3fn]
    assert bench("-m", "shape:qwen3-8b", "--quantize", "none,int8", "--sparsity", "2:4")[0] == 0
    assert tuner.asked["schemes"] == [Scheme(sparsity="2:4"), Scheme("int8", sparsity="2:4")]


def test_other_entries_of_the_file_stay(tuner: FakeTuner, bench: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    kept = Entry("gemm", "m1 n8 k8", "bfloat16", "0123456789abcdef", None)
    old = replace(kept, bucket="m1 n64 k32", config={"tile": 99})
    tuning.write(file, Table("sm90-132", {}).merged([kept, old]))
    assert bench("-m", "shape:qwen3-8b", "--out", file)[0] == 0
    entries = tuning.read(file, "sm90-132").entries
    assert entries[kept.key] == kept
    assert entries[old.key].config == {"tile": 2}
    assert len(entries) == 3
    assert not (tmp_path / "own.json").exists()


def test_ctrl_c_keeps_what_was_found(tuner: FakeTuner, bench: Any) -> None:
    tuner.found = [FakeProblem("gemm", "m1 n64 k32"), FakeProblem("gemm", "m16 n64 k32", stop=True)]
    assert bench("-m", "shape:qwen3-8b")[0] == 130
    assert len(tuning.read(tuner.folder / "own.json", "sm90-132").entries) == 1


def test_another_devices_file_is_refused_before_anything_is_measured(
    tuner: FakeTuner, bench: Any, tmp_path: Path
) -> None:
    file = tmp_path / "other.json"
    tuning.write(file, Table("gfx942-304", {}))
    code, _, err = bench("-m", "shape:qwen3-8b", "--out", file)
    assert code == 2
    assert "gfx942-304" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(bench: Any) -> None:
    code, _, err = bench("--backend", "triton", "-m", "shape:qwen3-8b")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "needs an NVIDIA or AMD GPU" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-b", "sdpa", "-m", "tiny"), "nothing to tune; tune triton"),
        (("-b", "tritn", "-m", "tiny"), "triton"),
        (("-m", "tiny", "--operations", "gem"), "Cannot tune gem"),
    ],
)
def test_mistakes_are_one_line(bench: Any, arguments: tuple[str, ...], words: str) -> None:
    code, _, err = bench(*arguments)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert words in err


def test_one_of_several_devices_has_shapes_of_its_own(tuner: FakeTuner, bench: Any) -> None:
    assert bench("-m", "shape:qwen3-8b", "--tp", 2)[0] == 0
    assert [(n, k) for n, k, _ in tuner.asked["products"]] == [
        *((3072, 4096), (4096, 2048), (12288, 4096), (4096, 6144), (75_968, 4096)),
    ]
    (spec,) = tuner.asked["specs"]
    assert (spec.q_heads, spec.kv_heads) == (16, 4)
