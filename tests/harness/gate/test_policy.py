"""The policy file: what it may say, and one line where it says something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import HarnessError
from backbench.harness.gate.policy import METRICS, Policy, read_policy
from backbench.reports.metrics.catalogue import METRICS as CATALOGUE


def write(folder: Path, text: str) -> Path:
    file = folder / "bench-gate.toml"
    file.write_text(text)
    return file


def test_a_whole_policy(tmp_path: Path) -> None:
    text = (
        'workload = "synthetic"\noptions = ["--num-requests", "12"]\nseed = 5\n[margins]\ntpot_p50 = 0.02\n'
    )
    found = read_policy(write(tmp_path, text))
    assert found == Policy("synthetic", ("--num-requests", "12"), {"tpot_p50": 0.02}, 5)


def test_a_policy_of_kernels(tmp_path: Path) -> None:
    found = read_policy(write(tmp_path, 'kernels = ["--shapes", "1q1s1k"]'))
    assert found.kernels == ("--shapes", "1q1s1k") and found.margin("attention 1q1s1k", 1.0) == 0.05


def test_an_empty_policy_is_the_default(tmp_path: Path) -> None:
    assert read_policy(write(tmp_path, "")) == Policy()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workload = ", "no gate policy"),
        ("workload = 3", "must be a text"),
        ("colour = 'red'", "unknown key 'colour'"),
        ("options = '--num-requests 3'", "list of texts"),
        ("options = [3]", "list of texts"),
        ("options = ['--seed=3']", "--seed=3 is set by the gate"),
        ("options = ['--out', 'x']", "--out is set by the gate"),
        ("options = ['--find-load']", "--find-load is set by the gate"),
        ("seed = -1", "seed"),
        ("seed = true", "seed"),
        ("margins = 3", "must be a table"),
        ("[margins]\n", "at least one metric"),
        ("[margins]\nttft_p99 = 0.1", "'ttft_p99' cannot be gated"),
        ("[margins]\nthroughput = 0", "between 0 and 1"),
        ("[margins]\nthroughput = 5", "between 0 and 1"),
        ("[margins]\nthroughput = true", "between 0 and 1"),
        ("[margins]\nthroughput = '3 %'", "between 0 and 1"),
        ("[margins]\nthroughput = nan", "between 0 and 1"),
        ("[margins]\nkernel_time = 0.1", "'kernel_time' cannot be gated"),
        ("[margins]\n" + "\n".join(f"{name} = 0.1" for name in METRICS), "at most 6 metrics, not 7"),
        ("[floors]\nttft_p99 = 0.1", "'ttft_p99' has no floor"),
        ("[floors]\nthroughput = 0", "positive number"),
        ("[floors]\nthroughput = inf", "positive number"),
        ("[floors]\nthroughput = 'fast'", "positive number"),
        ("check = 'never'", "every or first"),
        ("kernels = '--shapes 1q1s1k'", "list of texts"),
        ("kernels = []\nworkload = 'synthetic'", "kernels run without workload"),
        ("kernels = []\n[margins]\nthroughput = 0.1", "choose from kernel_time"),
        ("kernels = []\n[floors]\nthroughput = 1", "has no floor"),
    ],
)
def test_a_bad_policy_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(HarnessError) as caught:
        read_policy(write(tmp_path, text))
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) < 300
    assert caught.value.exit_code == 2


@given(text=st.text(max_size=60))
def test_any_text_is_a_policy_or_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.mktemp("policy") / "gate.toml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        read_policy(file)
    except HarnessError as error:
        assert "\n" not in str(error)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="cannot be read: No such file"):
        read_policy(tmp_path / "none.toml")


def test_what_may_be_gated_stands_in_the_catalogue() -> None:
    known = {each.path: each for metric in CATALOGUE for each in metric.quantities()}
    for gated in METRICS.values():
        assert known[gated.quantity.path] is not None
        assert gated.quantity.higher_is_better is not None


def test_differences_are_losses_whichever_way_is_better() -> None:
    assert METRICS["throughput"].difference(100, 90) > 0
    assert METRICS["tpot_p50"].difference(0.02, 0.022) > 0
    assert METRICS["peak_memory"].difference(100, 90) < 0


def test_a_few_megabytes_are_no_loss_of_memory() -> None:
    policy = Policy(margins={"peak_memory": 0.01})
    assert policy.margin("peak_memory", 1 * 2**30) == pytest.approx(64 / 1024)
    assert policy.margin("peak_memory", 80 * 2**30) == 0.01
