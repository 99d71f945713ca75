"""Is a register of a Hopper product in flight written? Read from the machine code, walked as it may run.

A product of a warpgroup (wgmma, HGMMA in machine code) runs on after it was issued. Until its group is waited
for, nothing else may write its accumulator or, where it comes from registers, its operand A. Triton 3.6 and
3.7 let such products run into a loop's next turn, and ptxas before 13.3 gives them registers that are written
again there (triton-lang/triton#9433): now and then results are wrong by any amount.

Groups end in order: `gsb0` after a product closes one, `WARPGROUP.DEPBAR.LE gsb0, n` waits for all but n.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

PRODUCT = re.compile(r"[HQIB]GMMA\.(?:SP\.)?64x(\d+)x\d+\.(\w+)")
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_\w+):")
WAIT = re.compile(r"gsb0, (\w+)")
NOTHING_WRITTEN = ("BAR", "WARPSYNC", "RET", "BRX", "CALL", "NANOSLEEP")
"""Whose first operand may be a register that is only read."""
MOST_GROUPS = 8
"""Groups told apart; where more are in flight, the oldest are one."""


class Group(NamedTuple):
    """Products that end together, by the numbers of the registers they hold meanwhile."""

    sums: frozenset[int] = frozenset()
    operands: frozenset[int] = frozenset()


State = tuple[Group, ...]
"""Groups in flight, the oldest first; the last one is not closed yet."""


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    name: str
    """With its suffixes: "IMAD.WIDE.U32"."""
    operands: tuple[str, ...]
    sure: bool
    """It has no predicate."""

    @property
    def written(self) -> frozenset[int]:
        """The general registers it writes."""
        beside_a_predicate = re.match(r"!?U?P[T\d]$", self.operands[0]) and "SETP" not in self.name
        target = self.operands[min(1, len(self.operands) - 1) if beside_a_predicate else 0]
        nothing = self.name.startswith(NOTHING_WRITTEN)
        return frozenset() if nothing else registers(target, width(self.name))


def registers(operand: str, count: int) -> frozenset[int]:
    """The numbers of `count` registers from the one named; none where none is."""
    first = re.match(r"R(\d+)\b", operand)
    return frozenset(range(int(first[1]), int(first[1]) + count)) if first else frozenset()


def width(name: str) -> int:
    """Registers of 32 bits that an instruction writes."""
    if product := PRODUCT.match(name):
        return int(product[1]) // (4 if product[2] == "F16" else 2)  # 64 rows, dealt to 128 threads
    base, *suffixes = name.split(".")
    if "128" in suffixes or (base == "LDSM" and "4" in suffixes) or base in ("HMMA", "IMMA"):
        return 4
    two = {"64", "WIDE", "F64"} & set(suffixes) or (base == "LDSM" and "2" in suffixes)
    return 2 if two or (base == "CS2R" and "32" not in suffixes) or base in ("DADD", "DMUL", "DFMA") else 1


def disassemble(cubin: bytes) -> str:
    """Machine code as text, by the nvdisasm that Triton carries."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def overwritten(listing: str) -> list[str]:
    """Every instruction that writes a register of a product in flight: "0x1a20 LDS.128 writes R8, R9"."""
    code, labels = _parse(listing)
    found: dict[int, str] = {}
    seen: set[tuple[int, State]] = set()
    ahead: list[tuple[int, State]] = [(0, (Group(),))]
    while ahead:
        at, state = ahead.pop()
        if at >= len(code) or (at, state) in seen:
            continue
        seen.add((at, state))
        one = code[at]
        held = frozenset[int]().union(*(group.operands for group in state))
        if not PRODUCT.match(one.name):  # products that add to one sum take turns
            held = held.union(*(group.sums for group in state))
        if hit := one.written & held:
            names = ", ".join(f"R{number}" for number in sorted(hit))
            found[at] = f"{one.address:#x} {one.name} writes {names}"
        ahead += [(place, _after(one, state)) for place in _next(at, one, labels)]
    return [found[at] for at in sorted(found)]


def _parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and label -> the place of the one it stands before."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif one := LINE.match(line):
            operands = tuple(part.strip() for part in one[4].split(","))
            code.append(Instruction(int(one[1], 16), one[3], operands, one[2] is None))
    return code, labels


def _next(at: int, one: Instruction, labels: dict[str, int]) -> list[int]:
    """Where it may go on; a call comes back, and what it calls holds no products."""
    places = [] if one.sure and one.name.startswith(("BRA", "EXIT", "RET")) else [at + 1]
    if one.name.startswith("BRA") and (label := re.search(r"`\((\.L_\w+)\)", ", ".join(one.operands))):
        places.append(labels[label[1]])
    return places


def _after(one: Instruction, state: State) -> State:
    """What is in flight once it was issued."""
    *older, last = state
    if PRODUCT.match(one.name):
        last = Group(last.sums | one.written, last.operands | registers(one.operands[1], 4))
        state = (*older, last, Group()) if one.operands[-1] == "gsb0" else (*older, last)
    elif one.name.startswith("WARPGROUP.DEPBAR") and (wait := WAIT.search(", ".join(one.operands))):
        state = (*older[max(0, len(older) - int(wait[1], 0)) :], last)
    if len(state) > MOST_GROUPS:
        (one_sums, one_operands), (two_sums, two_operands), *rest = state
        state = (Group(one_sums | two_sums, one_operands | two_operands), *rest)
    return state
