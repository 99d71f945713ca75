"""The grammar of attention shapes: `8q1s32k`, `8q2k`, `2q4k_32q1s1k`.

A group is COUNT `q` QUERIES, and `s` KEYS where there is a context: 8q1s32k is eight decodes over 32,768
keys each, 8q2k eight prompts of 2,048 tokens. `_` joins groups into one mixed batch; k = 1,024.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from backbench.backends.conformance.scenario import Row
from backbench.errors import HarnessError

_GROUP = re.compile(r"(\d+)q(\d+)(k?)(?:s(\d+)(k?))?")


def parse_shape(text: str) -> tuple[Row, ...]:
    """The batch's rows, decodes first.

    Raises:
        HarnessError: not of the grammar, nothing in it, or fewer keys than queries.
    """
    rows: list[Row] = []
    for group in text.strip().lower().split("_"):
        match = _GROUP.fullmatch(group)
        if match is None:
            raise HarnessError(f"Attention shape {text!r} is not like 8q1s32k, 8q2k or 2q4k_32q1s1k.")
        count, query = int(match[1]), _size(match[2], match[3])
        length = _size(match[4], match[5]) if match[4] else query
        if count < 1 or query < 1:
            raise HarnessError(f"Attention shape {text!r}: {group} holds no query; counts start at 1.")
        if length < query:
            raise HarnessError(f"Attention shape {text!r}: {query} queries need at least as many keys.")
        rows += [Row(query, length)] * count
    return tuple(sorted(rows, key=lambda row: row.query != 1))


def format_shape(rows: Sequence[Row]) -> str:
    """The shortest text that `parse_shape` reads as these rows, in this order."""
    groups: list[tuple[int, Row]] = []
    for row in rows:
        if groups and groups[-1][1] == row:
            groups[-1] = (groups[-1][0] + 1, row)
        else:
            groups.append((1, row))
    return "_".join(_format_group(count, row) for count, row in groups)


def _format_group(count: int, row: Row) -> str:
    keys = "" if row.length == row.query else f"s{_short(row.length)}"
    return f"{count}q{_short(row.query)}{keys}"


def _size(digits: str, suffix: str) -> int:
    return int(digits) * (1024 if suffix else 1)


def _short(size: int) -> str:
    return f"{size // 1024}k" if size % 1024 == 0 else str(size)
