"""Whatever a file holds, it is a workload or one printable line that says what is wrong."""

import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbench.errors import WorkloadError
from backbench.workloads.catalogue import make
from backbench.workloads.lengths import parse_lengths
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.readers.detect import formats
from backbench.workloads.readers.json_array import read_array


def tokenize(text: str) -> list[int]:
    """A token a byte; like the real ones, it cannot take half of a surrogate pair."""
    return list(text.encode())


SAMPLES = {
    "aibrix": '{"timestamp": 0, "requests": [{"prompt": "how so?", "prompt_length": 4, "output_length": 3, '
    '"session_id": 0}, {"prompt": "and why?", "output_length": 2}]}\n'
    '{"timestamp": 1000, "requests": [{"prompt": "because?", "prompt_length": 2, "output_length": 5}]}\n',
    "aiperf": '{"session_id": "s", "input_length": 1000, "output_length": 5, "hash_ids": [0, 7], '
    '"timestamp": 0.0, "group_id": 4}\n'
    '{"session_id": "s", "input_length": 20, "output_length": 3, "hash_ids": [8], "delay": 2450.3}\n',
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50,396,109\n",
    "burstgpt": "Timestamp,Session ID,Request tokens,Response tokens\n5,s1,472,18\n6.5,,9,0\n7,s1,9,1\n",
    "llmservingsim": '{"input_toks": 3, "output_toks": 7, "arrival_time_ns": 46926808, '
    '"input_tok_ids": [1, 2, 3]}\n'
    '{"session_id": "t", "arrival_time_ns": 50000000, "sub_requests": [{"input_toks": 14, "output_toks": 13, '
    '"tool_duration_ns": 127348767}, {"input_toks": 15, "output_toks": 12, "tool_duration_ns": 0}]}\n',
    "lmbenchmark": '[{"input": "why is it so?", "output_length": 5},\n'
    '{"input": "because.", "output_length": 3}]',
    "mooncake": '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}\n'
    '{"timestamp": 3000, "input_length": 20, "output_length": 5, "hash_ids": [0]}\n',
    "openai": '{"prompt": [1, 2], "max_tokens": 3, "temperature": 0.7, "timestamp": 4}\n'
    '{"messages": [{"role": "user", "content": "how so?"}], "max_completion_tokens": 3, "timestamp": 5}\n',
    "qwen-bailian": '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 20, '
    '"output_length": 2, "hash_ids": [5, 6]}\n'
    '{"chat_id": 2, "parent_chat_id": 1, "timestamp": 61.1, "input_length": 40, "output_length": 3, '
    '"hash_ids": [5, 6, 7]}\n',
    "ragpulse": '{"timestamp": "82", "input_length": 40, "output_length": 9, "hash_ids": '
    '{"sys_prompt": [8302], "passages_ids": [73, 70], "history": [], "web_search": [], "user_input": [9]}, '
    '"session_id": "a"}\n'
    '{"timestamp": "93", "input_length": 41, "output_length": 8, "hash_ids": {"sys_prompt": [8302], '
    '"passages_ids": [74], "history": [5], "web_search": [], "user_input": [8]}, "session_id": "b"}\n',
    "servegen": "0,0.05,0.98,Gamma,1.03,0.8\n600,0.02,1.1,Weibull,0.9,0.9\n",
    "sharegpt": '[{"conversations": [{"from": "human", "value": "why is it so?"}, '
    '{"from": "gpt", "value": "because."}]},\n{"conversations": []}]',
    "tracelab": "session_id,arrival_time,round_idx,prefix_len,input_len,output_len,tool_wait_after_ms\n"
    "b,250,0,0,40,5,0\na,0,0,0,30,10,500\na,0,1,40,8,4,100\n",
    "weka": '[{"id": "w", "block_size": 64, "hash_id_scope": "local", "tool_tokens": 5, "system_tokens": 3, '
    '"requests": [{"t": 0.0, "type": "n", "in": 70, "out": 3, "hash_ids": [1, 2], "api_time": 1.5},\n'
    '{"t": 2, "type": "subagent", "requests": [{"t": 2, "in": 9, "out": 3, "hash_ids": [4]}]},\n'
    '{"t": 4, "type": "s", "in": 90, "out": 3, "hash_ids": [1, 3], "api_time": 1.5, "think_time": 0.5}]}]',
    "vidur": "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,10,20\n1.25,30,40\n",
}
HOSTILE = [
    "-1", "0", "1.5", "1e400", "-1e-400", "NaN", "Infinity", "true", "null", "[]", "{}", '"x"', '"\\ud83d"',
    "9" * 30, "9" * 400, "9" * 5000, "1e18", "9999-11-16 18:15:46", "\x1b[2J\x1b]0;own", "\u202e", "\x00",
    '"', "[" * 3000, "'" * 400, "\r", ",", "\n",
]  # fmt: skip
"""What takes the place of a word: wrong types, huge numbers, control characters, broken punctuation."""


