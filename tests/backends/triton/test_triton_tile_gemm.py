"""The tile kernel against the specification, in the interpreter without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from quantized_operands import AT, HERE, VARIANTS, broken, complaint, operands, random

from backbench.backends.conformance.linear_check import LinearCase, LinearChecker, linear_cases
from backbench.backends.conformance.matrix import Status
from backbench.backends.conformance.quantized_cases import KEPT
from backbench.backends.interface import Device, Scheme, Weight
from backbench.backends.quantization import SCHEMES
from backbench.backends.torch.linear import TorchLinear
from backbench.backends.triton import configs, quantized, quantized_configs
from backbench.backends.triton.linear import TritonLinear
from backbench.backends.triton.quantized import multiply, run_quantized
from backbench.backends.triton.quantized_configs import BUCKETS, Tile, choose, describe, tile_takes
from backbench.backends.triton.quantized_tune import QuantizedProblem
from backbench.backends.triton.quantized_weight import QuantizedWeight, pack_weight
from backbench.backends.triton.tile_gemm import without_empty_parts
from backbench.backends.triton.tile_launches import FEWEST, tile_launches
from backbench.backends.tuning.table import Entry

SMALL = Tile(16, 64, 4, 2)
LAUNCHES = {
    "pointers": SMALL,
    "boxes": replace(SMALL, boxes=True),
    "boxes of codes": replace(SMALL, boxes=True, code_boxes=True),
    "parts": replace(SMALL, split=2),
}
SERVED = {name: scheme for name, scheme in VARIANTS.items() if tile_takes(scheme, "cpu")}


def test_what_is_served() -> None:
    assert {"int4-g128", "int4-g32", "nvfp4", "mxfp4", "int8", "fp8 weights alone"} <= set(SERVED)
    assert {"int4 with zero points", "int4-g16", "int8-g32 with zero points", "nvfp4 w4a4"} <= set(SERVED)
    assert not {"int8-w8a8", "fp8", "fp8-block", "int4 w4a8"} & set(SERVED)
    assert not tile_takes(Scheme("int4", group=96), "sm90"), "a step of 128 columns holds no whole groups"


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("name", SERVED)
def test_product(name: str, launch: str) -> None:
    scheme, config = SERVED[name], LAUNCHES[launch]
    x, weight = operands(scheme, 21)
    bias = random(34).bfloat16().to(AT)
    got = multiply(x, pack_weight(weight, AT), config, bias)
    assert not complaint(got, x, weight, bias, early=scheme.group is not None)


@pytest.mark.parametrize("name", SERVED)
def test_whole_tiles_and_steps_that_are_not_filled(name: str) -> None:
    scheme = SERVED[name]
    k = 96 if scheme.group in (None, 16, 32) else 128 * 3
    for config in LAUNCHES.values():
        x, weight = operands(scheme, 3, n=64, k=k)
        assert not complaint(multiply(x, pack_weight(weight, AT), config), x, weight)


@pytest.mark.parametrize(("k", "split", "served"), [(96, 4, 1), (640, 4, 3), (640, 2, 2), (1152, 4, 3)])
def test_no_part_is_left_without_a_step(k: int, split: int, served: int) -> None:
    x, weight = operands(SCHEMES["int4-g32"], 3, k=k)
    packed, config = pack_weight(weight, AT), replace(SMALL, split=split)
    assert without_empty_parts(config, packed, "cpu").split == served
    assert not complaint(multiply(x, packed, config), x, weight)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g128", "nvfp4", "mxfp4", "int8", "fp8 weights alone"])
def test_fp16(name: str) -> None:
    x, weight = operands(SERVED[name], 3, dtype=torch.float16)
    for config in LAUNCHES.values():
        assert not complaint(multiply(x, pack_weight(weight, AT), config), x, weight)


@pytest.mark.parametrize(
    ("name", "depth"),
    [("int8", 64), ("fp8 weights alone", 64), ("int8-g128", 64), ("nvfp4", 128), ("int4-g16", 128)],
)
@pytest.mark.parametrize("k", [384, 320])
def test_other_columns_a_step(name: str, depth: int, k: int) -> None:
    x, weight = operands(SERVED[name], 5, k=384)
    if SERVED[name].group in (None, 16):
        x, weight = operands(SERVED[name], 5, k=k)
    for boxes in (False, True):
        config = replace(SMALL, depth=depth, boxes=boxes, code_boxes=boxes)
        assert not complaint(multiply(x, pack_weight(weight, AT), config), x, weight)


class ScaleOfTheNextRow(TritonLinear):
    """A fault of packing."""

    def pack(self, weight: Weight, device: Device) -> Any:
        assert weight.scale is not None
        return super().pack(replace(weight, scale=weight.scale.roll(1, 0)), device)


def tiled(case: LinearCase) -> bool:
    scheme = KEPT[case.kept].scheme if case.kept else Scheme()
    return not scheme.dense and tile_takes(scheme, "cpu")


@pytest.mark.parametrize("case", [*filter(tiled, linear_cases("quick"))], ids=lambda case: case.name)
def test_conformance(case: LinearCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `bench backends --check`, with every product by the tile kernel."""
    monkeypatch.setattr(quantized_configs, "choose", lambda *given: SMALL)
    row = LinearChecker(TritonLinear(), TorchLinear(), HERE).check(case, torch.bfloat16)
    assert row.status == Status.PASS, row.detail
    wrong = LinearChecker(ScaleOfTheNextRow(), TorchLinear(), HERE).check(case, torch.bfloat16)
    assert wrong.status == Status.WRONG


