"""What leaves a text that is shared, and what stays in one that says nothing."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.reports.record.redaction import Names, Redaction, anonymous, anonymous_command, unique

OLD = Path(__file__).parents[1] / "fixtures" / "schema-1"
NOBODY = Names((), (), ())
EVE = Names(("/srv/people/eve",), ("node17", "node17.example.org"), ("eve",))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/data/x", "<path>"),
        ("/data/it's my data/x", "<path>"),
        ("~/x/y", "<path>"),
        ("see '/data/a b/c' there", "see <path> there"),
        ('see "/data/it\'s/c" there', "see <path> there"),
        ("cannot open /data/my data/x: No such file", "cannot open <path>: No such file"),
        ("kernel /usr/lib/a:b/x.so; see ~/y", "kernel <path>; see <path>"),
        (r"C:\Users\eve\x and D:/y", "<path>"),
        (r"in \\srv\share\x", "in <path>"),
        ("s3://bucket/x at 10.1.2.3", "<address> at <address>"),
        ("eve@example.org", "<address>"),
        ("02:42:ac:11:00:02 or 2001:db8:0:0:1:2:3:4 or fe80::1", "<address> or <address> or <address>"),
        ("serial number 0042-A, serial=17", "<serial>, <serial>"),
        ("GPU-12345678-1234-1234-1234-123456789abc", "<serial>"),
        ("node17 of eve", "<host> of <user>"),
        ("acme's model", "<redacted>'s model"),
    ],
)
def test_what_leaves(text: str, found: str) -> None:
    assert anonymous(text, ["ACME"], EVE) == found


@pytest.mark.parametrize(
    "text",
    [
        "723 tok/s, input/output 3/4, and/or, A / B",
        "shape:qwen3-8b at Qwen/Qwen3-8B",
        "runs/torch and tests/x.py, ./x and ../y",
        "torch 2.13.0+cpu, driver 580.126.09, 2026-11-25T17:51:54+00:00",
        "prefill=flash,decode=triton",
        "evening on node170, at::Tensor",
        "not supported at this sample size: needs 36 requests, has 24",
        "5bf5d3aa0c1b2e3d4f5a6b7c8d9e0f1a2b3c4d5e",
        "~ 3 s, ~5 %",
    ],
)
def test_what_stays(text: str) -> None:
    assert anonymous(text, (), EVE) == text


def test_every_text_of_a_stored_run_stays() -> None:
    data = json.loads((OLD / "torch" / "run.json").read_text())
    redaction = Redaction((), NOBODY)
    assert redaction.data(data) == data
    assert redaction.changed == {}


SECRET = st.text("abcdefghijklmnopqrstuvwxyz", min_size=8, max_size=12).map(lambda text: f"q{text}q")
JOINT = st.sampled_from(["", " ", "'", '"', ":", "=", ",", " x ", "-"])


@given(st.lists(st.tuples(JOINT, SECRET), min_size=1, max_size=4), SECRET)
def test_no_directory_of_a_path_is_left(parts: list[tuple[str, str]], head: str) -> None:
    path = "/" + "/".join([head] + [joint + secret for joint, secret in parts])
    secrets = [head] + [secret for _, secret in parts]
    texts = [
        anonymous(path, (), NOBODY),
        anonymous_command(shlex.join(["bench", "run", "--out", path, "--seed", "1"]), (), NOBODY),
        anonymous_command(shlex.join(["bench", "run", f"--out={path}"]), (), NOBODY),
    ]
    if not any(joint in ("'", '"') for joint, _ in parts):
        texts += [anonymous(f"cannot open {path}: No such file", (), NOBODY)]
        texts += [anonymous(f"cannot open {path!r}: No such file", (), NOBODY)]
    for text in texts:
        assert [secret for secret in secrets if secret in text] == []


@given(st.text(max_size=60))
def test_redacting_twice_is_redacting_once(text: str) -> None:
    once = anonymous(text, (), NOBODY)
    assert anonymous(once, (), NOBODY) == once


def test_identifying_fields_lose_their_value_in_a_configuration_only() -> None:
    data = {
        "system": {"host_name": "x", "serial": 7, "gpus": [{"uuid": "u", "name": "H200"}], "users": 3},
        "run": {"uuid": "kept", "user": None},
        "metrics": {"user": 4.0, "interactivity_per_user": 5.0},
    }
    redaction = Redaction((), NOBODY)
    found = redaction.data(data)
    assert found["system"] == {
        "host_name": "<redacted>",
        "serial": "<redacted>",
        "gpus": [{"uuid": "<redacted>", "name": "H200"}],
        "users": 3,
    }
    assert found["run"] == data["run"] and found["metrics"] == data["metrics"]
    assert list(redaction.changed) == ["system.host_name", "system.serial", "system.gpus.uuid"]


def test_two_names_that_became_one_stay_two() -> None:
    assert unique("a", {"a", "a 2"}) == "a 3"
    redaction = Redaction((), NOBODY)
    assert redaction.data({"used": {"/x/a": 1, "/y/b": 2}}) == {"used": {"<path>": 1, "<path> 2": 2}}