WHOLE = {name: {"num_requests": {"sharegpt": 1, "servegen": 4}.get(name)} for name in SAMPLES}
"""Everything is read; but where requests are drawn, so many."""
DRAWN_LENGTHS = '{"0": {"input_tokens": "{9: 0.5, 20: 0.5}", "output_tokens": "{3: 1.0}"}}'


def stored(folder, name: str, text: str):
    """The sample as a file, with what stands beside it."""
    path = folder / ("chunk-0-trace.csv" if name == "servegen" else "trace")
    path.write_text(text, newline="")
    (folder / "chunk-0-dataset.json").write_text(DRAWN_LENGTHS)
    return path


def opened(path, **options) -> str | None:
    """The error's line, or None where it became a workload."""
    given = {"max_len": 4096, "vocab_size": 300, "clip": True, **options}
    try:
        made = make(str(path), WorkloadOptions(tokenize=tokenize, **given))
    except WorkloadError as error:
        return str(error)
    assert made.content_hash
    return None


def require_one_line(message: str | None, path) -> None:
    if message is not None:
        # The file's own name is the user's; the rest of the line is ours.
        assert message.isprintable()
        assert len(message.replace(str(path), "")) < 300


def test_every_format_has_a_sample_that_works(tmp_path):
    assert set(SAMPLES) == {each.name for each in formats()}
    for name, text in SAMPLES.items():
        path = stored(tmp_path, name, text)
        assert opened(path, **WHOLE[name]) is None


def same_hash(path, name: str) -> str:
    options = WorkloadOptions(tokenize=tokenize, max_len=4096, vocab_size=300, clip=True, **WHOLE[name])
    return make(str(path), options).content_hash


@pytest.mark.parametrize("name", list(SAMPLES))
def test_a_mark_line_ends_and_a_missing_last_one_change_nothing(tmp_path, name):
    text = SAMPLES[name]
    plain = same_hash(stored(tmp_path, name, text), name)
    variants = ["\ufeff" + text, text.replace("\n", "\r\n"), text.rstrip("\n"), text + "\n"]
    if name not in ("azure", "burstgpt", "tracelab", "vidur"):  # a table's header is its first line
        variants.append("\n" + text)
    for each in variants:
        assert same_hash(stored(tmp_path, name, each), name) == plain


@pytest.mark.parametrize("name", list(SAMPLES))
@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_a_workload_or_one_line(tmp_path_factory, name, data):
    text = SAMPLES[name]
    kind = data.draw(st.sampled_from(["cut", "reordered", "replaced", "doubled"]))
    if kind == "cut":
        text = text[: data.draw(st.integers(0, len(text)))]
    elif kind == "reordered":
        text = "".join(data.draw(st.permutations(text.splitlines(keepends=True))))
    else:
        start = data.draw(st.integers(0, len(text) - 1))
        end = data.draw(st.integers(start, min(start + 20, len(text))))
        middle = data.draw(st.sampled_from(HOSTILE)) if kind == "replaced" else 2 * text[start:end]
        text = text[:start] + middle + text[end:]
    path = stored(tmp_path_factory.mktemp("damaged"), name, text)
    require_one_line(opened(path, **WHOLE[name]), path)


@pytest.mark.parametrize("name", list(SAMPLES))
def test_every_value_replaced_by_every_hostile_one(tmp_path, name):
    """Each word of the sample's last line or entry in turn, not only where chance looks."""
    words = SAMPLES[name].replace("\n", " \n ").split(" ")
    values = [place for place, word in enumerate(words) if any(c.isalnum() for c in word)][-9:]
    draws = random.Random(0)
    for place in values:
        for hostile in draws.sample(HOSTILE, 9):
            tail = "," if words[place].endswith(",") else "}" * words[place].count("}")
            text = " ".join([*words[:place], hostile + tail, *words[place + 1 :]])
            path = stored(tmp_path, name, text.replace(" \n ", "\n"))
            require_one_line(opened(path, **WHOLE[name]), path)