@pytest.mark.parametrize("config", LAUNCHES.values(), ids=LAUNCHES)
def test_planted_faults_are_seen(config: Tile) -> None:
    x, weight = operands(Scheme("int4", group=32, zero_point=True), 2)
    packed = pack_weight(weight, AT)
    assert not complaint(multiply(x, packed, config), x, weight)
    for fault, wrong in broken(packed).items():
        assert complaint(multiply(x, wrong, config), x, weight), fault


@pytest.mark.parametrize("config", LAUNCHES.values(), ids=LAUNCHES)
def test_planted_faults_in_bytes_are_seen(config: Tile) -> None:
    def faults(packed: QuantizedWeight) -> dict[str, QuantizedWeight]:
        assert packed.zero is not None
        return {
            "the scale of the next row": replace(packed, scale=packed.scale.roll(1, 0)),
            "the scale of the next group": replace(packed, scale=packed.scale.roll(1, 1)),
            "neighbours swapped": replace(packed, codes=packed.codes.view(34, -1, 2).flip(2).flatten(1)),
            "zero points ignored": replace(packed, zero=torch.zeros_like(packed.zero)),
        }

    x, weight = operands(Scheme("int8", group=128, zero_point=True), 2)
    packed = pack_weight(weight, AT)
    assert not complaint(multiply(x, packed, config), x, weight)
    for fault, wrong in faults(packed).items():
        assert complaint(multiply(x, wrong, config), x, weight), fault


@pytest.mark.parametrize("name", ["int4-g128", "nvfp4", "int8"])
@pytest.mark.parametrize("config", LAUNCHES.values(), ids=LAUNCHES)
def test_a_row_does_not_depend_on_its_company(name: str, config: Tile) -> None:
    x, weight = operands(SCHEMES[name], 19)
    packed = pack_weight(weight, AT)
    together = multiply(x, packed, config)
    for row in (0, 15, 18):
        assert torch.equal(multiply(x[row : row + 1], packed, config)[0], together[row])


def test_rows_that_no_descriptor_takes_come_by_pointers() -> None:
    x, weight = operands(SCHEMES["int4-g128"], 5)
    wide = torch.zeros(5, 257, dtype=x.dtype, device=AT)
    wide[:, :256] = x
    packed = pack_weight(weight, AT)
    boxes = LAUNCHES["boxes"]
    assert torch.equal(run_quantized(wide[:, :256], packed, boxes), run_quantized(x, packed, boxes))
    every_other = x.repeat_interleave(2, 0)[::2]
    assert torch.equal(run_quantized(every_other, packed, boxes), run_quantized(x, packed, boxes))


