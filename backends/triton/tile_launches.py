"""Launches of the tile kernel worth trying: a short list, since each is compiled, checked and timed.

A program's product hides the numbers that another on the same multiprocessor makes, so most of these leave
room for two programs of eight warps or more of four: 128 registers a thread, 113 KiB of shared memory.
Programs of sixteen warps read the same rows of x half as often from the L2 cache. Four warps take no more
than 64 rows of x: where the last of their tiles of 128 or 256 is half empty, which a bucket's own number of
rows does not show, 28672x4096 took 1.3 to 2.3 times what full tiles do on an H100 (192 beside 256 rows, 384
beside 512), and eight warps 0.8 to 1.1 times.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from backbench.backends.interface import Scheme
from backbench.backends.interface.weight import PACKED
from backbench.backends.triton.quantized_configs import SPLITS, TILE, Tile, tile_takes
from backbench.backends.triton.quantized_weight import CODES, words_a_span

FEWEST = 64
"""Rows from which on they are tried."""
FEW_PACKED = "64/64/4/3b 64/64/4/2b 128/64/8/3b 128/64/8/4b 64/64/4/3c 128/64/8/3c"
MANY_PACKED = "128/128/8/3b 128/128/8/3c 256/128/16/3b 256/128/16/4b 256/128/8/3b 128/256/8/3b"
FEW_FINE = "64/64/4/3b/128 64/64/4/2b/128 128/64/8/3b/128 64/64/4/5b 64/64/4/4c 128/64/8/4b"
MANY_FINE = "128/128/8/3b/128 128/128/8/5b 128/128/8/4c 256/128/16/3b/128 256/128/16/5b 128/256/8/4b"
"""Of groups of 16, whose spans have 64 columns."""
FEW_BYTES = "64/64/4/3c 64/64/4/4c/64 128/64/8/3c 128/64/8/4c/64 64/64/4/3b"
MANY_BYTES = "128/128/8/2c 128/128/8/4c/64 128/128/8/5c/64 256/128/16/3c 256/128/16/5c/64 128/256/8/3c/64"
"""rows of the weight / of x / warps / stages [ / columns a step]; b = boxes of x, c = and codes"""


def tile_launches(arch: str, units: int, size: int, n: int, k: int, scheme: Scheme) -> Iterator[Tile]:
    """Launches worth trying for the bucket of `size` rows, on NVIDIA."""
    if not arch.startswith("sm") or size < FEWEST or not tile_takes(scheme, arch):
        return
    tma = int(arch[2:]) >= 90
    found: dict[Tile, None] = {}
    for text, split in itertools.product(_texts(size, scheme), SPLITS):
        wide, rows, warps, rest, *columns = text.split("/")
        depth = int(columns[0]) if columns else 0
        launch = Tile(
            int(rows), int(wide), int(warps), int(rest[:-1]), split, depth, tma, tma and rest[-1] == "c"
        )
        programs = -(-n // launch.tile_n) * -(-size // launch.tile_m)
        fits = launch.tile_m <= size and (split == 1 or programs * split <= 2 * units)
        if fits and (depth == 0 or _takes(scheme, depth)):
            found[launch] = None
    yield from found


def _texts(size: int, scheme: Scheme) -> list[str]:
    few = size <= FEWEST
    if scheme.weight not in PACKED:
        return (FEW_BYTES if few else MANY_BYTES).split()
    if CODES * words_a_span(scheme) < TILE:
        return (FEW_FINE if few else MANY_FINE).split()
    return (FEW_PACKED if few else MANY_PACKED).split()


def _takes(scheme: Scheme, depth: int) -> bool:
    """Whether groups fill steps of `depth` columns or divide them, and a step has one zero point a slice."""
    group = scheme.group or depth
    apart = scheme.zero_point and scheme.weight in PACKED
    return (group % depth == 0 or depth % group == 0) and not apart
