"""Offline tuning's choice: wrong launches are refused, and the fastest right one wins if it is worth it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from backbench.backends.tuning.search import Problem, _compile_all, describe, sweep
from backbench.backends.tuning.table import Config
from backbench.errors import BackendError


@dataclass
class FakeProblem(Problem):
    """Launches are {"tile": n}; `times` holds what each takes, `errors` how wrong each is."""

    times: dict[int | None, Sequence[float] | Exception]
    errors: dict[int, float] = field(default_factory=dict)
    base: Config | None = None
    dense: float | None = None

    operation = "gemm"
    bucket = "m1 n64 k32"
    dtype = "bfloat16"
    sources = "0123456789abcdef"
    tolerance = 1e-2
    compiled: tuple[Config, ...] = ()

    def baseline(self) -> Config | None:
        return self.base

    def candidates(self) -> Sequence[Config]:
        return [{"tile": tile} for tile in self.times if tile is not None]

    def error(self, config: Config) -> float:
        return self.errors.get(config["tile"], 1e-3)

    def times_us(self, config: Config | None) -> Sequence[float]:
        found = self.times[None if config is None else config["tile"]]
        if isinstance(found, Exception):
            raise found
        return found

    def dense_us(self) -> float | None:
        return self.dense

    def compile(self, config: Config) -> None:
        if isinstance(self.times[config["tile"]], Exception):
            raise RuntimeError("does not compile")


def test_the_fastest_right_launch_wins() -> None:
    found = sweep(FakeProblem({None: [10.0], 1: [9.0], 2: [7.0], 3: [8.0]}))
    assert found.entry.config == {"tile": 2}
    assert (found.entry.operation, found.entry.bucket) == ("gemm", "m1 n64 k32")
    assert found.entry.sources == "0123456789abcdef"
    assert (found.baseline_us, found.best_us) == pytest.approx((10.0, 7.0))
    assert found.tried == 4
    assert found.refused == ()


@pytest.mark.parametrize("error", [0.5, math.nan, 1e-2])
def test_a_wrong_launch_is_refused_however_fast(error: float) -> None:
    found = sweep(FakeProblem({None: [10.0], 1: [1.0], 2: [7.0]}, errors={1: error}))
    assert found.entry.config == {"tile": 2}
    (reason,) = found.refused
    assert reason.startswith("tile=1: relative error")


def test_a_launch_that_does_not_compile_is_passed_over_and_said() -> None:
    found = sweep(FakeProblem({None: [10.0], 1: RuntimeError("out of\nshared memory"), 2: [7.0]}))
    assert found.entry.config == {"tile": 2}
    assert found.refused == ("tile=1: RuntimeError: shared memory",)


def test_the_baseline_stays_where_nothing_is_clearly_faster() -> None:
    assert sweep(FakeProblem({None: [10.0], 1: [9.9]})).entry.config is None
    assert sweep(FakeProblem({None: [10.0]})).entry.config is None
    written = sweep(FakeProblem({1: [10.0], 2: [12.0]}, base={"tile": 1}))
    assert written.entry.config == {"tile": 1}
    assert written.tried == 2, "the baseline is not tried twice"


def test_the_entry_has_its_own_time_beside_that_of_the_dense_product() -> None:
    beside = sweep(FakeProblem({None: [10.0], 1: [7.127]}, dense=12.344)).entry
    assert (beside.us, beside.dense_us) == (7.13, 12.34)
    stays = sweep(FakeProblem({1: [10.0], 2: [9.9]}, base={"tile": 1}, dense=12.0)).entry
    assert (stays.config, stays.us) == ({"tile": 1}, 10.0)
    alone = sweep(FakeProblem({None: [10.0], 1: [7.0]})).entry
    assert alone.us is alone.dense_us is None


def test_every_shape_of_a_bucket_counts_the_same() -> None:
    """Geometric means: 2 % of the long shape must not outweigh half of the short one."""
    found = sweep(FakeProblem({1: [10.0, 1000.0], 2: [5.0, 1020.0]}, base={"tile": 1}))
    assert found.entry.config == {"tile": 2}
    assert found.best_us == pytest.approx(math.sqrt(5.0 * 1020.0))


def test_a_baseline_that_fails_loses_to_any_right_launch() -> None:
    found = sweep(FakeProblem({1: RuntimeError("no"), 2: [50.0]}, base={"tile": 1}))
    assert found.entry.config == {"tile": 2}


def test_nothing_that_works_is_an_error_with_the_first_reason() -> None:
    with pytest.raises(BackendError, match=r"gemm m1 n64 k32 .* tile=1: RuntimeError: no"):
        sweep(FakeProblem({1: RuntimeError("no"), 2: [5.0]}, errors={2: 1.0}, base={"tile": 1}))


def test_candidates_are_compiled_ahead_and_a_failure_there_is_left_to_the_sweep() -> None:
    seen: list[Config] = []

    def each(compile_one: Any, configs: Sequence[Config]) -> None:
        seen.extend(configs)
        assert [bool(compile_one(config)) for config in configs] == [False, True]

    problem = FakeProblem({None: [10.0], 1: [9.0], 2: RuntimeError("no")})
    found = sweep(problem, lambda problem, configs: _compile_all(each, problem, configs))
    assert seen == [{"tile": 1}, {"tile": 2}]
    assert found.entry.config == {"tile": 1}


def test_a_launch_in_one_line() -> None:
    assert describe(None) == "the library"
    assert describe({"TILE": 64, "DESCRIPTOR": False, "maxnreg": None, "swap": True}) == "TILE=64 swap=True"
