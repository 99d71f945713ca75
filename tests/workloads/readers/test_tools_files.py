"""Files of other tools: AIPerf, AIBrix, LMBenchmark, LLMServingSim, RAGPulse, ServeGen."""

import json

import numpy as np
import pytest

from backbench.errors import WorkloadError
from backbench.workloads.catalogue import make
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.readers.turns import block_size


def tokenize(text: str) -> list[int]:
    """A token a word, its length."""
    return [len(word) for word in text.split()]


def opened(path, text: str, **options):
    path.write_text(text)
    return make(str(path), WorkloadOptions(**{"tokenize": tokenize, "max_len": 8192} | options))


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def lengths(workload) -> list[tuple[float, int, int]]:
    return [(r.arrival_ns / 1e6, len(r.prompt), r.output_tokens) for r in workload.requests]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


AGENTIC = (
    {"session_id": "a", "input_length": 1536, "output_length": 320, "hash_ids": [0, 1, 2], "timestamp": 0.0,
     "group_id": 4},
    {"session_id": "a", "input_length": 768, "output_length": 180, "hash_ids": [1000, 1001], "delay": 2450.5},
    {"session_id": "b", "input_length": 1024, "output_length": 256, "hash_ids": [0, 1], "timestamp": 10.0,
     "group_id": 4},
)  # fmt: skip


def test_a_turn_of_aiperfs_day_adds_to_its_session(path):
    """Its input_length is what the turn adds: replayed as a whole prompt, a session would hardly grow."""
    made = opened(path, lines(*AGENTIC))
    assert made.parameters["source"]["kind"] == "aiperf"
    assert lengths(made) == [(0, 1536, 320), (10, 1024, 256), (0, 1536 + 320 + 768, 180)]
    first, other, second = (request.prompt for request in made.requests)
    assert second[:1536] == first
    assert other == first[:1024]
    turn = made.requests[2]
    assert (turn.follows, turn.think_ns, turn.extends, turn.kept_tokens) == (0, 2_450_500_000, 0, 1536 + 320)
    assert [request.session for request in made.requests] == ["a", "b", "a"]
    without = opened(path, lines(*({**row, "hash_ids": []} for row in AGENTIC)))
    assert without.requests[2].prompt[:1536] == without.requests[0].prompt != first


def test_aiperfs_texts(path):
    single = opened(
        path, lines({"text": "one two three", "output_length": 4}, {"text": "four", "output_length": 2})
    )
    assert single.parameters["source"]["kind"] == "aiperf"
    assert lengths(single) == [(0, 4, 4), (0, 2, 2)]  # and "user:"
    assert single.concurrency is not None and single.notes == ()
    turns = [
        {"role": "system", "text": "be brief"},
        {"text": "what is it"},
        {"text": "and why", "delay": 500},
    ]
    chat = opened(path, lines({"session_id": "c", "turns": turns}), output_lengths="fixed:7", num_requests=2)
    # "system: be brief" and "user: what is it"; then that, the answer of 7 tokens, and "and why".
    assert [len(request.prompt) for request in chat.requests] == [7, 7 + 7 + 2]
    assert (chat.requests[1].follows, chat.requests[1].think_ns) == (0, 500_000_000)
    assert {request.output_tokens for request in chat.requests} == {7}
    trace = lines(
        {"text_input": "a b c", "output_length": 3, "timestamp": 1000},
        {"messages": [{"role": "user", "content": "hi there"}], "output_length": 5, "timestamp": 1500},
        {"payload": {"prompt": "x y", "max_tokens": 9}, "timestamp": 2000},
    )
    made = opened(path, trace)
    assert lengths(made) == [(0, 4, 3), (500, 3, 5), (1000, 2, 9)]
    with pytest.raises(WorkloadError, match="line 1, field output_length: missing; give --output-lengths"):
        opened(path, lines({"text": "one"}))
    with pytest.raises(WorkloadError, match="only text is replayed"):
        opened(path, lines({"text": "one", "output_length": 1}, {"image": "a.png", "output_length": 1}))
    with pytest.raises(WorkloadError, match="on some first turns only"):
        opened(path, lines(*(AGENTIC[0], {**AGENTIC[2], "timestamp": None})))


