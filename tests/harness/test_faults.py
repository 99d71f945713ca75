"""Faults of kernels and of the device end in one line; what was measured before them is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from backbench.errors import BackendError, HarnessError
from backbench.harness.cli import run_command
from backbench.harness.faults import explained
from backbench.harness.subjects.engine import EngineTarget
from backbench.reports.record import RunDirectory
from backbench.reports.verify import verify


def raised(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def launch(
    error: Exception, kernel_module: str = "backbench.backends.triton.decode_kernel"
) -> Callable[[], Any]:
    """A launch that fails as Triton's does: `run` of the kernel object raises, deep in triton.runtime."""
    module = ModuleType("triton.runtime.jit")
    code = (
        "class JITFunction:\n"
        "    def __init__(self, fn): self.fn = fn\n"
        "    def run(self, error): raise error\n"
    )
    exec(code, module.__dict__)

    def decode_kernel() -> None:
        """Stands for a kernel."""

    decode_kernel.__module__ = kernel_module
    return lambda: module.JITFunction(decode_kernel).run(error)


def error_of(module: str, name: str, text: str) -> Exception:
    return type(name, (Exception,), {"__module__": module})(text)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("module", "name", "text", "detail"),
    [
        ("triton.compiler.errors", "CompilationError", "at 3:4:\n  x = y\n      ^\nno y here", "no y here"),
        ("triton.runtime.errors", "OutOfResources", "out of resource: shared memory", "shared memory"),
        ("triton.runtime.errors", "PTXASError", "PTXAS error: registers", "registers"),
    ],
)
def test_tritons_errors_name_the_kernel_and_the_way_out(
    module: str, name: str, text: str, detail: str
) -> None:
    told = explained(raised(launch(error_of(module, name, text))))
    assert isinstance(told, BackendError)
    assert "kernel decode_kernel" in str(told)
    assert detail in str(told)
    assert "x = y" not in str(told)
    assert str(told).endswith("--attention torch.")


@pytest.mark.parametrize(
    ("module", "option"),
    [
        ("backbench.backends.triton.prefill_kernel", "--attention torch"),
        ("backbench.backends.triton.fused_write", "--attention torch"),
        ("backbench.backends.triton.gemm", "--linear torch"),
        ("backbench.backends.triton.sampling", "--ops torch"),
        ("someone.elses", "--attention, --linear or --ops torch"),
    ],
)
def test_the_advice_follows_the_kernels_operation(module: str, option: str) -> None:
    error = error_of("triton.runtime.errors", "OutOfResources", "out of resource")
    assert str(explained(raised(launch(error, module)))).endswith(f"instead: {option}.")


def test_what_the_native_compiler_raises_counts_too() -> None:
    compiler = ModuleType("triton.compiler.compiler")
    exec("def compile(): raise RuntimeError('PassManager::run failed')", compiler.__dict__)
    told = explained(raised(compiler.compile))
    assert isinstance(told, BackendError)
    assert "PassManager::run failed" in str(told)


def test_a_real_kernel_that_does_not_compile(tmp_path: Path) -> None:
    """Triton's own front end refuses it; no GPU is needed for that, but an uninterpreted process is."""
    kernel = tmp_path / "broken_kernel.py"
    kernel.write_text(
        "import triton, triton.language as tl\n"
        "@triton.jit\n"
        "def broken_kernel(x):\n"
        "    tl.store(x, tl.arange(0, 3))\n"
    )
    code = (
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import ASTSource\n"
        "import triton, broken_kernel\n"
        "from backbench.harness.faults import explained\n"
        "source = ASTSource(broken_kernel.broken_kernel, {'x': '*fp32'})\n"
        "try:\n"
        "    triton.compile(source, target=GPUTarget('cuda', 90, 32))\n"
        "except Exception as error:\n"
        "    print(type(explained(error)).__name__, explained(error))\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment | {"HOME": str(tmp_path)},
    )
    assert done.stdout.startswith("BackendError The Triton kernel"), done.stderr
    assert "power of 2" in done.stdout


def test_other_errors_stay_themselves() -> None:
    for error in (RuntimeError("a defect"), BackendError("said already"), KeyError("x")):
        assert explained(error) is error


def test_no_memory_is_for_the_user() -> None:
    assert isinstance(explained(error_of("torch", "OutOfMemoryError", "CUDA out of memory")), HarnessError)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
            " to allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4000 bytes."),
        RuntimeError("unable to mmap 4000 bytes from file <weights>: Cannot allocate memory (12)"),
    ],
    ids=["python", "system", "torch", "torch-windows", "torch-file"],
)
def test_no_host_memory_is_for_the_user(error: Exception) -> None:
    told = explained(error)
    assert isinstance(told, HarnessError)
    assert "This machine ran out of memory" in str(told)


