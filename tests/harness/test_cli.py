"""The command line: help is quick, errors are one line, exit codes say what happened."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from backbench.harness.cli import COMMANDS, run_command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `bench` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = run_command([str(each) for each in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def refused(bench: Run, *arguments: object) -> str:
    """The one error line of a command that must end with 2."""
    code, _, err = bench(*arguments)
    lines = err.strip().splitlines()
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 300
    assert lines[0].isprintable()
    assert "Traceback" not in err
    return lines[0]


def run_arguments(tmp_path: Path, **changes: object) -> list[object]:
    given: dict[str, object] = {"workload": "sharegpt", "backend": "torch", "out": tmp_path / "run"} | changes
    arguments: list[object] = ["run"]
    for name, value in given.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    return arguments


def test_help_is_quick() -> None:
    """Nothing heavy may be imported for help: below half a second beside an idle interpreter's start."""

    def seconds(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        return time.perf_counter() - start

    code = "from backbench.harness.cli import run_command; run_command(['--help'])"
    assert min(seconds(code) - seconds("pass") for _ in range(3)) < 0.5


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from backbench.harness.cli import run_command\n"
        "run_command(['--help']); run_command(['run', '--help'])\n"
        "heavy = {'torch', 'pandas', 'numpy', 'transformers', 'plotly'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


JSON_ANYWAY = {"export", "schema"}
"""Commands that write nothing but JSON."""
SERVING = {"null-server", "serve"}
"""Commands that print an address and serve."""


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help_and_json(bench: Run, command: str) -> None:
    code, out, _ = bench(command, "--help")
    assert code == 0
    assert ("--json" in out) == (command not in JSON_ANYWAY | SERVING)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workload": "sharegtp"}, ["sharegtp", "sharegpt"]),
        ({"backend": "tritn"}, ["tritn", "triton"]),
        ({"model": "tinny"}, ["tinny", "tiny"]),
        ({"model": "shape:qwen3-9b"}, ["qwen3-9b", "qwen3-8b"]),
        ({"attention": "flsh"}, ["flsh"]),
        ({"rate": 0}, ["--rate", "0"]),
        ({"rate": -3}, ["--rate", "-3"]),
        ({"concurrency": 0}, ["--concurrency"]),
        ({"num_requests": 0}, ["--num-requests"]),
        ({"num_requests": "many"}, ["--num-requests", "many"]),
        ({"rate": 3, "concurrency": 4}, ["--rate", "--concurrency"]),
        ({"slo": "p99=3"}, ["--slo"]),
        ({"repeat": 0}, ["--repeat"]),
        ({"warmup": -1}, ["--warmup"]),
        ({"dataset": "/nowhere/sharegpt.json"}, ["/nowhere/sharegpt.json"]),
        ({"workload": "/nowhere/trace.jsonl"}, ["/nowhere/trace.jsonl"]),
        ({"max_len": 10**7}, ["max_len"]),
        ({"max_seqs": 0}, ["--max-seqs"]),
        ({"workload": "batch:2x5000+10"}, ["5000", "context"]),
        ({"workload": "batch:2x100+10", "num_blocks": 3}, ["blocks", "--num-blocks"]),
        ({"dtype": "float8"}, ["--dtype", "float8"]),
        ({"concurrency": 2147483648}, ["--concurrency", "65,536"]),
        ({"warmup": 999999999}, ["--warmup"]),
        ({"max_seqs": 10**9}, ["--max-seqs"]),
        ({"num_blocks": 10**12}, ["--num-blocks"]),
        ({"max_step_tokens": 10**9}, ["--max-step-tokens"]),
        ({"num_requests": 99999999999}, ["--num-requests"]),
        ({"temperature": 1e308}, ["--temperature"]),
        ({"temperature": 1e-38}, ["--temperature", "greedy"]),
        ({"kv_memory_fraction": 1e-12}, ["--kv-memory-fraction"]),
        ({"rate": "nan"}, ["--rate", "nan"]),
        ({"slo": ""}, ["--slo"]),
        ({"slo": "ttft=1,ttft=2"}, ["--slo", "twice"]),
        ({"cv": 2}, ["--cv", "--arrival"]),
        ({"device": "tpu"}, ["tpu", "cuda:N"]),
        ({"config": "/nowhere/run.toml"}, ["--config", "/nowhere/run.toml"]),
        ({"workload": "w" * 5000}, ["--workload"]),
        ({"model": "m" * 4000}, ["mmm", "..."]),
        ({"backend": "b" * 4000}, ["bbb", "..."]),
        ({"arrival": "a\x1b[31m" * 90, "rate": 3}, ["\\x1b[31m"]),
    ],
)
def test_bad_input_is_one_line(
    bench: Run, tmp_path: Path, changes: dict[str, object], words: list[str]
) -> None:
    line = refused(bench, *run_arguments(tmp_path, **changes))
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"


