import math
import multiprocessing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import WorkloadError
from backbench.reports.metrics.schedule import index_of_dispersion
from backbench.workloads.arrivals import Arrivals
from backbench.workloads.catalogue import make
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.statistics import gap_cv
from backbench.workloads.streams import stream

PROCESSES = [
    Arrivals("constant", 7.0),
    Arrivals("poisson", 7.0),
    Arrivals("gamma", 7.0, 2.0),
    Arrivals("weibull", 7.0, 2.0),
    Arrivals("ramp:0:20:30"),
    Arrivals("steps:5@10,0@5,20@10"),
    Arrivals("bursts:20:2:3"),
    Arrivals("sine:5:0.9:60"),
]
IDS = [process.spec for process in PROCESSES]


def times(process: Arrivals, count: int, seed: int = 0) -> list[int]:
    return process.times_ns(np.random.Generator(np.random.PCG64(seed)), count)


@pytest.mark.parametrize("process", PROCESSES, ids=IDS)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 40), more=st.integers(0, 40))
def test_every_process_starts_at_0_in_order_and_is_prefix_stable(process, seed, count, more):
    longer = times(process, count + more, seed)
    assert len(longer) == count + more
    assert longer == sorted(longer)
    assert longer[:1] in ([], [0])
    assert longer[:count] == times(process, count, seed)


@pytest.mark.parametrize("rate", [0.5, 3, 7, 333.3])
def test_constant_gaps_are_equal_and_not_random(rate):
    arrivals = times(Arrivals("constant", rate), 1000)
    assert len(set(np.diff(arrivals))) == 1
    assert arrivals[1] == round(1e9 / rate)
    assert arrivals == times(Arrivals("constant", rate), 1000, seed=1)


@pytest.mark.parametrize("seed", range(5))
def test_poisson_has_dispersion_1(seed):
    arrivals = times(Arrivals("poisson", 200.0), 20_000, seed)
    windows = arrivals[-1] // 1_000_000_000
    # (m - 1) * index is chi-squared(m - 1): standard deviation sqrt(2 / (m - 1)); four of them.
    assert abs(index_of_dispersion(arrivals, 1_000_000_000) - 1) < 4 * math.sqrt(2 / (windows - 1))
    # The gaps' CV has standard error 1 / sqrt(n) for exponential gaps; the rate too, relative.
    assert abs(gap_cv(arrivals) - 1) < 4 / math.sqrt(20_000)
    assert abs(19_999 / (arrivals[-1] / 1e9) / 200 - 1) < 4 / math.sqrt(20_000)


def test_poisson_is_not_rescaled_to_end_on_the_second():
    ends = [times(Arrivals("poisson", 100.0), 100, seed)[-1] for seed in range(50)]
    assert len(set(ends)) == 50
    # The end is a sum of 99 exponentials of mean 10 ms: its own spread is 10 ms * sqrt(99), about 0.1 s.
    assert 0.05e9 < np.std(ends) < 0.2e9


@pytest.mark.parametrize("kind", ["gamma", "weibull"])
@pytest.mark.parametrize("cv", [0.3, 1.0, 2.5])
def test_gaps_have_the_asked_cv_and_rate(kind, cv):
    arrivals = times(Arrivals(kind, 10.0, cv), 60_000)
    # Mean: cv / sqrt(n) = 1 % at most, four of them. The CV's own error grows with the tail: 10 % at CV 2.5.
    assert abs(59_999 / (arrivals[-1] / 1e9) / 10 - 1) < 0.041
    assert abs(gap_cv(arrivals) / cv - 1) < 0.10


def count_between(arrivals: list[int], start_s: float, end_s: float) -> int:
    return sum(start_s * 1e9 <= arrival < end_s * 1e9 for arrival in arrivals)