def test_a_model_that_exceeds_the_machine_ends_in_one_line(tmp_path: Path) -> None:
    """Eight billion parameters in fp32, in an address space of 4 GB."""
    code = (
        "import resource, sys\n"
        "from backbench.harness.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 * 10**9, 4 * 10**9))\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "run", "--quiet", "-w", "batch:1x8+4", "-b", "torch"]
    done = subprocess.run(
        [*command, "-m", "shape:qwen3-8b", "-o", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: This machine ran out of memory")
    assert not (tmp_path / "run").exists()


SHORT = (
    *(
        "run",
        "-w",
        "synthetic",
        "--input-lengths",
        "fixed:4",
        "--output-lengths",
        "fixed:4",
        "--backend",
        "torch",
    ),
    *("-n", "6", "--concurrency", "1", "--warmup", "1", "--max-len", "64", "--max-step-tokens", "64"),
)


def fail_after(monkeypatch: pytest.MonkeyPatch, finished: int, fail: Callable[[], Any]) -> None:
    """Let the engine raise once `finished` measured requests have ended."""
    poll, done = EngineTarget.poll, []

    def failing(self: EngineTarget, deadline_ns: int | None) -> Any:
        if len(done) >= finished:
            fail()
        events = poll(self, deadline_ns)
        done.extend(event for event in events if event.finished and event.request_id >= 0)
        return events

    monkeypatch.setattr(EngineTarget, "poll", failing)


def run_and_fail(out: Path) -> int:
    try:
        return run_command([*SHORT, "--out", str(out)])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_a_kernel_fault_in_the_middle_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of("triton.runtime.errors", "OutOfResources", "out of resource: shared memory")
    fail_after(monkeypatch, 3, launch(error))
    assert run_and_fail(tmp_path / "run") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: The Triton kernel decode_kernel")
    directory = RunDirectory.open(tmp_path / "run")
    record = directory.read_record()
    assert record.run["status"] == "failed"
    assert "decode_kernel" in record.run["error"]
    assert record.metrics["counts"]["completed"] == 3
    assert len(directory.read_steps()) > 3
    assert record.validity[0].startswith("failed: BackendError")
    assert record.correctness["passed"] is None
    assert verify(directory) == []
    assert directory.report_path.exists()


def test_a_defect_keeps_it_too_and_shows_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = ZeroDivisionError("a defect")

    def fail() -> None:
        raise error

    fail_after(monkeypatch, 2, fail)
    with pytest.raises(ZeroDivisionError):
        run_and_fail(tmp_path / "run")
    directory = RunDirectory.open(tmp_path / "run")
    assert directory.read_record().run["error"] == "ZeroDivisionError: a defect"
    assert directory.read_record().metrics["counts"]["completed"] == 2
    assert verify(directory) == []


def test_a_fault_before_the_first_token_is_a_record_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = error_of("torch", "OutOfMemoryError", "CUDA out of memory")

    def fail() -> None:
        raise error

    fail_after(monkeypatch, 0, fail)
    assert run_and_fail(tmp_path / "run") == 2
    directory = RunDirectory.open(tmp_path / "run")
    assert "--max-seqs" in directory.read_record().run["error"]
    assert verify(directory) == []


def test_a_kernel_that_fails_while_warming_up_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of("triton.compiler.errors", "CompilationError", "at 1:1: no")
    monkeypatch.setattr("backbench.harness.subjects.engine.warm_up", lambda *_: launch(error)())
    assert run_and_fail(tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: The Triton kernel decode_kernel")
    assert not (tmp_path / "run").exists()


def test_a_fault_in_the_check_of_results_keeps_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = error_of("triton.runtime.errors", "OutOfResources", "out of resource: shared memory")
    monkeypatch.setattr("backbench.harness.correctness.check", lambda *_: launch(error)())
    assert run_and_fail(tmp_path / "run") == 2
    directory = RunDirectory.open(tmp_path / "run")
    record = directory.read_record()
    assert record.metrics["counts"]["completed"] == 6
    assert record.correctness["passed"] is None
    assert verify(directory) == []


def test_every_command_explains_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of("triton.runtime.errors", "PTXASError", "PTXAS error: registers")
    monkeypatch.setattr("backbench.harness.kernels.measure.measure", lambda *_, **__: launch(error)())
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(run_command(["kernels", "--shapes", "1q1s64", "--model", "tiny"]))
    assert stop.value.code == 2
    assert "The Triton kernel decode_kernel" in capsys.readouterr().err
