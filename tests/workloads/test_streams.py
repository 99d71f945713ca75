import multiprocessing

import numpy as np

from backbench.workloads.streams import stream
from backbench.workloads.tokens import TokenSource
from backbench.workloads.trace import TraceRow


def test_a_stream_depends_on_seed_name_and_index_only():
    first = stream(1, "lengths", 3).random(4)
    assert np.array_equal(first, stream(1, "lengths", 3).random(4))
    others = [stream(2, "lengths", 3), stream(1, "arrivals", 3), stream(1, "lengths", 4)]
    assert all(not np.array_equal(first, other.random(4)) for other in others)


def test_a_stream_is_fixed_for_good():
    assert stream(0, "arrivals").integers(1000, size=4).tolist() == [875, 99, 945, 671]


def test_prompts_do_not_depend_on_the_number_of_workers():
    source = TokenSource(5, 1000)
    jobs = [(index, TraceRow(input_tokens=20 + index, output_tokens=1)) for index in range(12)]
    alone = [source.prompt(*job) for job in jobs]
    # Only importable names reach the workers: a function of this file would not, and the pool would wait.
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        spread = pool.starmap(source.prompt, reversed(jobs), chunksize=1)
    assert spread[::-1] == alone
    assert len(set(alone)) == 12
