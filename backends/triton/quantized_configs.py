"""Which way a product by a quantized weight takes at a number of rows: measured, else a written rule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from backbench.backends.interface import Config, Scheme
from backbench.backends.interface.weight import PACKED
from backbench.backends.triton import configs
from backbench.backends.triton.quantized_weight import CODES, NATIVE_ACTIVATIONS, words_a_span

BUCKETS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
"""Row counts a choice is made for; a count belongs to the smallest bucket that holds it, or the largest."""
TILE = 128
"""Columns that the matrix units take of eight-bit codes at a time, and of a row that share a scale."""
HOPPER = ("sm90", "sm100", "sm103")
"""Where a matrix instruction takes 64 rows of the weight: there matrix kernels serve one row of x, too."""


@dataclass(frozen=True)
class Kernel:
    """Launch of a kernel of ours. `block_m` 0 = a vector kernel (one row)."""

    block_m: int
    block_n: int
    warps: int
    stages: int = 1
    """Of the matrix kernels' loop."""
    spans: int = 1
    """Spans that a vector kernel takes at a time."""
    split: int = 1
    """Parts of the depth, each a program's; their fp32 sums are added in order by `finish_kernel`."""
    swap: bool = False
    """The weight is the wide operand of the matrix instruction (64 rows of it on sm90)."""
    ahead: int = 0
    """Spans of four-bit codes, or lines of eight-bit ones, fetched while the predecessor still runs."""
    early: bool = False
    """Four-bit codes are scaled before they are multiplied, not sums of a group after."""
    depth: int = 0
    """Columns of eight-bit codes that a matrix kernel takes at a time; 0 = as many as `step_of` says."""


@dataclass(frozen=True)
class Dequantized:
    """The weight written out in the rows' dtype, then the vendor's library."""

    dequantized: bool = True


@dataclass(frozen=True)
class ScaledProduct:
    """`torch._scaled_mm` of fp8 codes with a scale a row of x and a scale a row of the weight."""

    scaled_product: bool = True


@dataclass(frozen=True)
class Expanded:
    """A 2:4 weight written out with its zeros, then the vendor's library."""

    expanded: bool = True


@dataclass(frozen=True)
class SemiStructured:
    """torch's product of a 2:4 weight, by a library's matrix instructions that skip the zeros."""

    semi_structured: str
    """"cutlass" or "cusparselt"."""
    kept: bool = False
    """Positions in the library's order are kept from loading on, beside ours: 1/16 of the dense bytes in 16
    bits. Else they are made before each product, cuSPARSELt's from the weight written out."""


@dataclass(frozen=True)
class Tile:
    """Launch of the kernel for tens to thousands of rows, whose weight is multiplied from registers."""

    tile_m: int
    """Rows of x a program takes."""
    tile_n: int
    """Rows of the weight a program takes; 64 of them for every four warps at least."""
    warps: int
    stages: int
    split: int = 1
    """As `Kernel.split`."""
    depth: int = 0
    """Columns a step; 0 = as many as `step_of` says of eight-bit codes, and a span of four-bit ones."""
    boxes: bool = False
    """Rows of x are fetched as boxes of a tensor descriptor."""
    code_boxes: bool = False
    """Codes are, too."""


Way = Kernel | Tile | Dequantized | ScaledProduct | Expanded | SemiStructured


def operation(scheme: Scheme) -> str:
    """The kernels that serve a scheme, as tuning entries name them."""
    if scheme.compressed:
        return "sparse_gemm"
    return "packed_gemm" if scheme.weight in PACKED else "byte_gemm"


def entry_dtype(scheme: Scheme, dtype: torch.dtype) -> str:
    """A tuning entry's dtype: the rows', then the scheme."""
    return f"{configs.product_dtype(dtype)} x {scheme}"


def way(config: Config) -> Way:
    """What a tuning entry holds."""
    if "expanded" in config:
        return Expanded(**config)
    if "semi_structured" in config:
        return SemiStructured(**config)
    if "dequantized" in config:
        return Dequantized(**config)
    if "tile_m" in config:
        return Tile(**config)
    return ScaledProduct(**config) if "scaled_product" in config else Kernel(**config)


def bucket(rows: int) -> int:
    """The bucket of `rows`."""
    return next((size for size in BUCKETS if rows <= size), BUCKETS[-1])


