"""Products by 2:4 weights against the specification, in the interpreter without a GPU."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from backbench.backends import quantization
from backbench.backends.interface import Device, PackedWeight, Scheme, Weight, WeightSpec
from backbench.backends.interface import device as devices
from backbench.backends.interface.device import cpu
from backbench.backends.quantization import dequantize, quantize
from backbench.backends.triton import quantized_configs, sparse
from backbench.backends.triton.launch import Place
from backbench.backends.triton.linear import TritonLinear
from backbench.backends.triton.quantized_configs import (
    BUCKETS,
    SPARSE_ROWS,
    Expanded,
    Kernel,
    SemiStructured,
    choose,
)
from backbench.backends.triton.quantized_tune import QuantizedProblem, random_sparse
from backbench.backends.triton.sparse import COPIED_ROWS, expanded, multiply, run_sparse, with_library
from backbench.backends.triton.sparse_aot import sparse_cases
from backbench.backends.triton.sparse_weight import SparseWeight, pack_sparse, unpack_sparse
from backbench.errors import BackendError

HERE = devices.gpu(0) if torch.cuda.is_available() else cpu(interpret=True)
AT = HERE.torch_device
HOST = torch.device("cpu")
H100 = Device("nvidia", "sm90", "H100", 132, 2**36, 227 * 1024, HOST)
UNTUNED = ("sm90", 114)
SPARSE = Scheme(sparsity="2:4")
VECTOR = Kernel(0, 4, 4, spans=2)
NARROW = Kernel(16, 16, 4, 2)
WIDE = Kernel(16, 64, 4, 2, swap=True)
PARTS = Kernel(16, 64, 4, 2, swap=True, split=2)
CONFIGS = {"vector": VECTOR, "narrow": NARROW, "wide": WIDE, "parts": PARTS}


def operands(
    rows: int, n: int = 34, k: int = 512, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Weight]:
    """Rows, and a weight whose groups differ in size, with zeros among what is kept."""
    generator = torch.Generator().manual_seed(n + k)
    weight = random_sparse(n, k, dtype, HOST)
    sizes = torch.exp(torch.randn(n, k // 8, generator=generator)).repeat_interleave(4, 1)
    kept = torch.randn(n, k // 2, generator=generator) * sizes / k**0.5
    weight.q = (kept * (torch.rand(n, k // 2, generator=generator) > 0.1)).to(dtype)
    return torch.randn(rows, k, generator=generator).to(dtype).to(AT), weight.to(AT)


def complaint(got: Tensor, x: Tensor, weight: Weight, bias: Tensor | None = None) -> str:
    """What is off by more than one rounding of the result, which the interpreter cuts off, and fp32 sums:
    empty = nothing."""
    dense = dequantize(weight.to(HOST), torch.float32)
    exact = x.cpu().double() @ dense.double().T
    terms = x.cpu().double().abs() @ dense.double().abs().T
    exact = exact if bias is None else exact + bias.cpu().double()
    unit = torch.finfo(got.dtype).eps
    over = ((got.cpu().double() - exact).abs() - unit * exact.abs() - 2.0**-18 * terms).max()
    return f"off by {float(over)} more than roundings" if not over <= 0 else ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("k", [512, 768, 328, 8])
def test_product(k: int, config: Kernel, dtype: torch.dtype) -> None:
    """Whole spans, an odd number of them, and depths that fill none."""
    x, weight = operands(1 if config.block_m == 0 else 5, k=k, dtype=dtype)
    bias = torch.linspace(-2, 2, 34).to(dtype).to(AT)
    packed = pack_sparse(weight, AT)
    assert not complaint(multiply(x, packed, config, bias), x, weight, bias)
    assert not complaint(multiply(x, packed, config), x, weight)


@pytest.mark.parametrize("rows", [0, 1, 2, 17, SPARSE_ROWS, SPARSE_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_run_serves_every_row_count(rows: int, dtype: torch.dtype) -> None:
    x, weight = operands(rows, n=40, k=264, dtype=dtype)
    linear, bias = TritonLinear(), torch.linspace(-2, 2, 40).to(dtype).to(AT)
    got = linear.run(x, linear.pack(weight, HERE), bias)
    assert got.shape == (rows, 40) and got.dtype == dtype
    assert rows == 0 or not complaint(got, x, weight, bias)


def test_one_row_of_a_larger_array_need_not_be_aligned() -> None:
    x, weight = operands(1, k=264)
    shifted = torch.cat([torch.zeros(1, 3, dtype=x.dtype, device=AT), x], 1)[:, 3:]
    assert not complaint(multiply(shifted, pack_sparse(weight, AT), VECTOR), x, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(34, 512), (70, 264), (3, 8)])
def test_a_weight_written_out_is_the_specification(n: int, k: int, dtype: torch.dtype) -> None:
    """Bit for bit."""
    _, weight = operands(1, n, k, dtype)
    written = expanded(pack_sparse(weight, AT)).cpu()
    assert written.dtype == dtype
    assert torch.equal(written, dequantize(weight.to(HOST), dtype))


@pytest.mark.parametrize("config", [WIDE, PARTS], ids=["whole", "parts"])
def test_a_row_does_not_depend_on_its_company(config: Kernel) -> None:
    x, weight = operands(9)
    packed = pack_sparse(weight, AT)
    together = multiply(x, packed, config)
    for row in (0, 4, 8):
        assert torch.equal(multiply(x[row : row + 1], packed, config)[0], together[row])


def broken(packed: SparseWeight) -> dict[str, SparseWeight]:
    """The same weight with something about it mistaken."""
    bits = packed.positions.to(torch.int32)
    swapped = ((bits & 0x3333) << 2) | ((bits >> 2) & 0x3333)
    return {
        "positions swapped": replace(packed, positions=swapped.to(torch.int16)),
        "wrong group": replace(packed, positions=packed.positions.roll(1, 2)),
        "wrong slice": replace(packed, positions=((bits << 4) | ((bits >> 12) & 15)).to(torch.int16)),
        "wrong span": replace(packed, positions=packed.positions.roll(1, 0)),
        "row off by one": replace(packed, positions=packed.positions.roll(1, 1)),
        "numbers of another row": replace(packed, values=packed.values.roll(1, 0)),
        "numbers swapped": replace(packed, values=packed.values.unflatten(1, (-1, 2)).flip(2).flatten(1)),
    }


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_planted_faults_are_seen(config: Kernel) -> None:
    x, weight = operands(1)
    packed = pack_sparse(weight, AT)
    assert not complaint(multiply(x, packed, config), x, weight)
    for fault, wrong in broken(packed).items():
        assert complaint(multiply(x, wrong, config), x, weight), fault


def test_packing_takes_no_more_than_the_numbers_and_their_positions() -> None:
    _, weight = operands(1, n=64, k=512)
    packed = pack_sparse(weight, AT)
    assert packed.num_bytes == weight.num_bytes == 0.5625 * 64 * 512 * 2


@pytest.mark.parametrize("k", [512, 264, 8])
def test_a_packed_weight_can_be_had_back(k: int) -> None:
    _, weight = operands(1, k=k)
    found = unpack_sparse(pack_sparse(weight, AT))
    assert found.scheme == SPARSE and found.positions is not None and weight.positions is not None
    assert torch.equal(found.q, weight.q) and torch.equal(found.positions, weight.positions)


def test_positions_in_the_order_of_cutlass() -> None:
    """As torch itself converts a dense weight."""
    dense = dequantize(random_sparse(96, 320, torch.bfloat16, HOST), torch.bfloat16)
    packed = pack_sparse(quantize(dense, SPARSE).to(AT), AT)
    values, wanted = sparse_semi_structured_from_dense_cutlass(dense)
    assert torch.equal(packed.values.cpu(), values)
    found = packed.positions.new_empty(wanted.shape)
    sparse.positions_launch(Place.of(HERE), packed, found).start()
    assert torch.equal(found.cpu(), wanted)


def cutlass(values: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """torch's product by CUTLASS, as documented."""
    assert columns.shape[1] % 8 == 0
    dense = sparse_semi_structured_to_dense_cutlass(values.cpu(), positions.cpu())
    return (dense.float() @ columns.cpu().float()).to(columns.dtype).to(AT)


