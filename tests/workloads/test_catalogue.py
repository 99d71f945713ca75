import itertools
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from backbench.errors import WorkloadError
from backbench.workloads.catalogue import make, names
from backbench.workloads.options import DEFAULT_CONCURRENCY, WorkloadOptions
from backbench.workloads.packed import packed_mooncake
from backbench.workloads.statistics import gap_cv, ideal_prefix_hit_ratio

CONTEXT = 4096


def tokenize(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def workload(name: str, **options):
    return make(name, WorkloadOptions(**options))


def lengths(made) -> list[tuple[int, int]]:
    return [(len(request.prompt), request.output_tokens) for request in made.requests]


# Fixed for good: a change here makes every stored run incomparable, and has to be meant.
GOLDEN = {
    "sharegpt": "325cfae9e751a6997be4df2ec6686e793c35e2b232f7737c5b6bc9064c852276",
    "azure-conv": "e05f6486906bd2785bc4bc4717cbc9f6b853d819522e45e6718727f0dc30adf7",
    "azure-code": "dd1b9bce6e0b2393f1f2c28e671f46e5e18fd6d8e5b74a63304c2d7da81d1585",
    "mooncake": "410f57a56a3ad0a63bd4eff0052a32daca6a78f445a4fa1f67c19af380863566",
    "synthetic": "6a884c59db8f8327cdc584c8dd7f8140cdfa5d588e8e753cddc1b7f84ca4935e",
    "nano256": "f0f0d4d3744c08568142ba974f434388c44dc1b70a86808ab5d5b59cdf31e619",
    "batch:64x1024+129": "4830f5b5c92720e8d11ddd47c9de20bd3d0e820e62dc8638bc5a158addcb3df6",
    "mix:sharegpt=0.7,azure-code=0.3": "a200dcd1303c80efce16f7b1e8666b70491d7b25a7e02179c757f4c01b387140",
}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_golden_hash(name):
    assert workload(name, max_len=CONTEXT).content_hash == GOLDEN[name]


def test_every_entry_has_a_golden_hash_and_makes_a_serialisable_record():
    for entry in names():
        name = next(name for name in GOLDEN if name.partition(":")[0] == entry.name.partition(":")[0])
        assert name in GOLDEN
        made = workload(name, max_len=CONTEXT)
        assert json.loads(json.dumps(made.parameters)) == made.parameters
        assert made.parameters["num_requests"] == len(made.requests)
        assert [request.id for request in made.requests] == list(range(len(made.requests)))
        assert all(len(r.prompt) + r.output_tokens <= CONTEXT for r in made.requests)
        assert all(0 <= token < 32_000 for r in made.requests for token in r.prompt)
        assert "\n" not in entry.summary


@pytest.mark.parametrize("name", ["sharegpt", "azure-conv", "mooncake", "synthetic", "nano256"])
@pytest.mark.parametrize("offer", [{}, {"rate": 3.0}])
def test_more_requests_leave_the_first_as_they_were(name, offer):
    if name == "nano256" and offer:
        return
    few = workload(name, num_requests=9, max_len=CONTEXT, **offer)
    many = workload(name, num_requests=31, max_len=CONTEXT, **offer)
    assert many.requests[:9] == few.requests


@pytest.mark.parametrize("name", ["sharegpt", "azure-code", "synthetic"])
def test_the_arrival_process_does_not_touch_lengths_or_tokens(name):
    offers = [{"concurrency": 4}, {"rate": 5.0}, {"rate": 5.0, "arrival": "constant"}, {"all_at_once": True}]
    prompts = {
        tuple((r.prompt, r.output_tokens, r.seed) for r in workload(name, num_requests=12, **offer).requests)
        for offer in offers
    }
    assert len(prompts) == 1


def test_seeds_differ():
    assert workload("sharegpt", seed=1).content_hash != workload("sharegpt", seed=2).content_hash


def test_modes():
    closed = workload("sharegpt")
    assert closed.concurrency == DEFAULT_CONCURRENCY
    assert {request.arrival_ns for request in closed.requests} == {0}
    at_once = workload("sharegpt", all_at_once=True)
    assert at_once.concurrency is None
    assert {request.arrival_ns for request in at_once.requests} == {0}
    constant = workload("sharegpt", rate=4, arrival="constant")
    assert {*np.diff([request.arrival_ns for request in constant.requests]).tolist()} == {250_000_000}
    assert constant.parameters["offered"] == {
        "mode": "open_loop",
        "arrival": "constant",
        "rate": 4,
        "cv": None,
    }


def test_recorded_times_are_used_and_scaled():
    recorded = workload("azure-conv")
    assert recorded.requests[1].arrival_ns == 4_314_579_000
    assert recorded.parameters["offered"] == {"mode": "trace", "time_scale": 1.0}
    halved = workload("azure-conv", time_scale=0.5)
    assert halved.requests[1].arrival_ns == 2_157_289_500
    assert {"kind": "time_scale", "factor": 0.5} in halved.parameters["transformations"]
    later = workload("azure-conv", window_s=(600, 1200), sample=0.5, num_requests=20)
    assert [record["kind"] for record in later.parameters["transformations"]] == [
        "window",
        "sample",
        "rebase",
        "time_scale",
    ]
    assert later.requests[0].arrival_ns == 0


def test_mooncake_in_both_tick_modes():
    literal = workload("mooncake", num_requests=300, tick="literal", max_len=1024)
    spread = workload("mooncake", num_requests=300, max_len=1024)
    assert literal.parameters["source"]["tick"] == "literal"
    assert spread.parameters["source"]["tick"] == "spread"
    ticks = [request.arrival_ns for request in literal.requests]
    assert ticks == [row.arrival_ns for row in packed_mooncake()][:300]
    assert gap_cv(ticks) > 2.5
    assert gap_cv([request.arrival_ns for request in spread.requests]) < 1.3
    assert [r.prompt for r in literal.requests] == [r.prompt for r in spread.requests]


def test_mooncake_prompts_have_the_recorded_length_and_share_blocks():
    made = workload("mooncake", num_requests=40)
    rows = list(packed_mooncake())[:40]
    assert lengths(made) == [(row.input_tokens, row.output_tokens) for row in rows]
    known: dict[int, tuple[int, ...]] = {}
    for request, row in zip(made.requests, rows, strict=True):
        for place, block_id in enumerate(row.block_ids[:-1]):
            block = request.prompt[place * 512 : (place + 1) * 512]
            assert known.setdefault(block_id, block) == block
    assert len(set(known.values())) == len(known)


def test_clipping_is_recorded_and_can_be_refused():
    made = workload("mooncake", max_len=2048)
    (record,) = [each for each in made.parameters["transformations"] if each["kind"] == "clip"]
    assert record["requests"] > 0
    with pytest.raises(WorkloadError, match="more than the model's context of 2048"):
        workload("mooncake", max_len=2048, clip=False)
    with pytest.raises(WorkloadError, match=r"request 0 has 1024 prompt.*--clip"):
        workload("batch:2x1024+8", max_len=1024)
    assert lengths(workload("batch:2x1024+8", max_len=1024, clip=True)) == [(1016, 8)] * 2


def test_nano256_is_nano_vllms_bench():
    made = workload("nano256", vocab_size=151_936)
    # The totals that nano-vLLM's own bench prints.
    assert sum(request.output_tokens for request in made.requests) == 133_966
    assert len(made.requests) == 256
    assert made.concurrency is None
    assert {request.temperature for request in made.requests} == {0.6}
    small = workload("nano256", vocab_size=512)
    assert small.requests[3].prompt == tuple(token % 512 for token in made.requests[3].prompt)


def test_batch():
    made = workload("batch:8x100+7", vocab_size=50)
    assert lengths(made) == [(100, 7)] * 8
    assert len({request.prompt for request in made.requests}) == 8


def test_shared_prefixes_and_turns():
    plain = workload("synthetic", input_lengths="fixed:64", num_requests=200)
    shared = workload("synthetic", input_lengths="fixed:64", num_requests=200, shared_prefix="4x192")
    assert ideal_prefix_hit_ratio([r.prompt for r in plain.requests], 16) == 0
    assert len({request.prompt[:192] for request in shared.requests}) == 4
    expected = (200 - 4) * 192 / (200 * 256)
    assert ideal_prefix_hit_ratio([r.prompt for r in shared.requests], 16) == pytest.approx(expected)
    turns = workload("synthetic", turns=3, num_requests=48, shared_prefix="4x192")
    sessions: dict[str, list] = {}
    for request in turns.requests:
        sessions.setdefault(request.session, []).append(request)
    assert len(sessions) == 16
    assert len({session[0].prompt[:192] for session in sessions.values()}) == 4
    for session in sessions.values():
        for before, after in itertools.pairwise(session):
            assert after.prompt[: len(before.prompt)] == before.prompt
            assert len(after.prompt) > len(before.prompt) + before.output_tokens
            assert after.follows == before.id


def sharegpt_file(tmp_path, answer_words: int = 9):
    def entry(index: int) -> dict:
        words = ["word" + "s" * (index % 5)] * (4 + index)
        turns = [{"from": "human", "value": " ".join(words)}, {"from": "gpt", "value": "a " * answer_words}]
        first = [{"from": "gpt", "value": "b " * 50}] if index % 3 == 0 else []
        return {"id": str(index), "conversations": first + turns}

    path = tmp_path / "chats.json"
    path.write_text(json.dumps([entry(index) for index in range(40)]))
    return path


def test_sharegpt_text_including_entries_that_start_with_gpt(tmp_path):
    path = sharegpt_file(tmp_path)
    made = workload("sharegpt", dataset=path, tokenize=tokenize, num_requests=40, vocab_size=20)
    assert sorted(lengths(made)) == [(4 + index, 9) for index in range(40)]
    assert made.notes == ()
    by_path = workload(str(path), tokenize=tokenize, num_requests=40, vocab_size=20)
    assert by_path.content_hash == made.content_hash
    assert by_path.parameters["source"]["data"] == "chats.json"
    with pytest.raises(WorkloadError, match="needs a tokenizer"):
        workload("sharegpt", dataset=path)
    with pytest.raises(WorkloadError, match="only 40 conversations pass"):
        workload("sharegpt", dataset=path, tokenize=tokenize, num_requests=41, vocab_size=20)
    with pytest.raises(WorkloadError, match="vocabulary of 3"):
        workload("sharegpt", dataset=path, tokenize=tokenize, num_requests=4, vocab_size=3)


def test_sharegpt_filter_drops_short_answers(tmp_path):
    with pytest.raises(WorkloadError, match="only 0 conversations"):
        workload("sharegpt", dataset=sharegpt_file(tmp_path, 3), tokenize=tokenize)


def test_sharegpt_says_that_its_tokens_are_synthetic():
    assert "synthetic tokens" in workload("sharegpt").notes[0]


def test_sharegpt_says_that_a_short_context_leaves_conversations_out():
    assert len(workload("sharegpt", max_len=2048).notes) == 1
    made = workload("sharegpt", max_len=512)
    assert "context of 512" in made.notes[1]
    assert made.parameters["source"]["filter"]["max_total"] == 512


def test_a_trace_file_is_replayed_whole_by_default(tmp_path):
    path = tmp_path / "my trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,10,20\n1.25,30,40\n")
    made = workload(str(path))
    assert made.name == "my trace.csv"
    assert [(r.arrival_ns, len(r.prompt), r.output_tokens) for r in made.requests] == [
        (0, 10, 20),
        (1_250_000_000, 30, 40),
    ]