@lru_cache(maxsize=4096)
def choose(arch: str, units: int, rows: int, n: int, k: int, scheme: Scheme, dtype: torch.dtype) -> Way:
    """How to multiply `rows` rows by an [n, k] weight; fp32 by the library, whose products are true fp32."""
    if dtype == torch.float32:
        return Expanded() if scheme.compressed else Dequantized()
    size = bucket(rows)
    found = measured(arch, units, size, n, k, scheme, dtype)
    return written(arch, units, size, n, k, scheme, dtype) if found is None else found


def measured(
    arch: str, units: int, size: int, n: int, k: int, scheme: Scheme, dtype: torch.dtype
) -> Way | None:
    """The way that was the fastest for a bucket; None = nobody measured."""
    name = configs.bucket_name(size, n, k)
    entry = configs.lookup(arch, units, operation(scheme), name, entry_dtype(scheme, dtype))
    return None if entry is None or entry.config is None else way(entry.config)


def tuning(
    arch: str, units: int, n: int, k: int, scheme: Scheme, dtype: torch.dtype
) -> dict[str, str | None] | None:
    """`Linear.tuning` of a quantized [n, k] weight; the way that each number of rows takes is in its name."""
    if dtype == torch.float32:
        return None
    found = {}
    for size in BUCKETS:
        name = configs.bucket_name(size, n, k)
        served = describe(choose(arch, units, size, n, k, scheme, dtype))
        found[f"{name} {scheme}: {served}"] = configs.complaint(
            arch, units, operation(scheme), name, entry_dtype(scheme, dtype)
        )
    return found


def describe(served: Way) -> str:
    """A way in a word or two."""
    if isinstance(served, Dequantized):
        return "dequantized"
    if isinstance(served, Expanded):
        return "expanded"
    if isinstance(served, SemiStructured):
        return f"torch semi-structured, {served.semi_structured}{', kept' if served.kept else ''}"
    if isinstance(served, ScaledProduct):
        return "torch._scaled_mm"
    if isinstance(served, Tile):
        return f"tile kernel {served.tile_m}x{served.tile_n}"
    return "vector kernel" if served.block_m == 0 else f"matrix kernel {served.block_m}x{served.block_n}"


