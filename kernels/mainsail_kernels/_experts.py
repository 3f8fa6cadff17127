"""What the kernels of experts share: a step of a tile's products, for matrices of every kind, and the activation.

MXFP4 on a GPU is in words of eight codes, so that a kernel never shuffles. Word i of the four of a group has inputs i,
4 + i, 8 + i, … 28 + i; each half of it has four of them, in the order of the bits' names:

    bit    15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
    code    A  D  D  B  D  D  C  A  A  A  B  B  B  C  C  C     the sign, two bits of exponent, one of mantissa

So A is where a bfloat16 has its sign, its lowest bits of exponent and its highest of mantissa; B and C are there after
a shift. Such a bfloat16 is 2 ** -126 of what the code means (codes without exponent are bfloat16s without one, too),
and one multiplication by the group's scale makes it right. To keep that in range the scale is 2 ** 62 of itself, and
sums are 2 ** -64 of what they are to be.

The other order of MXFP4, "tables", is drawn in fp4_tables.py; here it becomes bfloat16s for a buffer.
"""

from mainsail_kernels._triton import tl, triton

FP4_REST = tl.constexpr(2.0**64)
"""What sums of FP4 products are multiplied by, where weights are 2 ** -64 of themselves."""


@triton.jit
def _code(half, PLACE: tl.constexpr):
    """The four bits of one of the codes A to D (0 to 3) in the lower half of each word: sign, exponent, mantissa."""
    if PLACE == 3:
        return ((half >> 11) & 8) | ((half >> 11) & 4) | ((half >> 10) & 3)
    return ((half >> (12 - 3 * PLACE)) & 8) | ((half >> (6 - 3 * PLACE)) & 7)


@triton.jit
def _value(code):
    """What e2m1 codes mean, float32: the bits are the highest but three of a float16's."""
    bits = ((code & 7).to(tl.uint16) << 9) | ((code & 8).to(tl.uint16) << 12)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def fp4_weights(words, scales, PTX: tl.constexpr):
    """The weights of the eight codes of each word [inputs / 8, outputs]; scales, bfloat16, likewise.

    PTX: 2 ** -64 of the weights in bfloat16, for two neighbouring inputs at a time (Hopper); else weights in float32.
    """
    if PTX:
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, s, e;
            prmt.b32 a, $8, $9, 0x5410; prmt.b32 b, $8, $9, 0x7632;
            and.b32 s, a, 0x81c081c0; mul.bf16x2 $0, s, $10;
            shl.b32 s, a, 3; and.b32 s, s, 0x81c081c0; mul.bf16x2 $1, s, $10;
            shl.b32 s, a, 6; and.b32 s, s, 0x81c081c0; mul.bf16x2 $2, s, $10;
            shl.b32 s, a, 1; and.b32 s, s, 0x80008000; shr.u32 e, a, 5; lop3.b32 s, e, 0x01000100, s, 0xea;
            shr.u32 e, a, 4; lop3.b32 s, e, 0x00c000c0, s, 0xea; mul.bf16x2 $3, s, $10;
            and.b32 s, b, 0x81c081c0; mul.bf16x2 $4, s, $10;
            shl.b32 s, b, 3; and.b32 s, s, 0x81c081c0; mul.bf16x2 $5, s, $10;
            shl.b32 s, b, 6; and.b32 s, s, 0x81c081c0; mul.bf16x2 $6, s, $10;
            shl.b32 s, b, 1; and.b32 s, s, 0x80008000; shr.u32 e, b, 5; lop3.b32 s, e, 0x01000100, s, 0xea;
            shr.u32 e, b, 4; lop3.b32 s, e, 0x00c000c0, s, 0xea; mul.bf16x2 $7, s, $10; }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r", [words, scales], is_pure=True, pack=2,
            dtype=(
                tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
            ),
        )  # fmt: skip
    else:
        scale = scales.to(tl.float32) * 2.168404344971009e-19  # 2 ** -62
        upper = words >> 16
        w0, w4 = _value(_code(words, 0)) * scale, _value(_code(upper, 0)) * scale
        w1, w5 = _value(_code(words, 1)) * scale, _value(_code(upper, 1)) * scale
        w2, w6 = _value(_code(words, 2)) * scale, _value(_code(upper, 2)) * scale
        w3, w7 = _value(_code(words, 3)) * scale, _value(_code(upper, 3)) * scale
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _table_code(words, PLACE: tl.constexpr):
    """The four bits of one of the codes of each word of tables: sign, exponent, mantissa."""
    magnitude = words >> (4 * PLACE)  # of the upper four, too: they begin at bit 16
    sign = words >> (8 * (PLACE % 4) + (7 if PLACE < 4 else 3))
    return (magnitude & 7) | ((sign & 1) << 3)