@pytest.mark.parametrize(
    ("spec", "start_s", "end_s", "expected"),
    [
        ("ramp:0:100:20", 0, 20, 1000),
        ("ramp:100:10:20", 20, 60, 400),
        ("steps:50@10,0@10,100@10", 0, 10, 500),
        ("steps:50@10,0@10,100@10", 20, 40, 2000),
        ("bursts:100:1:4", 0, 50, 1000),
        ("sine:20:1:40", 0, 20, 20 * 20 + 20 * 40 / math.pi),
        ("sine:20:1:40", 20, 40, 20 * 20 - 20 * 40 / math.pi),
    ],
)
def test_profiles_have_the_integral_of_their_rate(spec, start_s, end_s, expected):
    arrivals = times(Arrivals(spec), 6000)
    # Counts of a Poisson process: standard deviation sqrt(mean); four of them, and the arrival at 0.
    assert abs(count_between(arrivals, start_s, end_s) - expected) < 4 * math.sqrt(expected) + 1


def test_nothing_is_sent_in_a_silence():
    assert count_between(times(Arrivals("steps:50@10,0@10,100@10"), 3000), 10, 20) == 0
    assert all(
        arrival % 5_000_000_000 <= 1_000_000_000 for arrival in times(Arrivals("bursts:100:1:4"), 3000)
    )


@pytest.mark.parametrize(
    ("spec", "rate", "cv"),
    [
        ("poisson", None, None),
        ("poisson", 0.0, None),
        ("poisson", -1.0, None),
        ("poisson", math.nan, None),
        ("poisson", math.inf, None),
        ("poisson", 1.0, 2.0),
        ("gamma", 1.0, None),
        ("gamma", 1.0, 0.0),
        ("weibull", 1.0, -1.0),
        ("ramp:1:2", None, None),
        ("ramp:1:0:5", None, None),
        ("ramp:1:2:3", 5.0, None),
        ("steps:1@2,3", None, None),
        ("steps:1@5,0@5", None, None),
        ("bursts:0:1:1", None, None),
        ("sine:5:2:10", None, None),
        ("sine:x:1:10", None, None),
        ("poison", 1.0, None),
    ],
)
def test_bad_processes_are_one_line_errors(spec, rate, cv):
    with pytest.raises(WorkloadError) as caught:
        Arrivals(spec, rate, cv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "rate", "cv"),
    [
        ("ramp:1e-300:1e-300:1", None, None),
        ("ramp:0:5e-324:1", None, None),
        ("steps:1e-300@1", None, None),
        ("bursts:1e9:1e-300:1e9", None, None),
        ("sine:1e-300:0:1", None, None),
        ("sine:5:1:5e-324", None, None),
        ("constant", 1e-300, None),
        ("poisson", 5e-324, None),
        ("gamma", 1e-12, 20.0),
        ("weibull", 1e-12, 20.0),
        ("steps:" + ",".join(["1e-300@1"] * 1000), None, None),
    ],
)
def test_times_that_no_clock_can_hold_are_refused(spec, rate, cv, recwarn):
    """Not sent all at once, which is what an overflow makes of them."""
    with pytest.raises(WorkloadError) as caught:
        times(Arrivals(spec, rate, cv), 20)
    assert "146 years" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert not recwarn.list


def test_a_slow_start_that_comes_to_a_rate_is_served():
    assert np.all(np.diff(times(Arrivals("ramp:1e-300:1:1e9"), 20)) > 0)


@given(
    kind=st.sampled_from(["ramp", "steps", "bursts", "sine"]),
    numbers=st.lists(st.floats(0, 1e9), min_size=2, max_size=6),
    count=st.integers(0, 20),
)
def test_any_numbers_give_times_in_order_or_one_line(kind, numbers, count):
    parts = [repr(number) for number in numbers]
    if kind == "steps":
        parts = [",".join(f"{rate}@{length}" for rate, length in zip(parts[::2], parts[1::2], strict=False))]
    try:
        found = times(Arrivals(":".join([kind, *parts])), count)
    except WorkloadError as error:
        assert len(str(error)) < 300
        return
    assert found == sorted(found)
    assert found[:1] in ([], [0])
    assert all(0 <= at < 2**62 for at in found)


@given(
    kind=st.sampled_from(["constant", "poisson", "gamma", "weibull"]),
    rate=st.floats(0, 1e6),
    cv=st.floats(0.05, 20),
)
def test_any_rate_gives_times_in_order_or_one_line(kind, rate, cv):
    try:
        found = times(Arrivals(kind, rate, cv if kind in ("gamma", "weibull") else None), 20)
    except WorkloadError as error:
        assert len(str(error)) < 300
        return
    assert found == sorted(found)
    assert all(0 <= at < 2**62 for at in found)


