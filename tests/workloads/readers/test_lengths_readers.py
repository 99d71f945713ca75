"""The readers of traces that hold lengths: right rows, and errors that name file, line and field."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import WorkloadError
from backbench.workloads.readers.azure import read_azure, timestamp_ns
from backbench.workloads.readers.burstgpt import read_burstgpt
from backbench.workloads.readers.mooncake import read_mooncake
from backbench.workloads.readers.qwen_bailian import read_qwen_bailian
from backbench.workloads.readers.text import BadRows, Place
from backbench.workloads.readers.tracelab import read_tracelab
from backbench.workloads.readers.vidur import read_vidur
from backbench.workloads.trace import TraceRow

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:46.6805901,396,109\r\n"
    "2023-11-17 00:00:00,5,6"
)
MOONCAKE = '{"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}\n'
QWEN = (
    '{"chat_id":1,"parent_chat_id":-1,"timestamp":0.5,"input_length":20,"output_length":2,"type":"text",'
    '"turn":1,"hash_ids":[5,6]}\n'
    '{"chat_id":2,"parent_chat_id":1,"timestamp":61.114,"input_length":40,"output_length":3,"type":"text",'
    '"turn":2,"hash_ids":[5,6]}\n'
    '{"chat_id":3,"parent_chat_id":2,"timestamp":61.114,"input_length":16,"output_length":3,"type":"text",'
    '"turn":3,"hash_ids":[5]}\n'
)
BURST = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
)
BURST_3 = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,s1,2.5,GPT-4,472,18,490,API log\n6.5,s1,1,GPT-4,9,0,9,API log\n7,,1,GPT-4,9,1,10,API log\n"
)
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,10,20\n1.25,30,40\n"
READERS = {
    "azure": read_azure,
    "mooncake": read_mooncake,
    "qwen": read_qwen_bailian,
    "burstgpt": read_burstgpt,
    "tracelab": read_tracelab,
    "vidur": read_vidur,
}


def test_azure_keeps_all_seven_digits(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(AZURE, newline="")
    first, second, third = read_azure(path)
    assert first == TraceRow(374, 44, 0)
    assert second == TraceRow(396, 109, 100)
    seconds = 24 * 3600 - (18 * 3600 + 15 * 60 + 46)
    assert third.arrival_ns == seconds * 1_000_000_000 - 680_590_000


@given(ticks=st.integers(0, 9_999_999))
def test_azure_fractions_are_exact(ticks):
    place = Place(None, 1)
    base = timestamp_ns(place, "2023-11-16 18:15:46")
    assert timestamp_ns(place, f"2023-11-16 18:15:46.{ticks:07d}") - base == ticks * 100


def test_azure_2024_times_with_an_offset(tmp_path):
    path = tmp_path / "week.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,1,1\n2024-05-10 00:00:00.017335+00:00,1,1\n"
    )
    assert [row.arrival_ns for row in read_azure(path)] == [0, 7_405_000]


def test_gzip_is_known_by_its_bytes(tmp_path):
    for name in ("trace.csv.gz", "trace.csv"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(AZURE.encode()))
        assert len(list(read_azure(path))) == 3


def test_mooncake_and_qwen_rows(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(MOONCAKE)
    assert list(read_mooncake(path)) == [TraceRow(600, 5, 3_000_000_000, block_ids=(0, 7), block_tokens=512)]
    path.write_text(QWEN)
    rows = list(read_qwen_bailian(path))
    assert [row.session for row in rows] == ["1", "1", "1"]
    assert [row.arrival_ns for row in rows] == [500_000_000, 61_114_000_000, 61_114_000_000]
    assert rows[0].block_tokens == 16


def test_burstgpt_reads_columns_by_name_and_leaves_failures_out(tmp_path):
    path = tmp_path / "burst.csv"
    path.write_text(BURST)
    assert list(read_burstgpt(path)) == [TraceRow(472, 18, 5_000_000_000)]
    path.write_text(BURST_3)
    assert list(read_burstgpt(path)) == [
        TraceRow(472, 18, 5_000_000_000, session="s1"),
        TraceRow(9, 1, 7_000_000_000),
    ]


def test_vidur(tmp_path):
    path = tmp_path / "vidur.csv"
    path.write_text(VIDUR)
    assert list(read_vidur(path)) == [TraceRow(10, 20, 0), TraceRow(30, 40, 1_250_000_000)]


TRACELAB = (
    "session_id,arrival_time,round_idx,prefix_len,input_len,output_len,tool_wait_after_ms\n"
    "b,250,0,0,40,5,0\na,0,0,0,30,10,500\na,0,1,40,8,4,100\na,0,2,20,8,4,0\n"
)


def test_tracelab_rounds_stand_in_the_order_they_would_come_in(tmp_path):
    path = tmp_path / "sessions.csv"
    path.write_text(TRACELAB)
    rows = list(read_tracelab(path))
    found = [(row.session, row.arrival_ns // 1_000_000, row.input_tokens, row.output_tokens) for row in rows]
    assert found == [("a", 0, 30, 10), ("b", 250, 40, 5), ("a", 500, 48, 4), ("a", 600, 28, 4)]
    assert [row.follow.row for row in rows if row.follow is not None] == ["a/0", "a/1"]


def mooncake(**changes) -> str:
    row = {**json.loads(MOONCAKE), **changes}
    return MOONCAKE + json.dumps({name: value for name, value in row.items() if value is not None}) + "\n"


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\n"
BAD = [
    ("azure", HEADER + "2023-11-16 18:15:47,-4,4\n", "line 3, field ContextTokens"),
    ("azure", HEADER + "2023-11-16 18:15:47,0,4\n", "line 3, field ContextTokens"),
    ("azure", HEADER + "2023-11-16 18:15:47,4,x\n", "line 3, field GeneratedTokens"),
    ("azure", HEADER + "2023-11-16 18:15:47,4\n", "line 3, field GeneratedTokens"),
    ("azure", HEADER + "2023-11-16 18:15:47,4,4,4\n", "line 3, field GeneratedTokens"),
    ("azure", HEADER + "2023-13-16 18:15:47,4,4\n", "line 3, field TIMESTAMP"),
    ("azure", HEADER + "2023-11-16 24:15:47,4,4\n", "line 3, field TIMESTAMP"),
    ("azure", HEADER + "yesterday,4,4\n", "line 3, field TIMESTAMP"),
    ("azure", HEADER + "2023-11-16 18:15:45,4,4\n", "line 3, field TIMESTAMP: goes back in time"),
    ("azure", "TIMESTAMP,ContextTokens\n", "line 1, field GeneratedTokens"),
    ("azure", "", "line 1, field TIMESTAMP"),
    ("mooncake", mooncake(hash_ids=[1]), "line 2, field hash_ids"),
    ("mooncake", mooncake(hash_ids=[1, -1]), "line 2, field hash_ids"),
    ("mooncake", mooncake(hash_ids="1 2"), "line 2, field hash_ids"),
    ("mooncake", mooncake(hash_ids=None), "line 2, field hash_ids"),
    ("mooncake", mooncake(input_length=1.5), "line 2, field input_length"),
    ("mooncake", mooncake(output_length=True), "line 2, field output_length"),
    ("mooncake", mooncake(timestamp=-1), "line 2, field timestamp"),
    ("mooncake", mooncake(timestamp="NaN"), "line 2, field timestamp"),
    ("mooncake", mooncake(timestamp=0), "line 2, field timestamp: goes back"),
    ("mooncake", MOONCAKE + '{"timestamp": 3000,\n', "line 2, field"),
    ("mooncake", MOONCAKE + "\n[1]\n", "line 3, field"),
    ("qwen", QWEN.replace("[5,6]", "[5]").replace("16,", "64,"), "line 2, field hash_ids"),
    ("qwen", QWEN.replace('"chat_id":1,', '"chat_id":-7,', 1), "line 1, field chat_id"),
    ("burstgpt", BURST + "6,ChatGPT,472,-1,490,x\n", "line 3, field Response tokens"),
    ("burstgpt", BURST.replace("Response", "Answer"), "line 1, field Response tokens"),
    ("azure", HEADER + "2023-11-16 18:15:47,--4,4\n", "line 3, field ContextTokens"),
    ("tracelab", TRACELAB + "a,0,2,20,8,4,0\n", "line 6, field round_idx"),
    ("tracelab", TRACELAB + "a,0,3,0,0,4,0\n", "line 6, field input_len"),
    ("tracelab", TRACELAB + ",0,3,0,1,4,0\n", "line 6, field session_id"),
    ("vidur", VIDUR + "inf,1,1\n", "line 4, field arrived_at"),
]


@pytest.mark.parametrize(("reader", "text", "expected"), BAD)
def test_a_bad_row_names_file_line_and_field(tmp_path, reader, text, expected):
    path = tmp_path / "bad.trace"
    path.write_text(text)
    with pytest.raises(WorkloadError) as caught:
        list(READERS[reader](path))
    message = str(caught.value)
    assert message.startswith(f"{path}, {expected}")
    assert "\n" not in message


def test_unreadable_files(tmp_path):
    with pytest.raises(WorkloadError, match="cannot read"):
        list(read_azure(tmp_path / "absent.csv"))
    path = tmp_path / "cut.csv.gz"
    path.write_bytes(gzip.compress((HEADER * 50).encode())[:-12])
    with pytest.raises(WorkloadError, match="line"):
        list(read_azure(path))
    damaged = bytearray(gzip.compress((HEADER * 50).encode()))
    damaged[12:40] = bytes(28)
    path.write_bytes(damaged)
    with pytest.raises(WorkloadError, match="unreadable"):
        list(read_azure(path))
    path.write_bytes(HEADER.encode() + b"\xff\xfe,1,1\n")
    with pytest.raises(WorkloadError, match="unreadable"):
        list(read_azure(path))


@given(st.text(max_size=200))
def test_any_text_gives_rows_or_a_workload_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "trace"
    path.write_text(text, encoding="utf-8", errors="surrogatepass" if text.isascii() else "replace")
    for reader in READERS.values():
        try:
            list(reader(path))
        except WorkloadError as error:
            assert str(path) in str(error)


STAMPS = st.builds(
    "2023-11-{:02d} 18:{:02d}:{:02d}{}{}".format,
    st.integers(16, 17),
    st.integers(0, 2),
    st.sampled_from([0, 1, 46, 59, 60]),
    st.sampled_from(["", ".5", ".0000001", ".1234567", ".", ".1234567890"]),
    st.sampled_from(["", "Z", "+00:00", "+01:00", " "]),
)
COUNTS = st.sampled_from(["5", "44", "374", "0", "5.0", " 5", "x", "9" * 12])


@given(st.lists(st.tuples(STAMPS, COUNTS, COUNTS), max_size=12), st.booleans())
def test_azure_rows_are_the_same_whether_remembered_or_checked(tmp_path_factory, rows, in_order):
    """Nothing that was right before makes a wrong row right."""
    path = tmp_path_factory.mktemp("azure") / "azure.csv"
    lines = [",".join(row) for row in (sorted(rows) if in_order else rows)]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines))

    def found(skip: bool) -> list:
        rows, bad = [], BadRows(skip=skip)
        try:
            rows += read_azure(path, bad)
        except WorkloadError as error:
            rows.append(str(error))
        return [*rows, bad.rows, bad.skipped, bad.first]

    remembered = found(True), found(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backbench.workloads.readers.azure._REMEMBERED", 0)
        assert (found(True), found(False)) == remembered


def test_azure_remembers_no_time_that_goes_back(tmp_path):
    path = tmp_path / "azure.csv"
    rows = [f"2023-11-16 18:15:{second},5,5" for second in ("10.5", "10.7", "10.6")]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    with pytest.raises(WorkloadError, match="line 4, field TIMESTAMP: goes back in time"):
        list(read_azure(path))
