"""Registers of products in flight: what is a fault in a listing, and what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from backbench.backends.aot.in_flight import overwritten, width

PRODUCT = "HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR4], R24"
"""Sums in R24 to R31, operand A in R40 to R43."""
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def listing(*lines: str) -> str:
    """As nvdisasm prints it; a line that ends in a colon is a label."""
    texts = []
    for place, line in enumerate(lines):
        texts.append(line if line.endswith(":") else f"        /*{16 * place:04x}*/      {line} ;")
    return "\n".join(texts)


@pytest.mark.parametrize(
    "lines",
    [
        [f"{PRODUCT}, gsb0", WAIT, "IMAD R41, R2, R3, R4"],
        [f"{PRODUCT}, gsb0", "IMAD R44, R41, R40, R4", "STS [R40], R41", "ISETP.NE.AND P0, PT, R41, R40, PT"],
        # Products that add to one sum take turns, also across groups.
        [PRODUCT, f"{PRODUCT}, gsb0", f"{PRODUCT.replace('R40', 'R44')}, gsb0"],
        # The last group may go on, and the one before it has ended.
        [f"{PRODUCT}, gsb0", f"{PRODUCT.replace('R40', 'R44')}, gsb0", f"{WAIT[:-1]}1", "MOV R40, R0"],
        ["HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", "MOV R40, R0"],
        [f"{PRODUCT}, gsb0", "EXIT", "MOV R40, R0"],
        ["MOV R40, R0", f"{PRODUCT}, gsb0", "@P0 BRA `(.L_x_1)", WAIT, "MOV R40, R0", ".L_x_1:", "EXIT"],
    ],
)
def test_right_code(lines: list[str]) -> None:
    assert overwritten(listing(*lines)) == []


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([f"{PRODUCT}, gsb0", "IMAD R41, R2, R3, R4", WAIT], ["0x10 IMAD writes R41"]),
        ([PRODUCT, "@P1 MOV R40, R0"], ["0x10 MOV writes R40"]),
        ([f"{PRODUCT}, gsb0", "LDS.128 R40, [R2]"], ["0x10 LDS.128 writes R40, R41, R42, R43"]),
        ([f"{PRODUCT}, gsb0", "IMAD.WIDE.U32 R30, R2, R3, R4"], ["0x10 IMAD.WIDE.U32 writes R30, R31"]),
        ([f"{PRODUCT}, gsb0", "LOP3.LUT P0, R43, R2, R3, RZ, 0xc0, !PT"], ["0x10 LOP3.LUT writes R43"]),
        ([f"{PRODUCT}, gsb0", "R2UR UR4, R40", "HGMMA.64x8x16.F32.BF16 R40, gdesc[UR4], R40, gsb0"],
         ["0x20 HGMMA.64x8x16.F32.BF16 writes R40, R41, R42, R43"]),
        # One group may go on: the wrong one's operand is written.
        ([f"{PRODUCT}, gsb0", f"{PRODUCT.replace('R40', 'R44')}, gsb0", f"{WAIT[:-1]}1", "MOV R44, R0"],
         ["0x30 MOV writes R44"]),
        # Round the loop: the product of the last turn still reads what this one makes.
        ([".L_x_0:", "MOV R40, R0", WAIT, f"{PRODUCT}, gsb0", "@P0 BRA `(.L_x_0)"], ["0x10 MOV writes R40"]),
        # Past a wait that is not always reached.
        ([f"{PRODUCT}, gsb0", "@P0 BRA `(.L_x_1)", WAIT, ".L_x_1:", "MOV R40, R0"], ["0x40 MOV writes R40"]),
        # Never waited for: groups in flight pile up, and the walk still ends.
        ([".L_x_0:", f"{PRODUCT}, gsb0", "@P0 BRA `(.L_x_0)", "MOV R40, R0"], ["0x30 MOV writes R40"]),
    ],
)  # fmt: skip
def test_faults(lines: list[str], found: list[str]) -> None:
    assert overwritten(listing(*lines)) == found


def test_widths() -> None:
    ones = ("IMAD", "SHF.R.U64", "S2R", "CS2R.32", "LDS.U16")
    twos = ("LDC.64", "IMAD.WIDE", "CS2R", "LDSM.16.M88.2")
    assert [width(name) for name in ones] == [1] * 5 and [width(name) for name in twos] == [2] * 4
    assert width("LDG.E.128") == width("LDSM.16.MT88.4") == 4
    assert width("HGMMA.64x256x16.F32.BF16") == 128 and width("HGMMA.64x64x16.F16") == 16
    assert width("IGMMA.64x128x32.S8.S8") == 64


COMPILED = """
import json
from backbench.backends.aot.compile import compile_launch
from backbench.backends.triton.launch import BoundKernel
from backbench.backends.triton.quantized_aot import quantized_cases
found = {}
for case in quantized_cases():
    if case.kernel == "quantized/product" and case.variant in ("int8 bf16 rows16", "int4-g32 bf16 rows16"):
        launch = case.launch("sm90")
        unsafe = BoundKernel(launch.kernel, **{**launch.constants, **launch.options, "WAIT": False})
        both = compile_launch(launch, "sm90"), compile_launch(launch._replace(bound=unsafe), "sm90")
        found[case.variant] = [list(each.overwritten) for each in both]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_product_that_runs_into_the_next_step_is_found_in_compiled_kernels() -> None:
    """As Triton 3.6 and 3.7 compile them; a wait for each step's product is what makes them right."""
    command = [sys.executable, "-c", COMPILED]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert len(found) == 2
    for waited, unsafe in found.values():
        assert waited == [] and unsafe