# Bounds of the tests below are four standard errors: a right process fails one in 16,000 seeds, and the
# seeds are fixed. They come from the delta method on a renewal process's gaps (Cox and Lewis 1966).


def moments(kind: str, cv: float) -> tuple[float, float]:
    """Skewness and kurtosis of the gaps."""
    if kind == "gamma":
        return 2 * cv, 3 + 6 * cv * cv
    low, high = 0.1, 100.0
    for _ in range(100):
        shape = (low + high) / 2
        found = math.gamma(1 + 2 / shape) / math.gamma(1 + 1 / shape) ** 2 - 1
        low, high = (shape, high) if found > cv * cv else (low, shape)
    raw = [math.gamma(1 + power / shape) for power in range(5)]
    variance = raw[2] - raw[1] ** 2
    third = raw[3] - 3 * raw[1] * raw[2] + 2 * raw[1] ** 3
    fourth = raw[4] - 4 * raw[1] * raw[3] + 6 * raw[1] ** 2 * raw[2] - 3 * raw[1] ** 4
    return third / variance**1.5, fourth / variance**2


@pytest.mark.parametrize("kind", ["gamma", "weibull"])
@pytest.mark.parametrize("cv", [0.4, 1.0, 2.0])
def test_renewal_processes_have_the_rate_cv_and_dispersion_asked(kind, cv):
    count, rate = 40_000, 50.0
    arrivals = times(Arrivals(kind, rate, cv), count + 1)
    assert abs(count / (arrivals[-1] / 1e9) / rate - 1) < 4 * cv / math.sqrt(count)
    # Var(sample CV) = CV^2 / n * ((kurtosis - 1) / 4 - skewness * CV + CV^2): 1 / n for exponential gaps.
    skewness, kurtosis = moments(kind, cv)
    spread = cv * math.sqrt(((kurtosis - 1) / 4 - skewness * cv + cv * cv) / count)
    assert abs(gap_cv(arrivals) - cv) < 4 * spread
    # Counts in windows of 200 mean gaps: the index tends to CV^2, and is off by
    # (1/6 + CV^4/2 - skewness CV^3/3) / 200 there; its own spread is that of a variance of m counts.
    windows = count // 200
    expected = cv * cv + (1 / 6 + cv**4 / 2 - skewness * cv**3 / 3) / 200
    found = index_of_dispersion(arrivals, round(200 / rate * 1e9))
    assert abs(found - expected) < 4 * expected * math.sqrt(2 / (windows - 1))