def test_an_openai_log(tmp_path):
    path = tmp_path / "log.jsonl"
    body = {"prompt": [1, 2], "max_tokens": 3, "temperature": 0.7}
    path.write_text("\n".join(json.dumps(body) for _ in range(3)))
    made = workload(str(path))
    assert made.concurrency == DEFAULT_CONCURRENCY
    assert {request.temperature for request in made.requests} == {0.7}
    assert {r.temperature for r in workload(str(path), temperature=0.0).requests} == {0.0}
    with pytest.raises(WorkloadError, match="recorded times"):
        workload(str(path), time_scale=2)
    path.write_text(json.dumps(body) + "\n" + json.dumps({**body, "timestamp": 1}))
    with pytest.raises(WorkloadError, match="all or none"):
        workload(str(path))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sharegtp", {}, "did you mean sharegpt"),
        ("zzz", {}, "there are sharegpt"),
        ("absent.csv", {}, "no workload and no file"),
        ("x" * 5000, {}, "unknown workload"),
        (".", {}, "unknown workload"),
        ("batch:0x1+1", {}, "batch:64x1024"),
        ("batch", {}, "batch:64x1024"),
        ("sharegpt", {"num_requests": 0}, "--num-requests must be at least 1"),
        ("sharegpt", {"concurrency": 0}, "--concurrency must be at least 1"),
        ("sharegpt", {"rate": 0.0}, "--rate must be at least"),
        ("sharegpt", {"rate": -2.0}, "--rate must be at least"),
        ("azure-conv", {"time_scale": 0.0}, "--time-scale must be above 0"),
        ("azure-conv", {"time_scale": float("nan")}, "--time-scale must be above 0"),
        ("sharegpt", {"seed": -1}, "--seed must be at least 0"),
        ("sharegpt", {"temperature": -1.0}, "--temperature"),
        ("sharegpt", {"rate": 1.0, "concurrency": 2}, "--rate and --concurrency exclude"),
        ("azure-conv", {"time_scale": 1.0, "all_at_once": True}, "exclude each other"),
        ("sharegpt", {"time_scale": 1.0}, "takes no --time-scale"),
        ("sharegpt", {"cv": 2.0}, "--cv needs"),
        ("sharegpt", {"concurrency": 2, "cv": 2.0}, "--cv needs"),
        ("nano256", {"rate": 2.0}, "takes no --rate"),
        ("nano256", {"num_requests": 257}, "has 256 requests"),
        ("azure-conv", {"num_requests": 19_367}, "has 19366 requests"),
        ("azure-conv", {"window_s": (9000.0, 9001.0)}, "no request left"),
        ("azure-conv", {"window_s": (2.0, 1.0)}, "--window"),
        ("azure-conv", {"sample": 0.0}, "--sample"),
        ("azure-conv", {"tick": "literal"}, "takes no --tick"),
        ("mooncake", {"tick": "odd"}, "--tick"),
        ("synthetic", {"shared_prefix": "4"}, "GROUPSxTOKENS"),
        ("synthetic", {"input_lengths": "fixed:5000", "max_len": 4096}, "context of 4096"),
        ("sharegpt", {"max_len": 7}, "only 0 conversations"),
        ("sharegpt", {"dataset": "absent.json"}, "no such file"),
    ],
)
def test_mistakes_are_one_line_errors(name, options, message):
    with pytest.raises(WorkloadError, match=message) as caught:
        workload(name, **options)
    assert "\n" not in str(caught.value)


def test_64_sharegpt_requests_take_under_200_ms():
    def seconds() -> float:
        start = time.perf_counter()
        workload("sharegpt", num_requests=64)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.2


def test_no_heavy_import():
    heavy = "{'torch', 'pandas', 'transformers'}"
    program = f"import sys, backbench.workloads.catalogue; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
