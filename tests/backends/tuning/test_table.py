"""The store of measured launches: what is found, what counts as a miss, and what a file must be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.backends.interface import Crossover
from backbench.backends.tuning import table as tuning
from backbench.backends.tuning.table import Entry, Table, crossover
from backbench.errors import BackendError

NOW = "0123456789abcdef"
ONE = Entry("gemm", "m1 n64 k32", "bfloat16", NOW, {"block_n": 4})
LIBRARY = Entry("gemm", "m16 n64 k32", "bfloat16", NOW, None)


TIMED = Entry("packed_gemm", "m64 n64 k32", "bfloat16 x int8", NOW, {"block_n": 4}, 7.25, 9.5)


def table(*entries: Entry) -> Table:
    return Table("sm90-132", {}).merged(entries)


def test_an_entry_is_found_by_operation_bucket_dtype_and_sources() -> None:
    found = table(ONE, LIBRARY)
    assert found.lookup("gemm", "m1 n64 k32", "bfloat16", NOW) == ONE
    assert found.lookup("gemm", "m16 n64 k32", "bfloat16", NOW) == LIBRARY
    for other in (("other", "m1 n64 k32", "bfloat16"), ("gemm", "m1 n64 k64", "bfloat16")):
        assert found.lookup(*other, NOW) is None
        assert found.complaint(*other, NOW) == "no entry for sm90-132"
    assert found.complaint("gemm", "m1 n64 k32", "bfloat16", NOW) is None


def test_other_kernel_sources_are_a_miss_and_said() -> None:
    found = table(ONE)
    assert found.lookup("gemm", "m1 n64 k32", "bfloat16", "fedcba9876543210") is None
    why = found.complaint("gemm", "m1 n64 k32", "bfloat16", "fedcba9876543210")
    assert why is not None
    assert "other kernel sources" in why


def test_merging_replaces_and_keeps() -> None:
    newer = Entry("gemm", "m1 n64 k32", "bfloat16", "fedcba9876543210", {"block_n": 8})
    before = table(ONE, LIBRARY)
    after = before.merged([newer])
    assert len(after.entries) == 2
    assert after.entries[newer.key] == newer
    assert after.entries[LIBRARY.key] == LIBRARY
    assert before.entries[ONE.key] == ONE


@given(
    st.lists(
        st.builds(
            Entry,
            operation=st.sampled_from(["gemm", "decode_attention"]),
            bucket=st.text(max_size=12),
            dtype=st.sampled_from(["bfloat16", "float16"]),
            sources=st.just(NOW),
            config=st.none() | st.dictionaries(st.text(max_size=5), st.integers() | st.booleans()),
            us=st.none() | st.floats(0, 1e6),
            dense_us=st.none() | st.floats(0, 1e6),
        ),
        max_size=8,
    )
)
def test_a_written_table_is_read_back(tmp_path_factory: pytest.TempPathFactory, entries: list[Entry]) -> None:
    file = tmp_path_factory.mktemp("tables") / "deep" / "sm90-132.json"
    tuning.write(file, table(*entries))
    assert tuning.read(file, "sm90-132") == table(*entries)


def test_times_that_were_not_taken_are_not_written(tmp_path: Path) -> None:
    tuning.write(tmp_path / "t.json", table(LIBRARY, TIMED))
    library, timed = (tmp_path / "t.json").read_text().splitlines()[3:5]
    assert '"config": null}' in library
    assert '"us": 7.25, "dense_us": 9.5}' in timed


def timed(us: float | None, dense_us: float | None = 10.0) -> Entry:
    return replace(TIMED, us=us, dense_us=dense_us)


def test_the_crossover_ends_at_the_first_bucket_that_is_slower() -> None:
    """Also where a larger one is faster again, in whichever order they come."""
    faster, slower = timed(9.9), timed(10.0)
    entries: dict[int, Entry | None] = {256: slower, 16: faster, 1024: faster, 128: faster, 1: faster}
    assert crossover(entries) == Crossover(128, 256)
    assert crossover(dict(sorted(entries.items(), reverse=True))) == Crossover(128, 256)
    assert crossover(entries | {1: slower}) == Crossover(0, 1)
    assert crossover(entries | {256: faster}) == Crossover(1024, None)


def test_a_bucket_that_was_not_timed_beside_the_dense_product_says_nothing() -> None:
    assert crossover({}) is None
    assert crossover({1: None, 16: timed(None), 32: timed(9.0, None), 64: timed(None, None)}) is None
    assert crossover({1: timed(5.0), 16: timed(None), 64: timed(11.0), 128: None}) == Crossover(1, 64)


def test_no_file_is_an_empty_table(tmp_path: Path) -> None:
    assert not tuning.read(tmp_path / "none.json", "gfx942-304").entries


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"place": "sm90-132", "entries": [{"operation": "gemm"}]}',
        '{"place": "sm90-132", "entries": [{"operation": "gemm", "bucket": "b", "dtype": "d", '
        '"sources": "s", "config": 7}]}',
        '{"place": "sm90-132", "entries": [{"operation": "gemm", "bucket": "b", "dtype": "d", '
        '"sources": "s", "config": null, "us": "7"}]}',
        '{"entries": []}',
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "sm90-132.json"
    file.write_text(text)
    with pytest.raises(BackendError, match=r"is no tuning table .*tune again") as caught:
        tuning.read(file, "sm90-132")
    assert "\n" not in str(caught.value)


def test_another_devices_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    tuning.write(file, table(ONE))
    with pytest.raises(BackendError, match="tuned on sm90-132, not on gfx942-304"):
        tuning.read(file, "gfx942-304")


def test_where_nothing_can_be_written_the_error_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="give another --out"):
        tuning.write(tmp_path / "file" / "table.json", table(ONE))


KERNEL = """import triton
from package.beside import helper

