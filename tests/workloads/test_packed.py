import numpy as np
import pytest

from backbench.workloads.packed import DATA, packed_azure, packed_mooncake, packed_sharegpt_lengths
from backbench.workloads.statistics import gap_cv, summarise_lengths


# The published figures of the traces, as far as they are given (rounded there).
@pytest.mark.parametrize(
    ("name", "rows", "rate", "cv", "inputs", "outputs"),
    [
        ("azure-conv", 19_366, 5.53, 1.09, (1155, 4142), (211, 601)),
        ("azure-code", 8_819, 2.57, 13.2, (2048, 7436), (28, 251)),
    ],
)
def test_azure(name, rows, rate, cv, inputs, outputs):
    trace = list(packed_azure(name))
    arrivals_ns = [row.arrival_ns for row in trace]
    assert len(trace) == rows
    assert rows / (arrivals_ns[-1] / 1e9) == pytest.approx(rate, abs=0.005)
    assert gap_cv(arrivals_ns) == pytest.approx(cv, abs=0.051)
    for lengths, (mean, p99) in (
        ([row.input_tokens for row in trace], inputs),
        ([row.output_tokens for row in trace], outputs),
    ):
        summary = summarise_lengths(lengths)
        assert (summary.mean, summary.p99) == (pytest.approx(mean, abs=0.5), pytest.approx(p99, abs=0.5))


def test_the_bursts_of_azure_code_survive_packing():
    arrivals_ns = np.array([row.arrival_ns for row in packed_azure("azure-code")])
    gaps = np.diff(arrivals_ns)
    silences = gaps[gaps > 130_000_000_000] / 1e9
    assert len(silences) == 5
    assert silences.min() > 138.7
    assert silences.max() < 218
    # Gaps below 10 ms, which cutting to hundredths of a second would turn to 0.
    assert (gaps[gaps < 10_000_000] > 0).mean() > 0.95


def test_the_first_rows_of_mooncake_are_those_of_the_file():
    trace = list(packed_mooncake())
    assert len(trace) == 12_031
    assert [(row.input_tokens, row.output_tokens) for row in trace[:3]] == [
        (6758, 500),
        (7322, 490),
        (7236, 794),
    ]
    assert trace[0].block_ids == tuple(range(14))
    assert trace[1].block_ids == (0, *range(14, 28))
    assert all(len(row.block_ids) == -(-row.input_tokens // 512) for row in trace)
    assert max(max(row.block_ids) for row in trace) == 182_789
    assert trace[-1].arrival_ns == 3_536_999_000_000
    assert np.mean([row.input_tokens for row in trace]) == pytest.approx(12_035, abs=0.5)
    assert np.mean([row.output_tokens for row in trace]) == pytest.approx(343, abs=0.5)


def test_the_usual_filter_leaves_the_known_part_of_sharegpt():
    lengths = packed_sharegpt_lengths()
    assert lengths.shape == (30_731, 2)
    prompts, outputs = lengths.T
    kept = lengths[(prompts >= 4) & (prompts <= 1024) & (outputs >= 4) & (prompts + outputs <= 2048)]
    assert len(kept) == 11_035
    assert kept.mean(axis=0).round().tolist() == [378, 419]
    assert np.median(kept, axis=0).tolist() == [297, 402]


def test_the_data_stay_small():
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 1_500_000
