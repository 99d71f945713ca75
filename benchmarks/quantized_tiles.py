"""Weight-only quantized products of many rows beside bf16, by every launch of the tile kernel worth trying.

`python benchmarks/quantized_tiles.py` prints a line for each scheme, shape and number of rows: bf16, the way
that serves now, the weight written out, and each tile launch, in us, cold and in a graph. Before a launch is
timed, and again afterwards, all its numbers are held to `quantization.product`, and those of several runs to
each other bit for bit: a race shows in some runs only. It writes quantized_tiles.json after each case and
ends with code 1 if any launch was wrong. `--again TABLE` instead measures the products of a former tuning
table that the present one lacks, that table's launches among the others. `--keep JSON` instead writes the
fastest ways of such a file into the tuning table, of those that are tried still; it needs no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbench.backends import quantization
from backbench.backends.interface import Config, Scheme
from backbench.backends.interface.device import gpu
from backbench.backends.triton import configs, quantized_configs
from backbench.backends.triton.quantized_configs import BUCKETS, Dequantized, Tile
from backbench.backends.triton.quantized_tune import QuantizedProblem
from backbench.backends.triton.tile_launches import tile_launches
from backbench.backends.tuning import table
from benchmarks.graph_timing import conditions
from benchmarks.quantized_gemm import SHAPES, clocks, dense_us

WEIGHT_ONLY = {
    **{name: scheme for name, scheme in quantization.SCHEMES.items() if scheme.activation is None},
    "fp8-weights": Scheme("fp8"),
}
USUAL = ("int4-g128", "int8", "nvfp4", "int4-g32", "fp8-weights")
ROWS = (128, 256, 64, 512, 192, 384)
"""What tells most first."""
BF16 = torch.bfloat16
RUNS = 4
FARTHEST = 0.05
"""Of an output's distance from the specification's, over all outputs' root mean square. Rounding to bf16
makes 0.01 where an output is five times that large, rounding the weight's numbers as much again."""
Case = tuple[int, str, str]
"""Rows, shape, scheme."""
Former = dict[tuple[str, str, str], Config | None]
"""Operation, bucket and dtype -> the launch that served them."""


class Wrong(Exception):
    """Numbers that are not the product's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--shapes", nargs="*", default=["28672x4096"], choices=list(SHAPES))
    parser.add_argument("--schemes", nargs="*", default=list(USUAL), choices=list(WEIGHT_ONLY))
    parser.add_argument("--budget-s", type=float, default=150, help="begin no further case after these")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "parts")
    parser.add_argument("--again", type=Path, metavar="TABLE")
    parser.add_argument("--keep", type=Path, metavar="JSON")
    options = parser.parse_args()
    if options.keep:
        keep(json.loads(options.keep.read_text()))
        return
    until = time.monotonic() + options.budget_s
    place = (gpu(0).arch, gpu(0).units)
    former: Former = {}
    if options.again:
        former = {
            each.key: each.config for each in table.read(options.again, table.place(*place)).entries.values()
        }
    cases = [(rows, *of) for rows, *of in itertools.product(options.rows, options.shapes, options.schemes)]
    cases = lacking(former) if options.again else cases
    options.output.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for row in measure(cases, former, until):
        found.append(row)
        record = {"place": place, "conditions": conditions(), "clocks": clocks(), "rows": found}
        (options.output / "quantized_tiles.json").write_text(json.dumps(record, indent=1) + "\n")
    wrong = sum(len(row["wrong"]) for row in found)
    print(f"{len(found)} of {len(cases)} cases, {wrong} wrong launches")
    sys.exit(min(wrong, 1))


def problem_of(case: Case) -> QuantizedProblem:
    """The product of a case."""
    rows, shape, scheme = case
    return QuantizedProblem(rows, *SHAPES[shape], WEIGHT_ONLY[scheme], BF16, gpu(0), replays=9)


def key_of(case: Case) -> tuple[str, str, str]:
    """Operation, bucket and dtype of a case's tuning entry."""
    rows, shape, name = case
    scheme = WEIGHT_ONLY[name]
    bucket = configs.bucket_name(rows, *SHAPES[shape])
    return quantized_configs.operation(scheme), bucket, quantized_configs.entry_dtype(scheme, BF16)


