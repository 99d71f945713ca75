"""Mixes: each part keeps its lengths and order, the weights hold, and nothing is shared across parts."""

import json
import math

import pytest

from backbench.errors import WorkloadError
from backbench.workloads.catalogue import make
from backbench.workloads.mix import parse_mix
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.statistics import ideal_prefix_hit_ratio

MIX = "mix:sharegpt=0.7,azure-code=0.3"


def mixed(name: str = MIX, **options):
    return make(name, WorkloadOptions(**options))


def lengths(requests) -> list[tuple[int, int]]:
    return [(len(request.prompt), request.output_tokens) for request in requests]


def of_part(made, digit: str) -> list:
    part_of = made.parameters["source"]["part_of"]
    assert len(part_of) == len(made.requests)
    return [request for request, part in zip(made.requests, part_of, strict=True) if part == digit]


def test_parts_keep_their_lengths_and_their_share():
    made = mixed(num_requests=400, rate=20.0, max_len=4096)
    source = made.parameters["source"]
    assert [(part["name"], part["weight"]) for part in source["parts"]] == [
        ("sharegpt", 0.7),
        ("azure-code", 0.3),
    ]
    for digit, part in zip("01", source["parts"], strict=True):
        own = of_part(made, digit)
        assert part["requests"] == len(own)
        alone = mixed(part["name"], num_requests=len(own), max_len=4096)
        assert lengths(own) == lengths(alone.requests)
    # Binomial: four standard deviations.
    assert abs(len(of_part(made, "0")) - 280) < 4 * math.sqrt(400 * 0.7 * 0.3)
    assert [r.arrival_ns for r in made.requests] == [
        r.arrival_ns for r in mixed("synthetic", num_requests=400, rate=20.0).requests
    ]
    assert made.notes[0].startswith("sharegpt: synthetic tokens")
    assert json.loads(json.dumps(made.parameters)) == made.parameters


def test_more_requests_leave_the_first_as_they_were_and_seeds_differ():
    few, many = mixed(num_requests=20), mixed(num_requests=50)
    assert many.requests[:20] == few.requests
    assert few.concurrency == 16
    assert (
        mixed(num_requests=20, seed=1).parameters["source"]["part_of"] != few.parameters["source"]["part_of"]
    )


def test_the_same_ids_in_two_parts_are_different_blocks(tmp_path):
    """Otherwise two traces share prefixes that neither of their users shared."""
    rows = [
        {"timestamp": each, "input_length": 1024, "output_length": 2, "hash_ids": [1, 2]}
        for each in range(30)
    ]
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path in paths:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = mixed(f"mix:{paths[0]}=1,{paths[1]}=1", num_requests=20)
    first, second = ({request.prompt for request in of_part(made, digit)} for digit in "01")
    assert len(first) == len(second) == 1 and first != second
    both = [request.prompt for request in made.requests]
    assert ideal_prefix_hit_ratio(both, 512) == 18 * 512 / (20 * 1024)
    sessions = mixed("mix:synthetic=1,azure-conv=1", turns=2, num_requests=20)
    assert {r.session for r in of_part(sessions, "0")} <= {f"0/{each}" for each in range(20)}
    assert {r.session for r in of_part(sessions, "1")} == {None}


def test_turns_follow_those_of_their_own_part(tmp_path):
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    rows = []
    for session in range(8):
        same = {"session_id": str(session), "output_length": 4}
        rows.append(same | {"timestamp": 10 * session, "input_length": 512, "hash_ids": [session]})
        rows.append(same | {"delay": 5, "input_length": 700, "hash_ids": [session, 100 + session]})
    for path in paths:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = mixed(f"mix:{paths[0]}=1,{paths[1]}=1", num_requests=12)
    for digit in "01":
        first, second, third, fourth = of_part(made, digit)[:4]
        assert (first.follows, second.follows) == (None, first.id)
        assert (third.follows, fourth.follows) == (None, third.id)
        assert second.think_ns == 5_000_000


def test_options_of_one_part_reach_it_alone():
    made = mixed("mix:synthetic=1,nano256=1", num_requests=30, input_lengths="fixed:33")
    assert {len(request.prompt) for request in of_part(made, "0")} == {33}
    assert {request.temperature for request in of_part(made, "1")} == {0.6}
    assert {request.temperature for request in of_part(made, "0")} == {0.0}
    with pytest.raises(WorkloadError, match="takes no --input-lengths"):
        mixed(input_lengths="fixed:33")
    with pytest.raises(WorkloadError, match="takes no --time-scale"):
        mixed(time_scale=2.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mix:", "'' in a mix is no NAME=WEIGHT above 0; write mix:NAME=WEIGHT"),
        ("mix", "is no NAME=WEIGHT above 0"),
        ("mix:sharegpt", "'sharegpt' in a mix is no NAME=WEIGHT"),
        ("mix:sharegpt=1", "a mix has 2 to 36 parts, not 1"),
        ("mix:sharegpt=0,mooncake=1", "'sharegpt=0' in a mix"),
        ("mix:sharegpt=nan,mooncake=1", "'sharegpt=nan' in a mix"),
        ("mix:sharegpt=-1,mooncake=1", "'sharegpt=-1' in a mix"),
        ("mix:sharegpt=1,sharegpt=1", "names 'sharegpt' twice"),
        ("mix:mix:a=1,mooncake=1", "a mix holds no mix"),
        ("mix:sharegtp=1,mooncake=1", "did you mean sharegpt"),
        ("mix:absent.csv=1,mooncake=1", "no workload and no file 'absent.csv'"),
        ("mix:batch:3x10+2=9,mooncake=1", r"'batch:3x10\+2' has 3 requests, and its share is"),
    ],
)
def test_mistakes_are_one_line(name, message):
    with pytest.raises(WorkloadError, match=message) as caught:
        mixed(name, num_requests=40)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_weights_are_shares():
    assert parse_mix("mix:a=3,b=1") == {"a": 0.75, "b": 0.25}
    assert parse_mix("mix:batch:2x3+4=1, b=1") == {"batch:2x3+4": 0.5, "b": 0.5}


def test_a_part_that_is_never_drawn_is_not_read():
    made = mixed("mix:sharegpt=1,azure-code=1e-9", num_requests=10)
    assert made.parameters["source"]["parts"][1]["requests"] == 0
