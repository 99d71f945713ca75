"""Provenance names the machine's kind, never the machine or its owner."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest

from backbench.backends.interface.device import cpu
from backbench.harness import provenance


def test_redaction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node17")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    text = "bench run -o /home/ada/runs on node17 with GPU-12345678-1234-1234-1234-123456789abc /Users/bob/x"
    found = provenance.redact(text)
    assert found == "bench run -o ~/runs on <host> with <serial> ~/x"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/srv/people/ada/models/m", "~/models/m"),
        ("/srv/people/ada", "~"),
        ("/srv/people/adamant/m", "/srv/people/adamant/m"),
        ("/mnt/c/Users/bob/x", "/mnt/c~/x"),
        (r"C:\Users\bob\models", r"~\models"),
        ("c:/Users/bob/models", "~/models"),
        ("'/home/eve' and /home/eve/m", "'~' and ~/m"),
        ("/scratch/ada/runs by ada", "/scratch/<user>/runs by <user>"),
        ("ada-kernels and adam", "ada-kernels and adam"),
        ("lovelace", "<user>"),
        ("root /root", "root /root"),
    ],
)
def test_homes_and_users_are_left_out(monkeypatch: pytest.MonkeyPatch, text: str, found: str) -> None:
    monkeypatch.setenv("HOME", "/srv/people/ada/")
    monkeypatch.setenv("USER", "ada")
    monkeypatch.setenv("LOGNAME", "root")
    monkeypatch.setattr("getpass.getuser", lambda: "lovelace")
    assert provenance.redact(text) == found


def test_an_account_without_home_and_name_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    for name in ("HOME", "USER", "LOGNAME", "USERNAME", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.setattr("getpass.getuser", nameless)
    assert provenance.redact("/home/eve/m") == "~/m"


def test_every_text_of_a_section_is_redacted() -> None:
    section = {"name": "/home/eve/m", "parts": ["/Users/bob/x", 3, None], "deep": {"file": "/home/eve/t"}}
    assert provenance.redacted(section) == {"name": "~/m", "parts": ["~/x", 3, None], "deep": {"file": "~/t"}}


def test_only_known_variables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that look like a library's may hold a token."""
    for name in ("TORCH_API_TOKEN", "CUDA_SECRET", "TRITON_PASSWORD", "HF_TOKEN", "MKL_LICENSE_KEY"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/home/eve/.triton")
    found = provenance.software()["environment"]
    assert "hunter2" not in json.dumps(found)
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["TRITON_CACHE_DIR"] == "~/.triton"


def test_a_word_that_holds_the_host_name_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu")
    assert provenance.redact("gpu-kernels on gpu") == "gpu-kernels on <host>"


def test_system_and_software_are_json_without_the_host_name() -> None:
    found = {"system": provenance.system(cpu()), "software": provenance.software()}
    text = json.dumps(found)
    assert found["system"]["device"]["vendor"] == "cpu"
    assert found["software"]["packages"]["torch"]
    host = socket.gethostname()
    assert host == "localhost" or f'"{host}"' not in text


def test_the_commit_of_the_checkout_is_known() -> None:
    """The room is reached through a link, and the checkout lies beside the room itself."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("no checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    assert provenance.software()["git_sha"] == head.stdout.strip()


def test_no_git_outside_a_checkout(tmp_path: Path) -> None:
    assert provenance.git_state(tmp_path / "site-packages" / "harness") == (None, None)


def test_source_hash_follows_the_backend() -> None:
    from backbench.backends.registry import load

    torch, sdpa = load("torch"), load("sdpa")
    assert provenance.source_hash(torch.attention) == provenance.source_hash(torch.linear)
    assert provenance.source_hash(torch.attention) != provenance.source_hash(sdpa.attention)


def test_the_hash_of_a_mix_follows_both_sides() -> None:
    from backbench.backends.registry import load

    names = ("prefill=torch,decode=torch", "prefill=sdpa,decode=torch", "prefill=torch,decode=sdpa")
    hashes = {provenance.source_hash(load(name).attention) for name in names}
    assert len(hashes) == len(names)