INTEGRALS = {
    "ramp:2:20:60": lambda t: np.where(t < 60, 2 * t + 18 * t * t / 120, 660 + 20 * (t - 60)),
    "steps:5@10,0@5,20@10": lambda t: np.where(t < 15, 5 * np.minimum(t, 10), 50 + 20 * (t - 15)),
    "bursts:20:2:3": lambda t: 20 * (2 * (t // 5) + np.minimum(t % 5, 2)),
    "sine:20:0.9:60": lambda t: 20 * (t + 0.9 * 60 / (2 * np.pi) * (1 - np.cos(2 * np.pi * t / 60))),
}
"""Expected arrivals until t (s), written out anew for each form."""


@pytest.mark.parametrize("spec", list(INTEGRALS))
def test_processes_of_changing_rate_are_poisson_in_the_time_of_their_rate(spec):
    """Time rescaling: arrivals mapped through the integrated rate are a Poisson process of rate 1."""
    count = 20_000
    arrivals = times(Arrivals(spec), count + 1)
    # Not only on average: each is the same unit-rate arrival, within the rounding of times to 1 us at 38/s.
    gaps = np.random.Generator(np.random.PCG64(0)).standard_exponential(count)
    mapped = INTEGRALS[spec](np.array(arrivals) / 1e9)
    assert np.abs(mapped[1:] - np.cumsum(gaps)).max() < 38 * 1e-6
    rescaled = np.rint(INTEGRALS[spec](np.array(arrivals) / 1e9) * 1e9).astype(np.int64)
    assert abs(count / (rescaled[-1] / 1e9) - 1) < 4 / math.sqrt(count)
    assert abs(gap_cv(rescaled) - 1) < 4 / math.sqrt(count)
    found = index_of_dispersion(rescaled.tolist(), 20_000_000_000)
    assert abs(found - 1) < 4 * math.sqrt(2 / (count / 20 - 1))


def test_bursts_and_days_show_in_the_index_of_dispersion():
    """In windows of a tenth of a period, counts vary as Poisson ones do, and with their means besides."""
    for spec, window_s in (("bursts:20:2:3", 0.5), ("sine:20:0.9:60", 6.0)):
        arrivals = times(Arrivals(spec), 20_001)
        ends = np.arange(0, arrivals[-1] / 1e9, window_s)
        means = np.diff(INTEGRALS[spec](ends))
        expected = 1 + means.var() / means.mean()
        assert expected > 5
        # Counts N of means m about their mean: Var((N - mean)^2) = m + 2 m^2 + 4 a^2 m + 4 a m with
        # a = m - mean. The mean's own spread adds at most its share of the index.
        apart = means - means.mean()
        squares = np.sum(means + 2 * means**2 + 4 * apart**2 * means + 4 * apart * means)
        spread = (np.sqrt(squares) + expected * np.sqrt(means.sum())) / means.sum()
        found = index_of_dispersion(arrivals, round(window_s * 1e9))
        assert abs(found - expected) < 4 * spread


def test_a_closed_loop_and_all_at_once_have_no_process():
    for offer, count in (({"concurrency": 4}, 4), ({"all_at_once": True}, None)):
        made = make("synthetic", WorkloadOptions(num_requests=9, **offer))
        assert made.concurrency == count and made.schedule_s is None
        assert {request.arrival_ns for request in made.requests} == {0}


@pytest.mark.parametrize("process", PROCESSES, ids=IDS)
def test_every_process_can_be_asked_for(process):
    options = WorkloadOptions(num_requests=30, rate=process.rate, arrival=process.spec, cv=process.cv)
    made = make("synthetic", options)
    offered = made.parameters["offered"]
    assert (offered["arrival"], offered["rate"], offered["cv"]) == (process.spec, process.rate, process.cv)
    assert [r.arrival_ns for r in made.requests] == process.times_ns(stream(0, "arrivals"), 30)


def test_streams_are_the_same_with_1_and_8_workers_and_in_another_process():
    """Each worker makes the whole stream of the seed and takes its share: none has a seed of its own."""
    asked = [
        WorkloadOptions(
            seed=3, num_requests=200, rate=each.rate, arrival=each.spec, cv=each.cv,
            input_lengths="fixed:1", output_lengths="fixed:1",
        )
        for each in PROCESSES
    ]  # fmt: skip
    alone = [make("synthetic", options) for options in asked]
    with multiprocessing.get_context("spawn").Pool(2) as two:
        made = two.starmap(make, [("synthetic", options) for _ in range(8) for options in asked], chunksize=1)
    for place, expected in enumerate(alone):
        workers = made[place :: len(PROCESSES)]
        assert {each.content_hash for each in workers} == {expected.content_hash}
        shares = [request for worker, each in enumerate(workers) for request in each.requests[worker::8]]
        assert tuple(sorted(shares, key=lambda request: request.id)) == expected.requests


def test_workers_seeded_alike_are_seen_in_the_index_of_dispersion():
    """What others have done: as many requests at once as there are workers, and the index says so."""
    alike = sorted(8 * Arrivals("poisson", 25.0).times_ns(stream(0, "arrivals"), 5_000))
    one = Arrivals("poisson", 200.0).times_ns(stream(0, "arrivals"), 40_000)
    # About 200 windows of 1 s: (m - 1) times the index over its value is chi-squared.
    for arrivals, expected in ((alike, 8), (one, 1)):
        found = index_of_dispersion(arrivals, 1_000_000_000)
        assert abs(found - expected) < 4 * expected * math.sqrt(2 / 190)