def test_malformed_data_set_names_file_and_place(bench: Run, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('[{"id": "a", "conversations": [{"from": "human"}]}]')
    line = refused(bench, *run_arguments(tmp_path, dataset=path))
    assert "broken.json" in line


@pytest.mark.parametrize(
    ("change", "word"), [("missing", "model.norm.weight"), ("shape", "model.norm.weight")]
)
def test_a_broken_checkpoint_is_one_line(bench: Run, tmp_path: Path, change: str, word: str) -> None:
    from safetensors.torch import load_file, save_file

    from backbench.engine.models.checkpoint import BUNDLED

    model = tmp_path / "model"
    shutil.copytree(BUNDLED / "tiny-draft", model)
    tensors = load_file(model / "model.safetensors")
    norm = tensors.pop(word)
    if change == "shape":
        tensors[word] = norm[:-1].clone()
    save_file(tensors, model / "model.safetensors")
    assert word in refused(bench, *run_arguments(tmp_path, model=model))


def test_an_occupied_directory_is_refused_before_a_model_loads(bench: Run, tmp_path: Path) -> None:
    occupied = tmp_path / "run"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("x")
    start = time.perf_counter()
    line = refused(bench, *run_arguments(tmp_path, model="shape:llama-3.1-70b"))
    assert "not empty" in line
    assert time.perf_counter() - start < 20
    assert (occupied / "thesis.txt").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_directory_is_refused(bench: Run, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "permission" in refused(bench, *run_arguments(tmp_path, out=locked / "run")).lower()


def test_a_directory_below_a_file_is_refused(bench: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "--out" in refused(bench, *run_arguments(tmp_path, out=tmp_path / "file" / "run"))


def test_a_name_too_long_for_a_directory_is_refused(bench: Run, tmp_path: Path) -> None:
    assert "name too long" in refused(bench, *run_arguments(tmp_path, out=tmp_path / ("o" * 300)))


@pytest.mark.parametrize(
    "arguments",
    [
        ["portability", "--only", "nosuch"],
        ["portability", "--targets", ""],
        ["kernels", "--kinds", "nosuch"],
        ["kernels", "--shapes", ""],
        ["kernels", "--seconds", "nan"],
        ["kernels", "--tokens", "99999999999"],
        ["kernels", "--dtype", "fp8"],
        ["backends", "--check", "nosuch"],
        ["backends", "--device", "nosuch"],
        ["backends", "--full"],
        ["tune", "-m", "tiny", "--operations", ","],
        ["tune", "-m", "tiny", "--dtype", "fp32"],
        ["perplexity", "--device", "nosuch"],
        ["perplexity", "--dtype", "fp8"],
    ],
    ids=" ".join,
)
def test_filters_that_match_nothing_are_refused(bench: Run, arguments: list[str]) -> None:
    refused(bench, *arguments)


@pytest.mark.parametrize("command", ["run", "kernels", "perplexity", "tune"])
def test_flags_of_the_subject_are_the_same_everywhere(command: str) -> None:
    from backbench.harness.cli import bench as group

    found = group.get_command(None, command)  # type: ignore[arg-type]
    assert found is not None
    flags = {tuple(each.opts) for each in found.params}
    assert flags >= {
        ("-b", "--backend"),
        ("-m", "--model"),
        ("--dtype",),
        ("--device",),
        ("--block-size",),
    } - ({("--block-size",)} if command == "perplexity" else set())


@pytest.mark.parametrize(
    "arguments",
    [["shwo"], ["run"], ["run", "--nonsense"], ["compare", "/nowhere"], ["show", "/nowhere"], ["verify"]],
)
def test_usage_errors_are_one_line(bench: Run, arguments: list[str]) -> None:
    refused(bench, *arguments)


def test_an_unknown_command_names_the_nearest(bench: Run) -> None:
    assert "verify" in refused(bench, "verfy")


def test_debug_shows_the_trace(bench: Run) -> None:
    code, _, err = bench("--debug", "show", "/nowhere")
    assert code == 2
    assert "Traceback" in err


@pytest.mark.parametrize(
    ("command", "key"), [("workloads", "sharegpt"), ("models", "tiny"), ("backends", "torch")]
)
def test_catalogues(bench: Run, command: str, key: str) -> None:
    code, out, _ = bench(command)
    assert code == 0
    assert key in out
    code, out, _ = bench(command, "--json")
    found = json.loads(out)
    entries = found["backends"] if command == "backends" else found
    assert key in {entry["name"] for entry in entries}


def test_env(bench: Run) -> None:
    code, out, _ = bench("env", "--json")
    assert code == 0
    assert json.loads(out)["software"]["packages"]["torch"]


BENCH = "import sys; from backbench.harness.cli import main; main(sys.argv[1:])"
SHORT_RUN = ("run", "--quiet", "-w", "batch:1x8+2", "-b", "torch", "--warmup", "0", "-o")


def shell(
    command: str, folder: Path, *arguments: object, code: str = BENCH
) -> subprocess.CompletedProcess[str]:
    """`command` in a shell, where "$@" is `bench` with the arguments."""
    return subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_whole_run_ends_with_0_where_stdout_is_full(tmp_path: Path) -> None:
    done = shell('"$@" > /dev/full', tmp_path, *SHORT_RUN, "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "cannot print: No space left on device; the record is in out\n"
    assert (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("command", "code", "lines"),
    [
        ('"$@" > /dev/full', 2, 1),
        ('"$@" >&-', 0, 0),
        ('"$@" 2>&-', 0, 0),
        ('"$@" <&- >&- 2>&-', 0, 0),
        ('set -o pipefail; "$@" --json | head -c 1', 0, 0),
        ('mkdir gone; cd gone; rmdir ../gone; "$@"', 2, 1),
    ],
)
def test_whatever_stdout_is_there_is_no_stack_trace(
    tmp_path: Path, command: str, code: int, lines: int
) -> None:
    done = shell(command, tmp_path, "workloads")
    assert done.returncode == code, done.stderr
    told = [line for line in done.stderr.splitlines() if "getcwd" not in line]  # the shell's own complaint
    assert len(told) == lines, done.stderr


def test_a_command_that_fails_says_so_to_a_full_stderr_too(tmp_path: Path) -> None:
    assert shell('"$@" 2> /dev/full', tmp_path, "show", "/nowhere").returncode == 2


def test_an_account_without_a_home(tmp_path: Path) -> None:
    homeless = (
        "import os, pwd\n"
        "os.environ.pop('HOME', None)\n"
        "def nobody(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\n"
        "pwd.getpwuid = nobody\n" + BENCH
    )
    done = shell('"$@"', tmp_path, *SHORT_RUN, "out", code=homeless)
    assert done.returncode == 0, done.stderr
    done = shell('"$@"', tmp_path, "run", "-w", "sharegpt", "-b", "torch", "-m", "~/model", code=homeless)
    assert done.returncode == 2
    assert "~/model" in done.stderr and len(done.stderr.splitlines()) == 1


def test_shell_completion(tmp_path: Path) -> None:
    words = {"_BENCH_COMPLETE": "bash_complete", "COMP_WORDS": "bench run --dty", "COMP_CWORD": "2"}
    setting = " ".join(f"{name}='{value}'" for name, value in words.items())
    assert shell(f'{setting} "$@"', tmp_path).stdout == "plain,--dtype\n"