LINE = tl.constexpr(64)


@triton.jit
def kernel(x, BLOCK: tl.constexpr):
    return helper(x) + LINE


@triton.jit
def other(x):
    return x


def launch(x):
    kernel[(1,)](x)
"""
HELPER = "@triton.jit\ndef helper(x):\n    return x * 2\n\n\n@triton.jit\ndef stranger(x):\n    return x\n"


def hashed(folder: Path, kernel: str = KERNEL, helper: str = HELPER) -> str:
    (folder / "kernels.py").write_bytes(kernel.encode())
    (folder / "beside.py").write_bytes(helper.encode())
    return tuning.kernel_hash(folder / "kernels.py", ["kernel"])


@pytest.mark.parametrize(
    "changed",
    [
        {"kernel": KERNEL.replace("+ LINE", "- LINE")},
        {"kernel": KERNEL.replace("constexpr(64)", "constexpr(32)")},
        {"kernel": KERNEL.replace("@triton.jit\ndef kernel", "@triton.jit(debug=True)\ndef kernel")},
        {"helper": HELPER.replace("x * 2", "x * 3")},
    ],
)
def test_the_hash_follows_a_kernel_and_what_it_calls_and_reads(
    tmp_path: Path, changed: dict[str, str]
) -> None:
    assert hashed(tmp_path, **changed) != hashed(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"kernel": KERNEL.replace("(1,)", "(2,)")},
        {"kernel": KERNEL.replace("def other(x):\n    return x", "def other(x):\n    return -x")},
        {"kernel": "# words\n" + KERNEL},
        {"kernel": KERNEL.replace("\n", "\r\n"), "helper": HELPER.replace("\n", "\r\n")},
        {"helper": HELPER.replace("def stranger(x):\n    return x", "def stranger(x):\n    return -x")},
    ],
)
def test_the_hash_does_not_follow_what_stands_around(tmp_path: Path, changed: dict[str, str]) -> None:
    assert hashed(tmp_path, **changed) == hashed(tmp_path)


def test_the_hash_does_not_follow_where_a_function_stands(tmp_path: Path) -> None:
    moved = KERNEL.replace("from package.beside import helper\n", "") + "\n\n" + HELPER
    assert hashed(tmp_path, kernel=moved) == hashed(tmp_path)


def test_a_kernel_that_is_not_there_is_named(tmp_path: Path) -> None:
    hashed(tmp_path)
    for name in ("launch", "nosuch"):
        with pytest.raises(BackendError, match=f"kernels.py has no triton.jit function '{name}'"):
            tuning.kernel_hash(tmp_path / "kernels.py", [name])