def test_the_size_of_blocks_is_told_from_the_rows(path):
    assert block_size(path, [(1536, 3), (768, 2)]) == 512
    assert block_size(path, [(128, 2), (65, 2)]) == 64
    assert block_size(path, []) == 512
    with pytest.raises(WorkloadError, match="blocks of 1024 or 2048 tokens fit"):
        block_size(path, [(1000, 1)])
    with pytest.raises(
        WorkloadError, match="line 2, field hash_ids: 1 ids, but 768 tokens are 2 blocks of 512"
    ):
        opened(path, lines(AGENTIC[0], {**AGENTIC[1], "hash_ids": [9]}))


def test_aibrix_moments(path):
    moments = lines(
        {
            "timestamp": 19,
            "requests": [{"prompt": "a b c", "prompt_length": 50, "output_length": 4, "session_id": 0}],
        },
        {"timestamp": 1019, "requests": [{"prompt": "d e", "prompt_length": 20, "output_length": None}] * 2},
    )
    with pytest.raises(
        WorkloadError, match="line 2, field output_length: not recorded; give --output-lengths"
    ):
        opened(path, moments)
    made = opened(path, moments, output_lengths="fixed:6")
    assert lengths(made) == [(0, 3, 4), (1000, 2, 6), (1000, 2, 6)]
    assert made.requests[0].session == "0" and made.notes == ()
    lengths_alone = opened(path, moments, output_lengths="fixed:6", tokenize=None)
    assert lengths(lengths_alone) == [(0, 50, 4), (1000, 20, 6), (1000, 20, 6)]
    assert "synthetic tokens" in lengths_alone.notes[0]
    older = lines({"timestamp": 0, "requests": [{"prompt": "a b", "Prompt Length": 9, "Output Length": 3}]})
    assert lengths(opened(path, older, tokenize=None)) == [(0, 9, 3)]


def test_lmbenchmarks_inputs_and_rounds(path):
    inputs = json.dumps(
        [{"input": "why is it so", "output_length": 275}, {"input": "x", "output_length": 3}], indent=2
    )
    made = opened(path, inputs)
    assert made.parameters["source"]["kind"] == "lmbenchmark"
    assert lengths(made) == [(0, 4, 275), (0, 1, 3)] and made.concurrency is not None
    user = {
        "round2": {"0_input": "later", "0_max_tokens": 4},
        "round1": {"1_input": "b b", "1_max_tokens": 20, "0_input": "a", "0_max_tokens": 10},
    }
    made = opened(path, lines(user, user))
    assert lengths(made) == [(0, 1, 10), (0, 2, 20), (0, 1, 4)] * 2
    assert [request.session for request in made.requests] == ["0"] * 3 + ["1"] * 3
    assert [request.follows for request in made.requests] == [None, 0, 1, None, 3, 4]
    with pytest.raises(WorkloadError, match=r"line 1, field round1\.max_tokens: None is no whole number"):
        opened(path, lines({"round1": {"0_input": "a"}}))


def test_llmservingsims_requests_sessions_and_tables(path):
    rows = lines(
        {"input_toks": 3, "output_toks": 70, "arrival_time_ns": 46926808, "input_tok_ids": [1, 2, 300]},
        {
            "session_id": "task-0",
            "arrival_time_ns": 47926808,
            "sub_requests": [
                {"input_toks": 1472, "output_toks": 133, "tool_duration_ns": 127_000_000},
                {"input_toks": 1582, "output_toks": 125, "tool_duration_ns": 0},
            ],
        },
    )
    made = opened(path, rows, vocab_size=1000)
    assert lengths(made) == [(0, 3, 70), (1, 1472, 133), (0, 1582, 125)]
    assert (made.requests[2].follows, made.requests[2].think_ns) == (1, 127_000_000)
    assert made.requests[0].prompt == (1, 2, 300)
    assert made.requests[2].session == "task-0"
    small = opened(path, rows, vocab_size=256)
    assert small.requests[0].prompt == (1, 2, 44)
    assert any("modulo the vocabulary" in note for note in small.notes)
    table = opened(path, "input_toks\toutput_toks\tarrival_time_ns\n10\t70\t46926808\n22\t104\t347938952\n")
    assert lengths(table) == [(0, 10, 70), (301.012144, 22, 104)]
    with pytest.raises(WorkloadError, match="2 ids, but input_toks says 3"):
        opened(
            path, lines({"input_toks": 3, "output_toks": 1, "arrival_time_ns": 0, "input_tok_ids": [1, 2]})
        )