def lacking(former: Former) -> list[Case]:
    """Cases of a former table's entries that the present one lacks, schemes and shapes together."""
    present = configs.table(gpu(0).arch, gpu(0).units).entries
    every = ((rows, *of) for *of, rows in itertools.product(SHAPES, WEIGHT_ONLY, BUCKETS))
    return [case for case in every if key_of(case) in former and key_of(case) not in present]


def ways(case: Case, problem: QuantizedProblem, former: Former) -> list[Config]:
    """What serves now, the weight written out, what served once, and every tile launch; each once."""
    place = (problem.device.arch, problem.device.units)
    shape = (problem.rows, problem.n, problem.k, problem.scheme)
    found: dict[quantized_configs.Way, None] = {quantized_configs.choose(*place, *shape, BF16): None}
    if problem.rows > BUCKETS[1]:
        found[Dequantized()] = None
    if (once := former.get(key_of(case))) is not None:
        found[quantized_configs.way(once)] = None
    found |= dict.fromkeys(tile_launches(*place, *shape))
    return [asdict(each) for each in found]


def measure(cases: Sequence[Case], former: Former, until: float) -> Iterator[dict[str, Any]]:
    """A row a case, until the time is over."""
    compile_all(cases, former, until)
    weights: dict[tuple[str, str], QuantizedProblem] = {}
    dense: dict[tuple[int, str], float] = {}
    # A weight is made once for all its numbers of rows; what tells most comes first.
    order = dict.fromkeys((shape, scheme) for _, shape, scheme in cases)
    for case in sorted(cases, key=lambda case: [*order].index(case[1:])):
        if time.monotonic() > until:
            return
        rows, shape, scheme = case
        problem = problem_of(case)
        if (shape, scheme) not in weights:
            weights.clear()  # the last one's memory
            weights[shape, scheme] = problem
        first = weights[shape, scheme]
        problem.weights, problem.canonical = first.weights, first.canonical
        if (rows, shape) not in dense:
            dense[rows, shape] = min(dense_us(rows, *SHAPES[shape]).values())
        yield {
            "rows": rows,
            "shape": shape,
            "scheme": scheme,
            **one(case, problem, former, dense[rows, shape]),
        }


def one(case: Case, problem: QuantizedProblem, former: Former, dense: float) -> dict[str, Any]:
    """Check and time every way of a case."""
    times: list[tuple[float, Config]] = []
    wrong, refused = [], []
    exact = quantization.product(problem.x, problem.canonical)
    for config in ways(case, problem, former):
        try:
            check(problem, config, exact)
            us = problem.time_us(config)[0]
            check(problem, config, exact)
            times.append((us, config))
        except Wrong as fault:
            wrong.append(f"{brief(config)}: {fault}")
        except Exception as fault:  # a launch that is impossible here is an answer
            refused.append(f"{brief(config)}: {str(fault).splitlines()[-1][:100]}")
    best, fastest = min(times, key=lambda found: found[0])
    shown = "  ".join(f"{brief(config)} {us:.1f}" for us, config in times)
    name = " ".join(map(str, case))
    print(f"{name:28} bf16 {dense:6.1f}  best {best:6.1f} x{dense / best:4.2f} {brief(fastest)}  |  {shown}")
    print(
        *(f"  WRONG {each}" for each in wrong),
        *(f"  refused {each}" for each in refused),
        sep="\n",
        flush=True,
    )
    rounded = [{"us": round(us, 2), "way": dict(config)} for us, config in times]
    return {"bf16_us": round(dense, 2), "ways": rounded, "wrong": wrong, "refused": refused}


