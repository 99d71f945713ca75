import hashlib
import os
import struct
import subprocess
import sys
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from backbench.workloads.request import Request
from backbench.workloads.tokens import TokenSource, content_hash
from backbench.workloads.trace import Segment, TraceRow


@given(
    inputs=st.integers(1, 300),
    ids=st.lists(st.integers(0, 50), max_size=20),
    block_tokens=st.sampled_from([16, 64]),
    seed=st.integers(0, 100),
)
def test_prompts_from_block_ids_have_exactly_the_input_length(inputs, ids, block_tokens, seed):
    row = TraceRow(inputs, 1, block_ids=tuple(ids), block_tokens=block_tokens)
    source = TokenSource(seed, 500)
    prompt = source.prompt(0, row)
    assert len(prompt) == inputs
    assert all(0 <= token < 500 for token in prompt)
    for place, block_id in enumerate(ids[: inputs // block_tokens]):
        block = prompt[place * block_tokens : (place + 1) * block_tokens]
        assert block == source.block(block_id, block_tokens)


def test_the_same_id_means_the_same_tokens_even_in_a_partial_block():
    source = TokenSource(0, 1000)
    whole = source.prompt(0, TraceRow(1024, 1, block_ids=(4, 9), block_tokens=512))
    partial = source.prompt(1, TraceRow(700, 1, block_ids=(4, 9), block_tokens=512))
    other = source.prompt(2, TraceRow(700, 1, block_ids=(4, 8), block_tokens=512))
    assert whole[:700] == partial
    assert other[:512] == partial[:512]
    assert other[512:] != partial[512:]


def test_segments_are_shared_by_name_and_cut_to_the_length():
    def shared(session: str) -> tuple[Segment, ...]:
        return Segment("prefix", 1, 16), Segment(f"history/{session}", 0, 100)

    source = TokenSource(0, 1000)
    first = source.prompt(0, TraceRow(50, 1, segments=shared("a")))
    second = source.prompt(7, TraceRow(90, 1, segments=shared("a")))
    stranger = source.prompt(8, TraceRow(90, 1, segments=shared("b")))
    assert second[:50] == first
    assert stranger[:16] == first[:16]
    assert stranger[16:] != second[16:]


REQUESTS = (Request(0, 0, (1, 2, 3), 4), Request(1, 10, (5,), 6))


def test_the_hash_covers_arrival_tokens_lengths_and_order():
    variants = [
        REQUESTS,
        REQUESTS[::-1],
        (REQUESTS[0],),
        (replace(REQUESTS[0], arrival_ns=1), REQUESTS[1]),
        (replace(REQUESTS[0], prompt=(1, 2, 4)), REQUESTS[1]),
        (replace(REQUESTS[0], output_tokens=5), REQUESTS[1]),
    ]
    assert len({content_hash(variant) for variant in variants}) == len(variants)
    assert content_hash((replace(REQUESTS[0], id=9), REQUESTS[1])) == content_hash(REQUESTS)


def test_the_hash_is_fixed_for_good():
    # Written out by hand: the heading, then (arrival, prompt length, output length) and the ids of each.
    data = b"backbench workload 1\n"
    data += struct.pack("<3q3i", 0, 3, 4, 1, 2, 3) + struct.pack("<3q1i", 10, 1, 6, 5)
    assert content_hash(REQUESTS) == hashlib.sha256(data).hexdigest()


def test_another_process_with_another_hash_seed_makes_the_same_workload():
    program = (
        "from backbench.workloads.catalogue import make\n"
        "from backbench.workloads.options import WorkloadOptions\n"
        "options = WorkloadOptions(num_requests=20, rate=5, shared_prefix='4x32', turns=2, seed=3)\n"
        "print(make('synthetic', options).content_hash)"
    )
    hashes = set()
    for hash_seed in ("0", "1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        hashes.add(done.stdout.strip())
    assert len(hashes) == 1
    assert len(hashes.pop()) == 64
