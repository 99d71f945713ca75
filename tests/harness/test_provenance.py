"""Provenance names the machine's kind, never the machine or its owner."""

from __future__ import annotations

import json
import socket
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