@triton.jit
def table_value(words, PLACE: tl.constexpr):
    """What one of the codes of each word of tables means without its scale, float32."""
    return _value(_table_code(words, PLACE))


@triton.jit
def table_runs(words, lower, upper):
    """bfloat16s of the lower four codes of words of tables, and of the upper four, in an int64 each (Hopper).

    Magnitudes choose the two bytes of each from tables; lower, upper: powers of two in float32.
    """
    low, high = tl.inline_asm_elementwise(
        """{ .reg .b32 m, h, l, a, b, s;
        and.b32 m, $2, 0x77777777; prmt.b32 s, $3, $3, 0x3232;
        prmt.b32 h, 0x3f3f3f00, 0x40404040, m; prmt.b32 l, 0xc0800000, 0xc0804000, m;
        lop3.b32 h, $2, 0x80808080, h, 0xea; prmt.b32 a, l, h, 0x5140; prmt.b32 b, l, h, 0x7362;
        mul.bf16x2 a, a, s; mul.bf16x2 b, b, s; mov.b64 $0, {a, b};
        shr.u32 m, m, 16; prmt.b32 s, $4, $4, 0x3232;
        prmt.b32 h, 0x3f3f3f00, 0x40404040, m; prmt.b32 l, 0xc0800000, 0xc0804000, m; shl.b32 a, $2, 4;
        lop3.b32 h, a, 0x80808080, h, 0xea; prmt.b32 a, l, h, 0x5140; prmt.b32 b, l, h, 0x7362;
        mul.bf16x2 a, a, s; mul.bf16x2 b, b, s; mov.b64 $1, {a, b}; }""",
        "=&l,=&l,r,r,r", [words, lower.to(tl.int32, bitcast=True), upper.to(tl.int32, bitcast=True)], is_pure=True,
        pack=1, dtype=(tl.int64, tl.int64),
    )  # fmt: skip
    return low, high