def compressed(dense: Tensor, order: int = 1) -> Tensor:
    """The numbers, as torch picks them where more than two are 0; then positions, in no order of ours."""
    values, _ = sparse_semi_structured_from_dense_cutlass(dense.cpu())
    if order == -1:
        values = values.flip(0)
    _, positions = quantization.compress(dense.cpu())
    return torch.cat([values.flatten(), positions.flatten().view(dense.dtype)]).view(len(dense), -1).to(AT)


def cusparselt(
    held: Tensor, columns: Tensor, *, bias: Tensor | None, transpose_result: bool = False
) -> Tensor:
    """torch's product by cuSPARSELt, as documented, of what `compressed` gives."""
    assert columns.shape[1] % 8 == 0
    k = columns.shape[0]
    assert held.dim() == 2, "it takes the output features from the shape"
    held = held.flatten()
    numbers = held.numel() * 8 // 9
    positions = held[numbers:].view(torch.uint8).view(-1, k // 8)
    weight = quantization.expand(held[:numbers].view(-1, k // 2), positions)
    product = weight.float() @ columns.float()
    product = (product if bias is None else product + bias.float()[:, None]).to(columns.dtype)
    return product.T.contiguous() if transpose_result else product


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's products need a GPU; here they are what they are documented to be, on multiples of 8 rows."""
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", cutlass)
    monkeypatch.setattr(
        torch, "_sparse_semi_structured_addmm", lambda bias, *given: cutlass(*given) + bias[:, None]
    )
    monkeypatch.setattr(torch, "_cslt_compress", compressed)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", cusparselt)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("library", ["cutlass", "cusparselt"])
@pytest.mark.parametrize("rows", [16, 13, COPIED_ROWS + 1])
def test_the_libraries_are_given_what_they_ask_for(
    rows: int, library: str, kept: bool, biased: bool, libraries: None
) -> None:
    generator = torch.Generator().manual_seed(1)
    dense = dequantize(random_sparse(64, 320, torch.bfloat16, HOST), torch.bfloat16)
    weight = quantize(dense, SPARSE).to(AT)
    x = torch.randn(rows, 320, generator=generator).bfloat16().to(AT)
    bias = torch.linspace(-2, 2, 64).bfloat16().to(AT) if biased else None
    packed = pack_sparse(weight, AT)
    if kept:
        packed = with_library(packed, library)
    got = run_sparse(x, packed, SemiStructured(library, kept), bias)
    assert got.shape == (rows, 64) and got.is_contiguous()
    wanted = x.cpu().float() @ dense.float().T
    torch.testing.assert_close(
        got.cpu().float(), wanted if bias is None else wanted + bias.cpu().float(), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("library", ["cutlass", "cusparselt"])
def test_what_a_library_keeps_is_held_beside_and_our_kernels_still_read_the_rest(
    library: str, libraries: None
) -> None:
    """Also where it keeps a zero elsewhere than we do."""
    x, weight = operands(5, n=64, k=256)
    plain = pack_sparse(weight, AT)
    packed = with_library(plain, library)
    dense = 64 * 256 * 2
    held = PackedWeight(TritonLinear(), packed, SPARSE, None)
    assert sum(each.nbytes for each in held.tensors()) == packed.num_bytes == 0.625 * dense
    assert sum(each.nbytes for each in held.tensors(read=True)) == plain.num_bytes == 0.5625 * dense
    assert torch.equal(expanded(packed), expanded(plain))
    assert torch.equal(multiply(x, packed, WIDE), multiply(x, plain, WIDE))
    had_back = unpack_sparse(packed).to(HOST)
    assert torch.equal(dequantize(had_back, x.dtype), dequantize(weight.to(HOST), x.dtype))
    if library == "cusparselt":
        assert not torch.equal(packed.values, plain.values)
        assert packed.buffer.untyped_storage().nbytes() == 0.5625 * dense


def test_numbers_in_another_order_are_not_held_twice(
    libraries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weight = operands(1, n=64, k=256)
    monkeypatch.setattr(torch, "_cslt_compress", partial(compressed, order=-1))
    with pytest.raises(BackendError, match="in an order here that no other kernel can read"):
        with_library(pack_sparse(weight, AT), "cusparselt")


def test_a_weight_is_packed_for_the_library_that_serves_it(
    libraries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weight = operands(1, n=64, k=256)

    def found(arch: str, units: int, size: int, *rest: object) -> SemiStructured:
        return SemiStructured("cusparselt", size > 256)

    monkeypatch.setattr(quantized_configs, "measured", found)
    quantized_configs.choose.cache_clear()
    assert quantized_configs.kept_library("sm90", 132, 64, 256, torch.bfloat16) == "cusparselt"
    assert quantized_configs.kept_library("sm90", 132, 64, 256, torch.float32) is None
    assert TritonLinear().pack(weight, HERE).library is not None
    quantized_configs.choose.cache_clear()


def test_ways() -> None:
    """Our kernels for few rows; for many no library's sparse product unless it was measured."""
    assert choose(*UNTUNED, 1, 28672, 4096, SPARSE, torch.bfloat16) == Kernel(0, 4, 4, spans=16)
    assert choose(*UNTUNED, 16, 28672, 4096, SPARSE, torch.bfloat16).block_m == 16
    assert choose(*UNTUNED, 64, 4096, 12288, SPARSE, torch.bfloat16).split > 1
    assert choose(*UNTUNED, 64, 28672, 4096, SPARSE, torch.bfloat16).block_m == 64
    assert choose(*UNTUNED, 65, 28672, 4096, SPARSE, torch.bfloat16) == Expanded()
    assert choose(*UNTUNED, 1, 28672, 4096, SPARSE, torch.float32) == Expanded()
    for each in (WIDE, VECTOR, Expanded(), SemiStructured("cutlass"), SemiStructured("cusparselt", True)):
        assert quantized_configs.way(asdict(each)) == each


@pytest.mark.parametrize(
    ("arch", "n", "k", "dtype", "library"),
    [
        ("sm80", 4096, 4096, torch.bfloat16, "cutlass"),
        ("sm89", 4096, 4096, torch.float16, "cutlass"),
        ("sm80", 4096, 4112, torch.bfloat16, None),
        ("sm90", 4096, 4112, torch.bfloat16, "cusparselt"),
        ("sm90", 4104, 4096, torch.bfloat16, None),
        ("sm90", 4096, 4096, torch.float32, None),
        ("sm75", 4096, 4096, torch.float16, None),
        ("gfx942", 4096, 4096, torch.bfloat16, None),
    ],
)
def test_where_torch_has_a_product(
    arch: str, n: int, k: int, dtype: torch.dtype, library: str | None
) -> None:
    found = quantized_configs.semi_structured(arch, n, k, dtype)
    assert found == ([] if library is None else [SemiStructured(library, True), SemiStructured(library)])


def test_what_serves_how_many_rows_is_said() -> None:
    spec = WeightSpec("down", 4096, 12288, SPARSE, torch.bfloat16)
    imagined = replace(H100, units=114)
    said = TritonLinear().served_by(spec, imagined)
    assert said.startswith("triton, vector kernel to 1 rows; matrix kernel 16x64 to 16 rows")
    assert said.endswith("; expanded to 8192 rows")
    told = TritonLinear().tuning(spec, imagined)
    assert told is not None and len(told) == len(BUCKETS)
    assert "m1 n4096 k12288 dense(sparsity=2:4): vector kernel" in told


def test_what_is_not_served_is_said() -> None:
    def reasons(scheme: Scheme, k: int = 512) -> str:
        spec = WeightSpec("qkv", 64, k, scheme, torch.bfloat16)
        return "; ".join(TritonLinear().refusals(spec, HERE))

    assert not reasons(SPARSE)
    assert "rows are not rounded" in reasons(replace(SPARSE, activation="int8-token"))
    assert "have no scales" in reasons(replace(SPARSE, group=128))
    assert "12 columns do not divide into eights" in reasons(SPARSE, 12)
    x, weight = operands(2)
    with pytest.raises(BackendError, match="no kernel does that"):
        multiply(x.to(torch.float16), pack_sparse(weight, AT), WIDE)


@pytest.mark.parametrize("size", BUCKETS)
def test_what_is_worth_trying_is_possible(size: int) -> None:
    problem = QuantizedProblem(size, 28672, 4096, SPARSE, torch.bfloat16, H100)
    ways = [quantized_configs.way(config) for config in problem.candidates()]
    kernels = [way for way in ways if isinstance(way, Kernel)]
    assert all(each.block_n >= (64 if each.swap else 1) for each in kernels)
    assert any(each.block_m == 0 for each in kernels) == (size == 1)
    assert (SemiStructured("cusparselt") in ways) == (Expanded() in ways) == (size > 16)
    assert (SemiStructured("cusparselt", True) in ways) == (size > 16)
    assert problem.operation == "sparse_gemm" and problem.dtype == "bfloat16 x dense(sparsity=2:4)"


def test_right_products_pass_the_tuning_check_and_wrong_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = QuantizedProblem(3, 48, 256, SPARSE, torch.bfloat16, HERE, cold_bytes=40_000)
    launch = asdict(WIDE)
    assert len(problem.weights) > 1
    assert len({each.positions.data_ptr() for each in problem.weights}) == len(problem.weights)
    assert problem.error(launch) < problem.tolerance
    assert problem.error(problem.baseline()) < problem.tolerance
    monkeypatch.setattr(sparse, "multiply", lambda *given: 1.02 * multiply(*given))
    assert problem.error(launch) > problem.tolerance


def test_what_is_compiled_is_what_is_launched() -> None:
    """On every target: each way of the written rule, the weight written out, and CUTLASS's positions."""
    names = [(case.kernel, case.variant) for case in sparse_cases()]
    assert len(set(names)) == len(names)
    everywhere = {f"{case.kernel} {case.variant}" for case in sparse_cases() if not case.targets}
    assert everywhere == {
        "sparse/product bf16 rows1",
        "sparse/product bf16 rows16",
        "sparse/product bf16 rows64",
        "sparse/write bf16",
    }


def test_a_random_weight_has_every_place() -> None:
    weight = random_sparse(8, 512, torch.float32, HOST)
    kept = dequantize(weight, torch.float32).view(-1, 4) != 0
    assert len(torch.unique(kept, dim=0)) == 6 and bool((kept.sum(1) == 2).all())
