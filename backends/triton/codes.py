"""Four-bit codes as numbers, inside kernels.

`quantized_weight` keeps 16-bit words of four codes: nibble j of an int4 word is code j; an fp4 word keeps the
four magnitudes in bits 0 to 11 and the signs above them, where one shift brings most of them into place.

On NVIDIA two numbers are made at once: `(word >> 4 j) & 15 | 0x4300` is bf16's 128 + code (0x6400: fp16's
1024 + code), so there is no conversion; an e2m1 magnitude in the low exponent and high mantissa bits of a
bf16 is the number * 2^-126 (fp16: 2^-14).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

INT4_BF16 = tl.constexpr(
    """{ .reg .b32 w, one; mov.b32 one, 0x3F803F80; mov.b32 w, $4;
lop3.b32 $0, w, 0x000F000F, 0x43004300, 0xEA; shr.u32 w, w, 4;
lop3.b32 $1, w, 0x000F000F, 0x43004300, 0xEA; shr.u32 w, w, 4;
lop3.b32 $2, w, 0x000F000F, 0x43004300, 0xEA; shr.u32 w, w, 4;
lop3.b32 $3, w, 0x000F000F, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, $0, one, $5; fma.rn.bf16x2 $1, $1, one, $6;
fma.rn.bf16x2 $2, $2, one, $7; fma.rn.bf16x2 $3, $3, one, $8; }"""
)
INT4_FP16 = tl.constexpr(
    """{ .reg .b32 w; mov.b32 w, $4;
lop3.b32 $0, w, 0x000F000F, 0x64006400, 0xEA; shr.u32 w, w, 4;
lop3.b32 $1, w, 0x000F000F, 0x64006400, 0xEA; shr.u32 w, w, 4;
lop3.b32 $2, w, 0x000F000F, 0x64006400, 0xEA; shr.u32 w, w, 4;
lop3.b32 $3, w, 0x000F000F, 0x64006400, 0xEA;
add.rn.f16x2 $0, $0, $5; add.rn.f16x2 $1, $1, $6; add.rn.f16x2 $2, $2, $7; add.rn.f16x2 $3, $3, $8; }"""
)
FP4_BF16 = tl.constexpr(
    """{ .reg .b32 w, m, s, zero; mov.b32 w, $4; mov.b32 zero, 0x80008000;
shl.b32 m, w, 6; shl.b32 s, w, 1; and.b32 m, m, 0x01C001C0; lop3.b32 $0, s, 0x80008000, m, 0xEA;
shl.b32 m, w, 3; and.b32 $1, m, 0x81C081C0;
and.b32 $2, w, 0x81C081C0;
shr.u32 m, w, 3; shl.b32 s, w, 2; and.b32 m, m, 0x01C001C0; lop3.b32 $3, s, 0x80008000, m, 0xEA;
mov.b32 s, 0x7E807E80;
fma.rn.bf16x2 $0, $0, s, zero; fma.rn.bf16x2 $1, $1, s, zero;
fma.rn.bf16x2 $2, $2, s, zero; fma.rn.bf16x2 $3, $3, s, zero; }"""
)
FP4_FP16 = tl.constexpr(
    """{ .reg .b32 w, m, s; mov.b32 w, $4;
shl.b32 m, w, 9; shl.b32 s, w, 1; and.b32 m, m, 0x0E000E00; lop3.b32 $0, s, 0x80008000, m, 0xEA;
shl.b32 m, w, 6; shl.b32 s, w, 3; and.b32 m, m, 0x0E000E00; lop3.b32 $1, s, 0x80008000, m, 0xEA;
shl.b32 m, w, 3; and.b32 m, m, 0x0E000E00; lop3.b32 $2, w, 0x80008000, m, 0xEA;
shl.b32 s, w, 2; and.b32 m, w, 0x0E000E00; lop3.b32 $3, s, 0x80008000, m, 0xEA;
mov.b32 s, 0x74007400;
mul.rn.f16x2 $0, $0, s; mul.rn.f16x2 $1, $1, s; mul.rn.f16x2 $2, $2, s; mul.rn.f16x2 $3, $3, s; }"""
)
SCALED = tl.constexpr(
    """{ .reg .b32 zero; mov.b32 zero, 0x80008000;
fma.rn.bf16x2 $0, $4, $8, zero; fma.rn.bf16x2 $1, $5, $9, zero;
fma.rn.bf16x2 $2, $6, $10, zero; fma.rn.bf16x2 $3, $7, $11, zero; }"""
)
INT8_BF16 = tl.constexpr(
    """{ .reg .b32 p, m, s, one; mov.b32 one, 0x3F803F80;
prmt.b32 p, $1, 0, 0x4140; lop3.b32 m, p, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 s, p, 0x00800080, 0xC300C300, 0xEA; fma.rn.bf16x2 $0, m, one, s; }"""
)
FP8_BF16 = tl.constexpr(
    """{ .reg .b32 p, m, large, zero; mov.b32 large, 0x7B807B80; mov.b32 zero, 0x80008000;
prmt.b32 p, $1, 0, 0x1404; shr.u32 m, p, 4; and.b32 m, m, 0x07F007F0;
lop3.b32 m, p, 0x80008000, m, 0xEA; fma.rn.bf16x2 $0, m, large, zero; }"""
)
TIMES = tl.constexpr(
    "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
)


@triton.jit
def code(word, J: tl.constexpr, KIND: tl.constexpr):
    """f32 number of code J of each word (i16), without its zero point and scale."""
    bits = word.to(tl.int32)
    if KIND == "int4":
        number = ((bits >> (4 * J)) & 15).to(tl.float32)
    else:
        magnitude = (bits >> (3 * J)) & 7
        # The sign of codes 0 to 3 stands in bit 14, 12, 15, 13.
        SIGN: tl.constexpr = 14 - 2 * J if J < 2 else 19 - 2 * J
        half = (magnitude & 1).to(tl.float32) * 0.5
        power = (((magnitude >> 1) + 126) << 23).to(tl.float32, bitcast=True)
        value = tl.where(magnitude < 2, half, power + power * half)
        number = tl.where(((bits >> SIGN) & 1) != 0, -value, value)
    return number


@triton.jit
def unpacked(word, z0, z1, z2, z3, like, KIND: tl.constexpr, PTX: tl.constexpr):
    """The words' codes 0 to 3 less their zero points [rows] as four tensors in the dtype of `like`; exact.

    Zero points are f32, and not used where the kind has none. PTX: inline assembly for sm80 and newer.
    """
    FP16: tl.constexpr = like.dtype == tl.float16
    if PTX and KIND == "int4":
        found = tl.inline_asm_elementwise(
            INT4_FP16 if FP16 else INT4_BF16,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [word, less(z0, like), less(z1, like), less(z2, like), less(z3, like)],
            dtype=(like.dtype, like.dtype, like.dtype, like.dtype),
            is_pure=True,
            pack=2,
        )
    elif PTX:
        found = tl.inline_asm_elementwise(
            FP4_FP16 if FP16 else FP4_BF16,
            "=&r,=&r,=&r,=&r,r",
            [word],
            dtype=(like.dtype, like.dtype, like.dtype, like.dtype),
            is_pure=True,
            pack=2,
        )
    else:
        found = (
            (code(word, 0, KIND) - z0[:, None]).to(like.dtype),
            (code(word, 1, KIND) - z1[:, None]).to(like.dtype),
            (code(word, 2, KIND) - z2[:, None]).to(like.dtype),
            (code(word, 3, KIND) - z3[:, None]).to(like.dtype),
        )
    return found


@triton.jit
def less(zero, like):
    """What takes the magic number and the zero point off: [rows, 1], exact."""
    MAGIC: tl.constexpr = 1024.0 if like.dtype == tl.float16 else 128.0
    return (-MAGIC - zero).to(like.dtype)[:, None]


@triton.jit
def scaled(w0, w1, w2, w3, s0, s1, s2, s3, PTX: tl.constexpr):
    """Four tiles times their rows' f32 scales, rounded once to the tiles' dtype; in PTX both are bf16."""
    if PTX:
        tl.static_assert(w0.dtype == tl.bfloat16)
        beside0, beside1 = s0.to(w0.dtype)[:, None], s1.to(w0.dtype)[:, None]
        beside2, beside3 = s2.to(w0.dtype)[:, None], s3.to(w0.dtype)[:, None]
        found = tl.inline_asm_elementwise(
            SCALED,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r",
            [w0, w1, w2, w3, beside0, beside1, beside2, beside3],
            dtype=(w0.dtype, w0.dtype, w0.dtype, w0.dtype),
            is_pure=True,
            pack=2,
        )
    else:
        found = (
            (w0.to(tl.float32) * s0[:, None]).to(w0.dtype),
            (w1.to(tl.float32) * s1[:, None]).to(w1.dtype),
            (w2.to(tl.float32) * s2[:, None]).to(w2.dtype),
            (w3.to(tl.float32) * s3[:, None]).to(w3.dtype),
        )
    return found


@triton.jit
def exact_scale(stored, KIND: tl.constexpr):
    """Stored scales as f32 numbers. KIND: "float", "e4m3", or "e8m0" (u8 exponents biased by 127)."""
    if KIND == "e8m0":
        bits = stored.to(tl.int32)
        # Exponent -127 is a subnormal number.
        number = tl.where(bits == 0, 0x00400000, bits << 23).to(tl.float32, bitcast=True)
    else:
        number = stored.to(tl.float32)
    return number


@triton.jit
def byte_numbers(word, KIND: tl.constexpr):
    """bf16 of the two int8 or e4m3 codes in each word (i16), exact, by inline assembly for sm80 and newer.

    int8: the low seven bits make 128 + them, the high bit 128 or 256, which is taken off. e4m3: its bits in a
    bf16's exponent and mantissa are the number * 2^-120. Both numbers are made in one register.
    """
    both = tl.inline_asm_elementwise(
        INT8_BF16 if KIND == "int8" else FP8_BF16,
        "=r,r",
        [word.to(tl.int32)],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    low, high = both.to(tl.int16), (both >> 16).to(tl.int16)
    return low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True)


@triton.jit
def times_scale(w, step, FINE: tl.constexpr, PTX: tl.constexpr):
    """A tile times scales beside it, rounded once to the tile's dtype. FINE: tile and scales are bf16."""
    if FINE and PTX:
        found = tl.inline_asm_elementwise(TIMES, "=r,r,r", [w, step], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        found = (w.to(tl.float32) * step.to(tl.float32)).to(w.dtype)
    return found