def test_launches_worth_trying_are_possible() -> None:
    def launches(name: str, size: int, arch: str = "sm90") -> list[Tile]:
        scheme = SERVED.get(name) or SCHEMES[name]
        return [*tile_launches(arch, 132, size, 28672, 4096, scheme)]

    for name, size in ((name, size) for name in SERVED for size in BUCKETS if size >= FEWEST):
        found = launches(name, size)
        assert found and len(found) == len(set(found))
        for each in found:
            assert each.tile_n >= 16 * each.warps and each.tile_m <= max(size, 64)
            # Half of the threads' registers hold sums.
            assert each.tile_m * each.tile_n <= 128 * 32 * each.warps
    assert launches("int4-g128", 32) == launches("fp8", 256) == launches("int8", 256, "gfx942") == []
    assert not any(each.boxes for each in launches("int4-g128", 256, "sm80"))
    assert {each.depth for each in launches("int8", 256)} == {0, 64}
    assert {each.depth for each in launches("nvfp4", 256)} == {0, 128}
    assert {each.depth for each in launches("int4-g16 with zero points", 256)} == {0}
    assert {each.split for each in launches("int4-g128", 1024)} == {1}


@pytest.mark.parametrize("name", ["int4-g32", "int8", "nvfp4"])
def test_right_products_pass_the_tuning_check_and_wrong_ones_do_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = QuantizedProblem(20, 48, 256, SCHEMES[name], torch.bfloat16, HERE, cold_bytes=20_000)
    launch = asdict(SMALL)
    assert problem.error(launch) < problem.tolerance
    monkeypatch.setattr(quantized, "multiply", lambda *given: 1.02 * multiply(*given))
    assert problem.error(launch) > problem.tolerance


def test_a_tuning_entry_holds_as_long_as_the_tile_kernel_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, shape = SCHEMES["int4-g128"], (256, 28672, 4096)
    problem = QuantizedProblem(*shape, scheme, torch.bfloat16, HERE)
    config = asdict(LAUNCHES["boxes"])
    assert problem.sources_of(config) == configs.sources("tile_gemm") != problem.sources
    assert problem.sources_of(problem.baseline()) == problem.sources
    entry = Entry("packed_gemm", problem.bucket, problem.dtype, problem.sources_of(config), config)
    table = configs.table("sm90", 132).merged([entry])
    monkeypatch.setattr(configs, "table", lambda arch, units: table)
    choose.cache_clear()
    way = choose("sm90", 132, *shape, scheme, torch.bfloat16)
    assert way == LAUNCHES["boxes"] and describe(way) == "tile kernel 16x64"
    known = configs.sources
    monkeypatch.setattr(configs, "sources", lambda name: "other" if name == "tile_gemm" else known(name))
    choose.cache_clear()
    assert not isinstance(choose("sm90", 132, *shape, scheme, torch.bfloat16), Tile)
    why = configs.complaint("sm90", 132, "packed_gemm", problem.bucket, problem.dtype)
    assert why == "entry for sm90-132 is of other kernel sources"
    choose.cache_clear()


COMPILED = """
import json, re, sys
import torch
from backbench.backends.aot.compile import compile_launch
from backbench.backends.triton import quantized_aot
found = {}
for name in sys.argv[1:]:
    launch = quantized_aot.tile(quantized_aot.TILED[name], torch.bfloat16, "sm90")
    resources = compile_launch(launch, "sm90")
    products = list(re.finditer(r"wgmma\\.mma_async[^;]*;", resources.text))
    loop = resources.text[products[0].start() : products[-1].end()]
    found[name] = {
        "from shared memory": [p[0] for p in products if not re.search(r"\\}, *\\{", p[0])],
        "stores": len(re.findall(r"st\\.shared|stmatrix", loop)),
        "products": len(products),
        "spill_bytes": resources.spill_bytes,
        "registers": resources.registers,
        "overwritten": resources.overwritten,
    }
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_weight_is_multiplied_from_registers_that_are_left_alone_meanwhile() -> None:
    """What the kernel is built around, in the compiled text: no operand of numbers lies in shared memory."""
    names = ["int4-g128", "int4-g32", "int8"]
    command = [sys.executable, "-c", COMPILED, *names]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for name, found in json.loads(result.stdout).items():
        assert found["products"] >= 8, name
        assert not found["from shared memory"] and found["stores"] == 0, name
        assert found["spill_bytes"] == 0 and found["registers"] <= 128, name
        assert not found["overwritten"], name