@triton.jit
def fp4_tile(columns, scales, start, num_in, in_range, of_all, BLOCK_IN: tl.constexpr, PTX: tl.constexpr):
    """The weights of BLOCK_IN words from start on, of each output."""
    place = start + tl.arange(0, BLOCK_IN)
    words = tl.load(columns + place[:, None], mask=(place < num_in)[:, None] & in_range[None, :], other=0)
    group = start // 4 + tl.arange(0, BLOCK_IN // 4)
    some = (group * 4 < num_in)[:, None] & in_range[None, :]
    each = tl.load(scales + group[:, None] * of_all, mask=some, other=0.0)
    wide = tl.broadcast_to(each[:, None, :], (BLOCK_IN // 4, 4, each.shape[1]))
    return fp4_weights(words, wide.reshape((BLOCK_IN, each.shape[1])), PTX)


@triton.jit
def e4m3_as_bfloat16(words):
    """bfloat16s of the e4m3 in the lower byte of each 16-bit word, and of that in its upper one (Hopper).

    By their bits, two words at a time: the card's own conversions, to float16 and on, are too slow to keep up with its
    memory. Where a bfloat16 has these bits it is 2 ** -120 of what they mean.
    """
    lower, upper = tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c;
        shl.b32 a, $2, 8; and.b32 a, a, 0x80008000; shl.b32 b, $2, 4; lop3.b32 a, b, 0x07f007f0, a, 0xea;
        and.b32 c, $2, 0x80008000; shr.u32 b, $2, 4; lop3.b32 b, b, 0x07f007f0, c, 0xea;
        mov.b32 c, 0x7b807b80; mul.bf16x2 $0, a, c; mul.bf16x2 $1, b, c; }""",
        "=&r,=&r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip
    return lower, upper


@triton.jit
def bfloat16_pairs(words):
    """The bfloat16s in the lower halves of 32-bit words, and in the upper ones."""
    lower, upper = tl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;",
        "=&r,=&r,r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip
    return lower, upper


@triton.jit
def _paired(acc, even, odd, words, fits, scales, start, in_range, KIND: tl.constexpr):
    """acc plus the products of a tile of words of two e4m3 with the inputs that they meet."""
    lower, upper = e4m3_as_bfloat16(tl.load(words, mask=fits, other=0))
    if KIND == "blocks":
        product = tl.dot(odd, upper, tl.dot(even, lower))
        acc += product * tl.load(scales + start // 64, mask=in_range[None, :], other=0.0)
    else:
        acc = tl.dot(odd, upper, tl.dot(even, lower, acc))
    return acc


@triton.jit
def _single(acc, x, weights, fits, scales, start, in_range, KIND: tl.constexpr):
    """acc plus the products of a tile of weights with x."""
    weight = tl.load(weights, mask=fits, other=0.0).to(x.dtype)
    if KIND == "blocks":
        factor = tl.load(scales + start // 128, mask=in_range[None, :], other=0.0)
        acc += tl.dot(x, weight, input_precision="ieee") * factor
    else:
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    return acc


@triton.jit
def multiply(
    acc, acc_up, x_rows, real, columns, up_columns, scales, up_scales, start, num_in, in_range, of_all,
    GATED: tl.constexpr, KIND: tl.constexpr, PAIRED: tl.constexpr, BLOCK_IN: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """One step of a tile's products: acc [ROWS, BLOCK_OUT] and, GATED, acc_up with the BLOCK_IN inputs from start on.

    x_rows [ROWS, 1]: pointers to rows of which those that are real are read; columns [1, BLOCK_OUT]: to each output's
    first weight (word), and up_columns to those of the second matrix. KIND: "plain", "channels" (the caller scales its
    sums), "blocks" (scales [1, BLOCK_OUT] point to the first block of each output's row) or "fp4": inputs are counted
    in words then, and scales point to an output's first, which is of_all places from the next.
    PAIRED: x is in words of two bfloat16s, and weights in words of two e4m3; so are inputs. Outputs not in_range are
    not read.
    """
    place = start + tl.arange(0, BLOCK_IN)
    inside = place < num_in
    fits = inside[:, None] & in_range[None, :]
    if KIND == "fp4":
        weights = fp4_tile(columns, scales, start, num_in, in_range, of_all, BLOCK_IN, PTX)
        if GATED:
            ups = fp4_tile(up_columns, up_scales, start, num_in, in_range, of_all, BLOCK_IN, PTX)
        word = tl.arange(0, BLOCK_IN)
        near = x_rows + (start * 8 + (word // 4 * 32 + word % 4))[None, :]
        mask = real[:, None] & inside[None, :]
        for i in tl.static_range(8):
            x = tl.load(near + 4 * i, mask=mask, other=0.0)
            acc = tl.dot(x, weights[i].to(x.dtype), acc, input_precision="ieee")
            if GATED:
                acc_up = tl.dot(x, ups[i].to(x.dtype), acc_up, input_precision="ieee")
    elif PAIRED:
        x = tl.load(x_rows + place[None, :], mask=real[:, None] & inside[None, :], other=0)
        even, odd = bfloat16_pairs(x)
        acc = _paired(acc, even, odd, columns + place[:, None], fits, scales, start, in_range, KIND)
        if GATED:
            acc_up = _paired(acc_up, even, odd, up_columns + place[:, None], fits, up_scales, start, in_range, KIND)
    else:
        x = tl.load(x_rows + place[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        acc = _single(acc, x, columns + place[:, None], fits, scales, start, in_range, KIND)
        if GATED:
            acc_up = _single(acc_up, x, up_columns + place[:, None], fits, up_scales, start, in_range, KIND)
    return acc, acc_up