@settings(max_examples=200)
@given(
    st.lists(
        st.sampled_from(["[", "]", "{", "}", ",", ":", '"a"', "12", "tru", "e", "null", " ", "\n", "\\"]),
        max_size=14,
    ),
    st.integers(1, 9),
)
def test_an_array_is_read_where_json_reads_it(tmp_path_factory, parts, chunk):
    """Commas, closing brackets and trailing text as strictly as JSON, in whatever pieces it comes."""
    text = "[{}" + "".join(parts)
    path = tmp_path_factory.mktemp("array") / "array.json"
    path.write_text(text)
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backbench.workloads.readers.json_array.CHUNK_CHARACTERS", chunk)
        try:
            found = [value for _, value in read_array(path)]
        except WorkloadError:
            found = None
    # A number cut by a chunk reads as two; no conversation is a number, so that is refused either way.
    if found is not None or not any(isinstance(value, int) for value in expected or []):
        assert found == expected


CASES = {
    "a trace of terminal escapes": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n\x1b[2J\x1b]0;own\x07,5,4\n",
        "line 2, field TIMESTAMP: '\\x1b[2J\\x1b]0;own\\x07' is not like 2023-11-16 18:15:46.6805900.",
    ),
    "a column of terminal escapes": (
        "arrived_at,num_prefill_tokens,num_decode_tokens,\x1b[2J\n0,1,1\n",
        "line 2, field '\\x1b[2J': 3 values where the header has 4.",
    ),
    "a year beyond the clock": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,5,4\n9999-11-16 18:15:46,5,4\n",
        "line 3, field TIMESTAMP: is more than 146 years after the first.",
    ),
    "a time of 400 digits": (
        f'{{"timestamp": {"9" * 400}, "input_length": 5, "output_length": 5, "hash_ids": [0]}}\n',
        "line 1, field timestamp:",
    ),
    "a count of 5000 digits": (
        f'{{"timestamp": 0, "input_length": {"9" * 5000}, "output_length": 5, "hash_ids": [0]}}\n',
        "line 1, field (the whole line): holds a number of thousands of digits.",
    ),
    "half of an emoji": (
        '{"messages": [{"role": "user", "content": "cut \\ud83d here"}], "max_tokens": 8}\n',
        "line 1, field messages: '\\ud83d' is half of a surrogate pair and no character; mend the text.",
    ),
    "half of an emoji in a prompt": ('{"prompt": "\\ud800", "max_tokens": 3}\n', "line 1, field prompt:"),
    "half of an emoji in a conversation": (
        '[{"id": "1", "conversations": [{"from": "human", "value": "cut \\ud83d at the end"}, '
        '{"from": "gpt", "value": "an answer"}]}]',
        "line 1, field conversations.value:",
    ),
    "text after the array": (
        '[{"conversations": []}] garbage',
        "line 1, field (the array): something follows the closing ].",
    ),
    "entries without a comma": ("[{}\n{}]", "line 1, field conversations"),
    "a temperature of 400 digits": (
        f'{{"prompt": [1], "max_tokens": 3, "temperature": {"9" * 400}}}\n',
        "line 1, field temperature:",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_found_cases(tmp_path, case):
    text, expected = CASES[case]
    path = tmp_path / "trace"
    path.write_text(text)
    message = opened(path)
    assert message is not None
    assert message.startswith(f"{path}, {expected}")
    require_one_line(message, path)


def test_recorded_times_stretched_beyond_the_clock_are_refused(tmp_path):
    path = tmp_path / "trace"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,10,20\n4e9,30,40\n")
    assert opened(path, yes=True) is None
    message = opened(path, time_scale=1e6, yes=True)
    assert message is not None
    assert "request 1 arrives more than 146 years after the start" in message
    assert opened(path, concurrency=1) is None, "its times play no part then"


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("backbench.workloads.readers.text.MAXIMUM_LINE", 1000)
    path = tmp_path / "trace"
    path.write_text(SAMPLES["vidur"] + "1" * 5000)
    assert opened(path) == f"{path}, line 4, field (the whole line): longer than 1000 characters."


def test_what_is_no_file_is_no_workload_and_no_list_of_lengths(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, "/dev/zero"):
        message = opened(path)
        assert message is not None
        assert "no workload and no file" in message
        with pytest.raises(WorkloadError, match="names no list and no file"):
            parse_lengths(f"empirical:{path}")
