"""Launches of products by 2:4 weights: by our kernels, or written out with zeros for a library."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from backbench.backends.interface import Weight
from backbench.backends.quantization import dequantize, packed, rows_at_once
from backbench.backends.triton.launch import BoundKernel, Launch, Place, parts, place_of
from backbench.backends.triton.quantized_configs import SPARSE_SPAN, Kernel, SemiStructured, Way
from backbench.backends.triton.rounding import finish_kernel
from backbench.backends.triton.sparse_gemm import (
    cutlass_positions_kernel,
    sparse_gemm_kernel,
    sparse_vector_kernel,
    write_sparse_kernel,
)
from backbench.backends.triton.sparse_weight import WORDS, SparseWeight, pack_sparse, unpack_sparse
from backbench.errors import BackendError

WRITTEN_ROWS = 32
"""Of the weight, that a program writes out or whose positions it puts in another order."""
LIBRARY_ROWS = 8
"""Rows of x come to torch's sparse products in multiples of this."""
COPIED_ROWS = 128
"""Rows up to which cuSPARSELt's product is transposed by a copy, and above by itself: of 28672x4096 on an
H100 64 rows take 159 us against 214, and 256 rows 134 against 99."""


def product_launches(
    place: Place, x: Tensor, weight: SparseWeight, bias: Tensor | None, out: Tensor, config: Kernel
) -> list[Launch]:
    """`out` [M, N] = x [M, K] with unit column stride by the weight transposed, plus bias [N]: a product, and
    its parts' sum."""
    if x.dtype != weight.values.dtype or x.dtype.itemsize != 2:
        raise BackendError(f"Rows in {x.dtype} by 2:4 weights in {weight.values.dtype}: no kernel does that.")
    count, width = out.shape
    pairs, spans = weight.values.view(torch.int32), weight.positions.shape[0]
    given = x if bias is None else bias
    columns, even = parts(width, config.block_n), weight.k % SPARSE_SPAN == 0
    if config.block_m == 0:
        whole = even and spans % config.spans == 0
        half = x.dtype == torch.float16
        bound = _bound_vector(place, config, bias is not None, half, whole, spans <= config.spans)
        row = x.view(-1)
        fours = (row.clone() if row.storage_offset() % 4 else row).view(torch.int64)
        operands = (fours, pairs, weight.positions, given, out)
        return [Launch(bound, (columns, 1, 1), (*operands, width, weight.k // 4, spans))]
    sums = out
    if config.split > 1:
        sums = torch.empty((config.split, count, width), dtype=torch.float32, device=out.device)
    bound = _bound_matrix(place, config, bias is not None, even)
    arguments = (
        *(x, pairs, weight.positions, given, sums, count, width, weight.k, spans),
        *(x.stride(0), parts(spans, config.split), 2 * place.units),
    )
    launches = [Launch(bound, (columns * parts(count, config.block_m), config.split, 1), arguments)]
    if config.split > 1:
        launches.append(_finish_launch(place, bias, sums, out))
    return launches


@cache
def _bound_vector(
    place: Place, config: Kernel, bias: bool, half: bool, even: bool, single: bool
) -> BoundKernel:
    return place.bind(
        sparse_vector_kernel,
        BIAS=bias,
        HALF=half,
        WORDS=WORDS,
        BLOCK_N=config.block_n,
        SPANS=config.spans,
        EVEN=even,
        SINGLE=single,
        num_warps=config.warps,
        num_stages=config.stages,
    )


@cache
def _bound_matrix(place: Place, config: Kernel, bias: bool, even: bool) -> BoundKernel:
    return place.bind(
        sparse_gemm_kernel,
        BIAS=bias,
        WORDS=WORDS,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        EVEN=even,
        SWAP=config.swap,
        PARTIAL=config.split > 1,
        STAGES=config.stages,
        AHEAD=config.ahead,
        WIDEN=place.interpreted,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _finish_launch(place: Place, bias: Tensor | None, sums: Tensor, out: Tensor) -> Launch:
    count, width = out.shape
    block = 512
    bound = _bound_finish(place, bias is not None, sums.shape[0], block)
    arguments = (sums, sums, sums, sums, sums if bias is None else bias, out, count, width)
    return Launch(bound, (parts(width, block), count, 1), arguments)


@cache
def _bound_finish(place: Place, bias: bool, split: int, block: int) -> BoundKernel:
    nothing = {"ROW_SCALE": False, "X_SCALE": False, "CHANNEL": False, "SCALE_KIND": "float"}
    return place.bind(finish_kernel, BIAS=bias, PARTS=split, BLOCK=block, num_warps=4, **nothing)


def writing_launch(place: Place, weight: SparseWeight, out: Tensor) -> Launch:
    """`out` [N, K], 16 bits a number: the weight with its zeros."""
    bound = _bound_rows(place, write_sparse_kernel)
    spans = weight.positions.shape[0]
    pairs, fours = weight.values.view(torch.int32), out.view(torch.int64)
    arguments = (pairs, weight.positions, fours, weight.n, weight.k // 4)
    return Launch(bound, (spans, parts(weight.n, WRITTEN_ROWS), 1), arguments)


def positions_launch(place: Place, weight: SparseWeight, out: Tensor) -> Launch:
    """`out` int16 [N, K/16]: the positions as CUTLASS's sparse products read them; N % 32 = K % 64 = 0."""
    bound = _bound_rows(place, cutlass_positions_kernel)
    spans = weight.positions.shape[0]
    arguments = (weight.positions, out, weight.n, weight.k // 16)
    return Launch(bound, (spans, parts(weight.n, WRITTEN_ROWS), 1), arguments)


@cache
def _bound_rows(place: Place, kernel: object) -> BoundKernel:
    return place.bind(kernel, WORDS=WORDS, BLOCK_N=WRITTEN_ROWS, num_warps=4)


def multiply(x: Tensor, weight: SparseWeight, config: Kernel, bias: Tensor | None = None) -> Tensor:
    """x [M, K] by the weight transposed, plus bias [N]: [M, N] in x's dtype, by our kernels."""
    out = torch.empty((x.shape[0], weight.n), dtype=x.dtype, device=x.device)
    for launch in product_launches(place_of(x.device), x, weight, bias, out, config):
        launch.start()
    return out


def expanded(weight: SparseWeight) -> Tensor:
    """The weight [N, K] with its zeros, in its own dtype."""
    if weight.values.dtype.itemsize != 2:
        return dequantize(unpack_sparse(weight), weight.values.dtype)
    out = weight.values.new_empty((weight.n, weight.k))
    writing_launch(place_of(out.device), weight, out).start()
    return out


def multiply_semi_structured(
    x: Tensor, weight: SparseWeight, way: SemiStructured, bias: Tensor | None = None
) -> Tensor:
    """As `multiply`, by torch's semi-structured product."""
    count = len(x)
    padded = functional.pad(x, (0, 0, 0, -count % LIBRARY_ROWS)).contiguous()
    if way.semi_structured == "cusparselt":
        held = torch._cslt_compress(expanded(weight)) if weight.library is None else weight.buffer
        if count > COPIED_ROWS:
            return torch._cslt_sparse_mm(held, padded.T, bias=bias, transpose_result=True)[:count]
        product = torch._cslt_sparse_mm(held, padded.T, bias=bias)
        return product.T[:count].contiguous()
    order = cutlass_positions(weight) if weight.library is None else weight.library
    if bias is None:
        product = torch._sparse_semi_structured_mm(weight.values, order, padded.T)
    else:
        product = torch._sparse_semi_structured_addmm(bias, weight.values, order, padded.T)
    return product.T[:count].contiguous()


def cutlass_positions(weight: SparseWeight) -> Tensor:
    """int16 [N, K/16]: the positions as CUTLASS's sparse products read them; N % 32 = K % 64 = 0."""
    out = weight.positions.new_empty((weight.n, weight.k // 16))
    positions_launch(place_of(out.device), weight, out).start()
    return out


def with_library(weight: SparseWeight, library: str) -> SparseWeight:
    """The weight with what "cutlass" or "cusparselt" wants besides, so that nothing is made before a product.

    cuSPARSELt's numbers take the place of ours: torch documents that its form begins with them. Where it
    keeps a 0 that stands elsewhere than ours, the positions become its own.

    Raises BackendError where its numbers stand in another order, so that both forms would have to be held.
    """
    if library == "cutlass":
        return replace(weight, library=cutlass_positions(weight))
    dense = expanded(weight)
    found = weight.in_buffer(torch._cslt_compress(dense).view(-1))
    if not torch.equal(found.values, weight.values):
        found = replace(found, positions=pack_sparse(_placed(found.values, dense), dense.device).positions)
        if not torch.equal(expanded(found), dense):
            raise BackendError("cuSPARSELt keeps 2:4 weights in an order here that no other kernel can read.")
    return found


def _placed(values: Tensor, dense: Tensor) -> Weight:
    """The numbers of [N, K] as a library has picked them [N, K/2], with positions; zeros may be anywhere."""
    rows = rows_at_once(dense.shape[1], SparseWeight.scheme, dense.device)
    positions = []
    for some, numbers in zip(values.split(rows), dense.split(rows), strict=True):
        there = (numbers.unflatten(1, (-1, 4)) != 0).to(torch.uint8)
        first, last = there.argmax(-1), 3 - there.flip(-1).argmax(-1)
        one, other = (some.unflatten(1, (-1, 2)) != 0).unbind(-1)
        codes = torch.where(one, first, (last + 1) % 4) | torch.where(other, last, (first + 1) % 4) << 2
        positions.append(packed(codes))
    return Weight(SparseWeight.scheme, values, positions=torch.cat(positions))


def run_sparse(x: Tensor, weight: SparseWeight, way: Way, bias: Tensor | None = None) -> Tensor:
    """x [M, K] by the weight transposed, plus bias [N], in the given way."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.shape[0] == 0:
        return x.new_empty((0, weight.n))
    if isinstance(way, Kernel):
        return multiply(x, weight, way, bias)
    if isinstance(way, SemiStructured):
        return multiply_semi_structured(x, weight, way, bias)
    return functional.linear(x, expanded(weight).to(x.dtype), bias)
