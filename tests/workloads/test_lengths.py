import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import WorkloadError
from backbench.workloads.lengths import parse_lengths

SPECS = [
    "fixed:7",
    "uniform:3:9",
    "normal:50:20",
    "normal:50:20:60",
    "lognormal:512:0.6",
    "lognormal:512:0.6:1024",
    "zipf:1.2:100",
    "empirical:4,8,15,16",
]


def draw(spec: str, count: int, seed: int = 0) -> list[int]:
    return parse_lengths(spec).sample(np.random.Generator(np.random.PCG64(seed)), count)


@pytest.mark.parametrize("spec", SPECS)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 60), more=st.integers(0, 60))
def test_more_draws_leave_the_first_as_they_were(spec, seed, count, more):
    longer = draw(spec, count + more, seed)
    assert longer[:count] == draw(spec, count, seed)
    assert all(isinstance(value, int) and value >= 1 for value in longer)


@given(low=st.integers(1, 1000), width=st.integers(0, 1000), seed=st.integers(0, 99))
def test_uniform_stays_within_its_ends(low, width, seed):
    assert all(low <= value <= low + width for value in draw(f"uniform:{low}:{low + width}", 50, seed))


def test_fixed_uniform_and_empirical_take_just_their_values():
    assert set(draw("fixed:7", 100)) == {7}
    assert set(draw("uniform:3:5", 300)) == {3, 4, 5}
    assert set(draw("empirical:4,8,15", 300)) == {4, 8, 15}


# Means of 20,000 draws: five standard errors, sigma / sqrt(20000), of the distribution in question.
def test_moments():
    count = 20_000
    assert abs(np.mean(draw("normal:500:20", count)) - 500) < 5 * 20 / math.sqrt(count)
    logs = np.log(draw("lognormal:5000:0.6", count))
    assert abs(logs.mean() - math.log(5000)) < 5 * 0.6 / math.sqrt(count)
    assert abs(logs.std() - 0.6) < 5 * 0.6 / math.sqrt(2 * count)
    ones = np.mean(np.array(draw("zipf:1.0:4", count)) == 1)
    expected = 1 / (1 + 1 / 2 + 1 / 3 + 1 / 4)
    assert abs(ones - expected) < 5 * math.sqrt(expected * (1 - expected) / count)


def test_the_maximum_holds():
    assert max(draw("lognormal:512:0.6:600", 1000)) == 600
    assert min(draw("normal:2:50", 1000)) == 1
    assert max(draw("zipf:1.1:16", 2000)) <= 16


def test_empirical_from_a_file(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("10\n\n20\n")
    assert set(draw(f"empirical:{path}", 100)) == {10, 20}
    path.write_text("10\nx\n")
    with pytest.raises(WorkloadError, match=r"lengths\.txt, line 2, field length"):
        parse_lengths(f"empirical:{path}")


@pytest.mark.parametrize(
    "spec",
    [
        "fixed",
        "fixed:0",
        "fixed:-3",
        "fixed:nan",
        "uniform:9:3",
        "uniform:1",
        "normal:5:-1",
        "lognormal:x:1",
        "zipf:0:10",
        "zipf:1:1e9",
        "empirical:",
        "empirical:1,,2",
        "empirical:0",
        "fixed:1:2",
        "",
    ],
)
def test_bad_specs_are_one_line_errors(spec):
    with pytest.raises(WorkloadError) as caught:
        parse_lengths(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9" * 6000, "line 1, field length: '9999"),
        ("10\n\n100000001", "line 3, field length: 100000001 is not between 1 and 100000000."),
        ("10\n0", "line 2, field length: 0 is not between"),
        ("10\n\x1b[2J", r"line 2, field length: '\\x1b"),
        ("", "holds no lengths"),
        ("\n \n", "holds no lengths"),
    ],
)
def test_a_file_that_is_no_list_of_lengths_is_one_line(tmp_path, text, expected):
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=expected) as caught:
        parse_lengths(f"empirical:{path}")
    assert str(caught.value).isprintable()
    assert len(str(caught.value).replace(str(path), "")) < 300


@given(kind=st.sampled_from(["fixed", "uniform", "empirical", "nonsense"]), rest=st.text(max_size=9000))
def test_any_spec_gives_lengths_or_one_line(kind, rest):
    try:
        found = draw(f"{kind}:{rest}", 5)
    except WorkloadError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 300
    else:
        assert all(value >= 1 for value in found)


@pytest.mark.parametrize(
    "spec", ["empirical:" + "9" * 5000, "empirical:1," + "9" * 5000, "fixed:" + "9" * 5000]
)
def test_a_number_of_thousands_of_digits_is_one_line(spec):
    with pytest.raises(WorkloadError) as caught:
        parse_lengths(spec)
    assert len(str(caught.value)) < 300


def test_an_unknown_distribution_names_the_nearest():
    with pytest.raises(WorkloadError, match="did you mean lognormal"):
        parse_lengths("lognorm:512:0.6")