def library_takes(arch: str, n: int, k: int, scheme: Scheme, dtype: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` serves such codes with a scale a row."""
    return (
        scheme.weight == "fp8"
        and scheme.activation in ("fp8-token", "fp8-tensor")
        and scheme.group is None
        and not scheme.zero_point
        and arch in HOPPER
        and dtype == torch.bfloat16
        and n % 16 == k % 16 == 0
    )


def whole(scheme: Scheme) -> bool:
    """Whether groups hold whole spans of a four-bit weight, so that a span's sum is scaled once."""
    return scheme.group is None or scheme.group % 128 == 0


def tile_takes(scheme: Scheme, arch: str) -> bool:
    """Whether the tile kernel serves a scheme: rows are 16-bit numbers, groups fill steps or divide them."""
    step = CODES * words_a_span(scheme) if scheme.weight in PACKED else step_of(scheme, arch)
    group = scheme.group or step
    return scheme.activation not in NATIVE_ACTIVATIONS and (group % step == 0 or step % group == 0)


def native(arch: str, scheme: Scheme) -> bool:
    """Whether the GPU multiplies the scheme's eight-bit codes as they are, rows rounded to the same kind."""
    rounded = (scheme.activation or "").partition("-")[0]
    if rounded != scheme.weight or scheme.zero_point:
        return False
    if scheme.weight == "int8":
        return arch != "cpu"
    if arch.startswith("sm"):
        return int(arch[2:]) >= 89
    return arch in ("gfx950", "gfx1201")


def step_of(scheme: Scheme, arch: str) -> int:
    """Columns that a kernel takes of eight-bit codes at a time: they share every scale.

    On AMD tiles go through registers, of which RDNA has few.
    """
    most = 32 if arch.startswith("gfx1") else 64 if arch.startswith("gfx") else TILE
    return min(most, scheme.group or TILE)


def written(arch: str, units: int, size: int, n: int, k: int, scheme: Scheme, dtype: torch.dtype) -> Way:
    """The rule for shapes and architectures nobody measured."""
    if scheme.compressed:
        return sparse_written(arch, units, size, n, k)
    if scheme.weight in PACKED:
        return _written_packed(arch, units, size, n, k, scheme, dtype)
    return _written_bytes(arch, units, size, n, k, scheme, dtype)


def parts_for(units: int, programs: int, steps: int, least: int) -> int:
    """Parts of the depth that give every unit about two programs, each of at least `least` steps."""
    parts = 1
    while programs * parts < 2 * units and steps // (2 * parts) >= least and parts < 16:
        parts *= 2
    return parts


def vector(arch: str, k: int, scheme: Scheme) -> Kernel:
    """The launch of one row's vector kernel."""
    step = 128 if scheme.weight in PACKED else step_of(scheme, arch)
    most = 16 if scheme.weight in PACKED and not arch.startswith("gfx1") else 8
    return Kernel(0, 4, 4, spans=min(most, 1 << (-(-k // step) - 1).bit_length()))


def _written_packed(
    arch: str, units: int, size: int, n: int, k: int, scheme: Scheme, dtype: torch.dtype
) -> Way:
    spans = -(-k // 128)
    hopper = arch in HOPPER
    if size == 1 and not hopper:
        return vector(arch, k, scheme)
    if size > 128:
        return Dequantized()
    early = not whole(scheme) and dtype == torch.bfloat16
    stages = 2 if arch.startswith("gfx") else 4
    rows, wide = max(16, min(size, 64)), 128 if hopper else 64
    split = parts_for(units, -(-n // wide) * -(-size // rows), spans, 4)
    return Kernel(rows, wide, 4, stages, 1, split, hopper, 4, early)


def _written_bytes(
    arch: str, units: int, size: int, n: int, k: int, scheme: Scheme, dtype: torch.dtype
) -> Way:
    hopper = arch in HOPPER
    if size == 1 and not hopper:
        return vector(arch, k, scheme)
    stages = 2 if arch.startswith("gfx") else 4
    if size <= 64:
        rows, wide = max(size, 16), 64
        split = parts_for(units, -(-n // wide), -(-k // step_of(scheme, arch)), 4)
        return Kernel(rows, wide, 4, stages, 1, split, hopper, 4)
    if library_takes(arch, n, k, scheme, dtype):
        return ScaledProduct()
    if scheme.activation is None or not native(arch, scheme):
        if size > 128:
            return Dequantized() if scheme.activation is None else Kernel(64, 64, 4, stages - 1)
        return Kernel(64, 64, 4, stages - 1)
    if arch in ("sm80", "sm90", "sm100", "sm103"):
        return Kernel(128, 128, 8, 3)
    return Kernel(64, 64, 4, 2)


VECTOR_PACKED = "4/32/4 2/32/4 8/16/4 8/32/8 4/16/2 8/8/2 4/16/4 8/8/4 16/8/4 2/16/2"
VECTOR_BYTES = "4/32/4 2/32/4 4/16/4 8/8/4 2/16/2 4/8/2 4/16/8 8/16/8 2/8/2 1/32/4"
"""rows / spans / warps"""
MATRIX_PACKED = "64/4/4s 128/4/4s 128/8/4s 64/4/6s 64/4/4 32/4/4"
MATRIX_BYTES = "64/4/4s 64/4/6s 128/4/4s 128/8/4s 64/4/4 16/2/5"
DEEP_BYTES = "64/4/3/256s 64/4/4/256s 128/8/3/256s 32/4/4/256"
NARROW_PACKED = "32/4/6 16/2/4 16/4/6"
"""rows of the weight / warps / stages [ / columns at a time]; s = the weight is the wide operand"""
LARGE_BYTES = "128/128/8/3 128/128/4/3 128/256/8/3 64/128/4/4 64/256/8/3"
"""rows of x / rows of the weight / warps / stages"""
SPLITS = (1, 2, 4)


def launches(arch: str, units: int, size: int, n: int, k: int, scheme: Scheme) -> Iterator[Kernel]:
    """Launches worth trying for the bucket of `size` rows; the matrix units take one row too."""
    if scheme.compressed:
        yield from _sparse_launches(units, size, n)
        return
    small = scheme.weight in PACKED
    if size == 1:
        for text in (VECTOR_PACKED if small else VECTOR_BYTES).split():
            block, spans, warps = (int(number) for number in text.split("/"))
            yield Kernel(0, block, warps, spans=spans)
    if size <= 256:
        texts = (MATRIX_PACKED if small else MATRIX_BYTES).split()
        whole_rows = scheme.group is None and scheme.activation != "fp8-group128"
        if arch.startswith("sm") and not small and size <= 16 and whole_rows and k % 256 == 0:
            texts += DEEP_BYTES.split()
        if small and size <= 16 and n <= 8192:
            texts += NARROW_PACKED.split()
        earlies = (True, False) if small and not whole(scheme) else (False,)
        for text, split, early in itertools.product(texts, SPLITS, earlies):
            block, warps, stages, *depth = (int(number) for number in text.strip("s").split("/"))
            rows = max(16, min(size, 64 if small or size <= 64 else 128))
            programs = -(-n // block) * -(-size // rows)
            if split == 1 or programs * split <= 8 * units:
                swap, ahead = text.endswith("s"), 4 if rows <= 64 else 0
                yield Kernel(rows, block, warps, stages, 1, split, swap, ahead, early, *depth)
    if size > 64 and not small:
        for text in LARGE_BYTES.split():
            rows, block, warps, stages = (int(number) for number in text.split("/"))
            yield Kernel(rows, block, warps, stages)


SPARSE_SPAN = 256
"""Columns of a 2:4 weight that a kernel takes at a time."""
SPARSE_ROWS = 64
"""Rows up to which our kernels serve a 2:4 weight where nobody measured: of 28672x4096 on an H100 they take
152 us then, writing the weight out 233; at 256 rows 531 and 249."""
VECTOR_SPARSE = "4/16/4 2/16/4 8/16/4 8/8/4 4/8/4 2/8/2 4/16/8 8/8/8"
"""rows of the weight / spans / warps"""
MATRIX_SPARSE = "64/4/2s 64/4/3s 64/4/4s 64/4/5s 128/4/3s 128/8/2s 128/8/3s 64/4/3 32/4/4 32/4/3"
"""rows of the weight / warps / stages; s = the weight is the wide operand"""


def sparse_vector(arch: str, k: int) -> Kernel:
    """The launch of one row's vector kernel by a 2:4 weight. RDNA has few registers."""
    spans = 1 << (-(-k // SPARSE_SPAN) - 1).bit_length()
    return Kernel(0, 4, 4, spans=min(8 if arch.startswith("gfx1") else 16, spans))


def sparse_written(arch: str, units: int, size: int, n: int, k: int) -> Way:
    """As `written`, of a 2:4 weight: no library's sparse product is in it."""
    if size == 1:
        return sparse_vector(arch, k)
    if size > SPARSE_ROWS:
        return Expanded()
    hopper, radeon = arch in HOPPER, arch.startswith("gfx1")
    rows = 16 if arch.startswith("gfx11") else max(16, min(size, 64))  # where registers are few
    warps, stages = 4, 1 if radeon else 2 if arch.startswith("gfx") else 3
    if rows > 32 and arch.startswith("sm") and not hopper and arch != "sm80":
        warps, stages = 8, 2  # 99 KiB of shared memory
    split = parts_for(units, -(-n // 64) * -(-size // rows), -(-k // SPARSE_SPAN), 4)
    return Kernel(rows, 64, warps, stages, 1, split, hopper, 4)


def _sparse_launches(units: int, size: int, n: int) -> Iterator[Kernel]:
    """As `launches`, of a 2:4 weight."""
    if size == 1:
        for text in VECTOR_SPARSE.split():
            block, spans, warps = (int(number) for number in text.split("/"))
            yield Kernel(0, block, warps, spans=spans)
    if size > 256:
        return
    blocks = (max(16, min(size, 64)), *((128,) if size > 64 else ()))
    for rows, text, split in itertools.product(blocks, MATRIX_SPARSE.split(), SPLITS):
        block, warps, stages = (int(number) for number in text.strip("s").split("/"))
        if split == 1 or -(-n // block) * -(-size // rows) * split <= 8 * units:
            yield Kernel(rows, block, warps, stages, 1, split, text.endswith("s"), 4)


def semi_structured(arch: str, n: int, k: int, dtype: torch.dtype) -> list[SemiStructured]:
    """torch's products of a 2:4 weight [n, k] on such a GPU; none where it has none.

    CUTLASS's serves compute capability 8 alone, and cuSPARSELt's the newer ones as well. Sizes are those that
    `torch.sparse.SparseSemiStructuredTensor` asks for.
    """
    if not arch.startswith("sm") or int(arch[2:]) < 80 or dtype not in (torch.bfloat16, torch.float16):
        return []
    if int(arch[2:]) < 90:
        library, fits = "cutlass", n % 32 == k % 64 == 0
    else:
        library, fits = "cusparselt", n % 16 == k % 16 == 0
    return [SemiStructured(library, kept) for kept in (True, False)] if fits else []


def kept_library(arch: str, units: int, n: int, k: int, dtype: torch.dtype) -> str | None:
    """The library whose order of positions is kept beside a 2:4 weight: it serves some number of rows."""
    ways = (choose(arch, units, size, n, k, Scheme(sparsity="2:4"), dtype) for size in BUCKETS)
    return next((way.semi_structured for way in ways if isinstance(way, SemiStructured) and way.kept), None)