def check(problem: QuantizedProblem, config: Config, exact: torch.Tensor) -> None:
    """Raise Wrong where numbers are off, or one run's are not the next one's."""
    runs = [problem.product(config) for _ in range(RUNS)]
    if any(not torch.equal(each, runs[0]) for each in runs):
        raise Wrong("numbers differ from run to run")
    off = runs[0].float() - exact
    error, farthest = off.norm() / exact.norm(), off.abs().max() / exact.square().mean().sqrt()
    if not (error < problem.tolerance and farthest < FARTHEST):
        raise Wrong(f"relative error {error:.1e}, farthest {farthest:.1e}")


def keep(record: Mapping[str, Any]) -> None:
    """Write the fastest way of each bucket whose own number of rows was timed into the tuning table."""
    place = tuple(record["place"])
    file = configs.table_file(*place)
    known = table.read(file, table.place(*place))
    entries = list(entries_of(place, record["rows"]))
    for entry in entries:
        assert entry.config is not None
        print(f"{entry.bucket} {entry.dtype}: {brief(entry.config)} {entry.us} us, bf16 {entry.dense_us}")
    table.write(file, known.merged(entries))


def entries_of(place: tuple[str, int], rows: Sequence[Mapping[str, Any]]) -> Iterator[table.Entry]:
    """An entry for each bucket whose own number of rows was timed."""
    buckets: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        case = (quantized_configs.bucket(row["rows"]), row["shape"], row["scheme"])
        buckets.setdefault(key_of(case), []).append(row)
    for key, timed in buckets.items():
        if any(row["rows"] in BUCKETS for row in timed):
            yield entry_of(place, key, timed)


def entry_of(
    place: tuple[str, int], key: tuple[str, str, str], rows: Sequence[Mapping[str, Any]]
) -> table.Entry:
    """The entry of a bucket, of which `rows` are all that were timed: its own number of rows is among them.

    The way is the fastest over all of them (geometric mean); its times are those where it does worst.
    """
    largest = max(rows, key=lambda row: int(row["rows"]))
    case = (largest["rows"], largest["shape"], largest["scheme"])
    tried = {*tile_launches(*place, case[0], *SHAPES[case[1]], WEIGHT_ONLY[case[2]])}
    found = []
    for each in largest["ways"]:
        served = quantized_configs.way(each["way"])
        times = [same["us"] for row in rows for same in row["ways"] if same["way"] == each["way"]]
        if len(times) == len(rows) and (served in tried or not isinstance(served, Tile)):
            found.append((math.prod(times), times, each["way"]))
    _, times, config = min(found, key=lambda each: each[0])
    beside = [(us, row["bf16_us"]) for us, row in zip(times, rows, strict=True)]
    worst = max(beside, key=lambda pair: pair[0] / pair[1])
    return table.Entry(*key, configs.sources_of(key[0], config), config, *worst)


def brief(config: Config) -> str:
    """A way in a word: rows of the weight / rows of x / warps / stages [ / columns a step]."""
    way = quantized_configs.way(config)
    if isinstance(way, Tile):
        flags = "c" if way.code_boxes else "b" * way.boxes
        flags += f"/{way.depth}" * (way.depth > 0)
        split = f"/{way.split} parts" if way.split > 1 else ""
        return f"{way.tile_n}/{way.tile_m}/{way.warps}/{way.stages}{flags}{split}"
    return f"[{quantized_configs.describe(way)}]"


def compile_all(cases: Sequence[Case], former: Former, until: float) -> None:
    """Compile every launch into Triton's cache on disk, in processes of their own."""
    work = {}
    for case in cases:
        for config in ways(case, problem_of(case), former):
            work[case[1:], *config.items()] = (case, config)
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        for fault in pool.imap_unordered(compile_one, work.values()):
            print(fault, end="", file=sys.stderr)
            if time.monotonic() > until:
                return
    print(f"{len(work)} launches compiled", flush=True)


def compile_one(work: tuple[Case, Config]) -> str:
    """Compile one launch; gives what goes wrong, which its check meets again."""
    case, config = work
    try:
        problem_of(case).compile(config)
    except Exception as fault:
        return f"{case} {brief(config)}: {str(fault).splitlines()[-1][:100]}\n"
    return ""


if __name__ == "__main__":
    main()
