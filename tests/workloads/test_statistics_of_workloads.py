import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import WorkloadError
from backbench.reports.metrics.schedule import index_of_dispersion
from backbench.workloads.packed import packed_mooncake
from backbench.workloads.statistics import (
    block_reuse_ratio,
    gap_cv,
    ideal_prefix_hit_ratio,
    ks_distance,
    summarise_lengths,
)


def test_constant_arrivals_have_dispersion_0():
    arrivals = [i * 10 for i in range(1000)]
    assert index_of_dispersion(arrivals, 100) == 0
    assert gap_cv(arrivals) == 0


def test_dispersion_by_hand():
    # Windows [0,10), [10,20), [20,30) hold 3, 1 and 2 arrivals: variance 1, mean 2. The rest is left out.
    assert index_of_dispersion([0, 1, 2, 15, 21, 22, 30, 31], 10) == pytest.approx(0.5)
    assert index_of_dispersion([0, 5], 10) is None
    assert index_of_dispersion([], 10) is None
    assert gap_cv([0, 0, 0]) is None


def test_prefix_hits_by_hand():
    prompts = [(1, 2, 3, 4, 5), (1, 2, 3, 4, 9), (1, 2, 8, 8, 9), (8, 8, 3, 4, 5), (1, 2, 3, 4)]
    # Block 2: nothing, 4 of 5, 2 of 5, none (its blocks stand elsewhere), and 2 of 4: the last is computed.
    assert ideal_prefix_hit_ratio(prompts, 2) == pytest.approx((4 + 2 + 0 + 2) / 24)
    assert ideal_prefix_hit_ratio([], 2) == 0
    # Of a prompt of two whole blocks only the first can be found.
    assert ideal_prefix_hit_ratio([range(32), range(32)], 16) == 0.25


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=12), st.integers(1, 4))
def test_prefix_hits_match_a_plain_search(prompts, block):
    hits = total = 0
    for index, prompt in enumerate(prompts):
        best = 0
        for earlier in prompts[:index]:
            length = 0
            while length + block <= min(len(prompt), len(earlier)) and (
                prompt[length : length + block] == earlier[length : length + block]
            ):
                length += block
            best = max(best, length)
        hits += min(best, (len(prompt) - 1) // block * block)
        total += len(prompt)
    assert ideal_prefix_hit_ratio(prompts, block) == pytest.approx(hits / total if total else 0)


def test_mooncake_shares_the_published_part_of_its_prefixes():
    assert block_reuse_ratio(packed_mooncake()) == pytest.approx(0.366, abs=0.0005)


def test_summary_and_distance():
    summary = summarise_lengths([1, 2, 3, 4])
    assert (summary.count, summary.mean, summary.p50, summary.minimum, summary.maximum) == (4, 2.5, 2.5, 1, 4)
    assert ks_distance([1, 2, 3], [1, 2, 3]) == 0
    assert ks_distance([1, 2], [3, 4]) == 1
    assert ks_distance([1, 2, 3, 4], [3, 4, 5, 6]) == 0.5
    with pytest.raises(WorkloadError):
        summarise_lengths([])