RAG = (
    {"timestamp": "82", "input_length": 700, "output_length": 192, "session_id": "s",
     "hash_ids": {"sys_prompt": [8302], "passages_ids": [73, 70], "history": [], "web_search": [],
                  "user_input": [9]}},
    {"timestamp": "93", "input_length": 720, "output_length": 86, "session_id": "t",
     "hash_ids": {"sys_prompt": [8302], "passages_ids": [73, 71], "history": [5], "web_search": [],
                  "user_input": [8]}},
)  # fmt: skip


def test_ragpulse_shares_its_parts_where_their_lengths_are_known(path, tmp_path):
    alone = opened(path, lines(*RAG))
    assert lengths(alone) == [(0, 700, 192), (11_000, 720, 86)]
    assert alone.requests[0].prompt[:16] != alone.requests[1].prompt[:16]
    assert "not beside the trace" in alone.notes[-1]
    (tmp_path / "1_sys_prompt.jsonl").write_text(lines({"sys_prompt_id": 8302, "token_length": 437}))
    (tmp_path / "2_passages.jsonl").write_text(
        lines(*({"passage_id": each, "token_length": 100} for each in (70, 71, 73)))
    )
    made = opened(path, lines(*RAG))
    first, second = (request.prompt for request in made.requests)
    assert lengths(made) == lengths(alone)
    assert first[:537] == second[:537] and first[537:553] != second[537:553]
    assert [request.session for request in made.requests] == ["s", "t"]
    with pytest.raises(WorkloadError, match="line 2, field hash_ids: 5 is no object of parts"):
        opened(path, lines(RAG[0], {**RAG[1], "hash_ids": 5}))


WINDOWS = "0,2.0,1.5,Gamma,0.44,1.1\n600,0.0,,,,\n1200,4.0,0.5,Weibull,2.1,0.28\n"
LENGTHS = {
    "0": {"input_tokens": "{100: 0.25, 200: 0.75}", "output_tokens": "{7: 1.0}"},
    "600": {"input_tokens": "{}", "output_tokens": "{}"},
    "1200": {"input_tokens": "{300: 1.0}", "output_tokens": "{9: 2.0, 11: 2.0}"},
}


def chunk(folder, number: int, windows: str = WINDOWS, held=LENGTHS):
    (folder / f"chunk-{number}-dataset.json").write_text(held if isinstance(held, str) else json.dumps(held))
    path = folder / f"chunk-{number}-trace.csv"
    path.write_text(windows)
    return path


def test_servegens_windows_set_rate_bursts_and_lengths(tmp_path):
    made = make(str(chunk(tmp_path, 0)), WorkloadOptions(num_requests=3000))
    early = [r for r in made.requests if r.arrival_ns < 590e9]
    late = [r for r in made.requests if r.arrival_ns > 610e9]
    assert {len(request.prompt) for request in early} == {100, 200}
    assert {len(request.prompt) for request in late} == {300}
    assert {request.output_tokens for request in late} == {9, 11}
    gaps = [np.diff([request.arrival_ns for request in part]) for part in (early, late)]
    # Four standard errors: cv / sqrt(n) of the mean; of a gamma's CV sqrt((1 + cv^2) / 2n), 4.1 % of 1.5.
    assert len(early) == pytest.approx(2.0 * 590, rel=4 * 1.5 / np.sqrt(1180))
    assert gaps[0].std() / gaps[0].mean() == pytest.approx(1.5, rel=4 * np.sqrt(3.25 / 2 / 1180))
    # Of a Weibull with CV 0.5 (skewness 0.57, kurtosis 3.2) it is sqrt(0.52 / n).
    assert gaps[1].std() / gaps[1].mean() == pytest.approx(0.5, rel=4 * np.sqrt(0.52 / 1800))
    # A share of 1/4 of 1180: binomial.
    hundreds = sum(len(request.prompt) == 100 for request in early)
    assert hundreds / len(early) == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 1180))
    assert "holds no requests" in made.notes[0]
    again = make(str(tmp_path / "chunk-0-trace.csv"), WorkloadOptions(num_requests=40))
    assert again.requests == made.requests[:40]
    other = make(str(tmp_path / "chunk-0-trace.csv"), WorkloadOptions(num_requests=40, seed=1))
    assert lengths(other) != lengths(again)


def test_a_folder_of_chunks_is_all_of_its_clients(tmp_path):
    options = WorkloadOptions(num_requests=60, max_len=4096)
    alone = [make(str(chunk(tmp_path, number)), options) for number in (0, 1)]
    together = make(str(tmp_path), WorkloadOptions(num_requests=60, max_len=4096))
    assert together.parameters["source"] == {"kind": "servegen", "data": tmp_path.name}
    arrivals = [r.arrival_ns for r in together.requests]
    assert arrivals == sorted(arrivals)
    assert together.schedule_s < min(each.schedule_s for each in alone)


@pytest.mark.parametrize(
    ("windows", "held", "message"),
    [
        ("0,2.0,1.5,Gamma\n" + WINDOWS, LENGTHS, "is no trace known here"),
        (WINDOWS + "900,2,1,Gamma,1,1\n", LENGTHS, "line 4, field start: goes back in time"),
        (WINDOWS.replace("Gamma", "Pareto"), LENGTHS, "line 1, field pattern: 'Pareto' is none of"),
        (
            WINDOWS.replace("1.5", "50"),
            LENGTHS,
            "line 1, field rate: '2.0' with cv '50': arrival 'gamma' needs",
        ),
        (WINDOWS.replace("2.0", "2e9"), LENGTHS, "line 1, field rate: '2e9' with cv"),
        (WINDOWS, "{", "malformed JSON"),
        (WINDOWS, "[]", "is no JSON object"),
        (WINDOWS, {"a": LENGTHS["0"]}, "must be seconds"),
        (WINDOWS, {"nan": LENGTHS["0"]}, "has no window"),
        (WINDOWS, {"0": LENGTHS["600"]}, "has no window with input_tokens"),
        (WINDOWS, {"0": LENGTHS["0"] | {"input_tokens": "{0: 1.0}"}}, "is no distribution"),
        (WINDOWS, {"0": LENGTHS["0"] | {"output_tokens": "{7: -1.0, 8: 2}"}}, "is no distribution"),
        (WINDOWS, {"0": LENGTHS["0"] | {"output_tokens": "{7: nan}"}}, "is no distribution"),
        (WINDOWS, {"0": LENGTHS["0"] | {"output_tokens": "{" + "9" * 5000 + ": 1.0}"}}, "is no distribution"),
    ],
)
def test_a_bad_chunk_is_one_line(tmp_path, windows, held, message):
    path = chunk(tmp_path, 0, windows, held)
    with pytest.raises(WorkloadError, match=message) as caught:
        make(str(path), WorkloadOptions(num_requests=5))
    assert len(str(caught.value).replace(str(tmp_path), "")) < 300


def test_a_chunk_needs_its_lengths(tmp_path):
    path = chunk(tmp_path, 0)
    (tmp_path / "chunk-0-dataset.json").unlink()
    with pytest.raises(WorkloadError, match="a chunk's lengths stand beside its trace"):
        make(str(path), WorkloadOptions(num_requests=5))
