"""INT4 codes of two to eight rows in groups of 128 through the matrix unit, as grouped.py packs them.

    words of 8 inputs, 16 apart      ─▶ pairs of bfloat16 of 128 + code ─▶ A [16 outputs, 16 inputs]
    the same inputs of the rows      ─▶ B [16 inputs, 8 rows]
    D [16 outputs, 8 rows]; with ones for A: the sums of the inputs
    total += scale * D - scale * (128 + zero) * sums of inputs

A lane of the matrix unit has the outputs g and g + 8 of A and four of its 16 inputs (t = lane % 4, g = lane / 4), and
of B the row g and the same four inputs. It loads four words of each of its outputs and, for each of the eight places of
a word, the four inputs that belong to them: any order of inputs will do as long as A and B agree. Weights go from
memory to registers to the matrix unit, and nothing is reordered or written on the way. A program has 32 outputs (gated:
16 of the gate and the same 16 of up); its warps share the groups. See _gluon.py; mma.m16n8k16: NVIDIA's PTX manual.
"""

# A kernel's constants are annotated with a name that Gluon may lack (_gluon.py): no type form to a checker.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch

from mainsail_kernels._gluon import gl, gluon, runs_gluon, wait_for_inputs
from mainsail_kernels._triton import dependent_launch

GROUP = 128
MOST_ROWS = 8
_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


def _products() -> str:
    """Four words of 2 * 16 outputs by the inputs at their places, in PTX: 8 products of each tile, and 8 of ones.

    $0 to $11: sums of tile 0, of tile 1, of the inputs. $12 on: words of tile 0 (four of output g, four of g + 8), of
    tile 1; two registers of inputs for each of the 8 places.
    """
    words, x = 12, 28
    text = "{ .reg .b32 a0, a1, a2, a3, b0, b1, s, one;\nmov.b32 one, 0x3f803f80;\n"
    text += "".join(f"mov.f32 ${i}, 0f00000000;\n" for i in range(words))
    for word in range(4):
        half = "0x5410" if word % 2 == 0 else "0x7632"
        for place in (0, 2):
            for k in range(2):
                low = x + 2 * (place + k) + word // 2
                text += f"prmt.b32 b{k}, ${low}, ${low + 8}, {half};\n"
            for tile in range(3):
                sums = "{" + ", ".join(f"${4 * tile + i}" for i in range(4)) + "}"
                if tile < 2:
                    text += "".join(
                        f"shr.u32 s, ${words + 8 * tile + 4 * row + word}, {4 * (place + k)};\n"
                        f"lop3.b32 a{2 * k + row}, s, 0x000f000f, 0x43004300, 0xea;\n"
                        for k in range(2)
                        for row in range(2)
                    )
                a = "{a0, a1, a2, a3}" if tile < 2 else "{one, one, one, one}"
                text += f"{_MMA} {sums}, {a}, {{b0, b1}}, {sums};\n"
    return text + "}"


_PRODUCTS = gl.constexpr(_products())
_OPERANDS = gl.constexpr(",".join(["=&f"] * 12 + ["r"] * 32))


@gluon.jit
def _fetch(words_ptr, thread, first, num_words, OUTPUTS: gl.constexpr, LINES: gl.constexpr, WARPS: gl.constexpr):
    """The first LINES lines of a program's outputs into the L2 cache."""
    for i in gl.static_range((LINES * OUTPUTS + 32 * WARPS - 1) // (32 * WARPS)):
        which = thread + 32 * WARPS * i
        near = words_ptr + (first + which % OUTPUTS).to(gl.int64) * num_words
        near += gl.minimum(which // OUTPUTS * 32, num_words - 1)
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [near.to(gl.int64)], dtype=gl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@gluon.jit
def _add_scaled(
    total, sums, ones, scale_ptr, zero_ptr, row, group, groups, ZEROS: gl.constexpr, ZERO: gl.constexpr
):  # fmt: skip
    """total and what the products say of these outputs' group, with its scale and zero point."""
    there = group < groups
    at = row.to(gl.int64) * groups + group
    scale = gl.load(scale_ptr + at, mask=there, other=0).to(gl.float32)
    below = (128.0 + ZERO) * ones
    if ZEROS:
        below += gl.load(zero_ptr + at, mask=there, other=0).to(gl.float32) * ones
    return total + scale * (sums - below)


@gluon.jit
def _whole(total, WARPS: gl.constexpr):
    """What the warps summed, [threads, 4] as D lies, as [8 outputs, 4 pairs of rows, 2 halves of outputs, 2 rows]."""
    return gl.sum(total.reshape([WARPS, 8, 4, 2, 2]), axis=0)


@gluon.jit
def _store(result, bias_ptr, out_ptr, tile, num_rows, num_out, HAS_BIAS: gl.constexpr):
    """16 outputs from `tile` on, of all rows."""
    PARTS: gl.constexpr = result.type.layout
    BY_HALF: gl.constexpr = gl.SliceLayout(3, PARTS)
    g = gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(2, BY_HALF)))[:, None, None, None]
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, BY_HALF)))[None, None, :, None]
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, BY_HALF)))[None, :, None, None]
    one = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, PARTS))))[None, None, None, :]
    output, row = tile + g + 8 * half, 2 * t + one
    if HAS_BIAS:
        result += gl.load(bias_ptr + output).to(gl.float32)
    gl.store(out_ptr + row.to(gl.int64) * num_out + output, result.to(out_ptr.dtype.element_ty), mask=row < num_rows)


@gluon.jit
def _few_kernel(
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, num_rows, num_out, num_words, x_stride,
    ZEROS: gl.constexpr, ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr, SETS: gl.constexpr,
    LINES: gl.constexpr, WARPS: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """x int16 [num_rows, inputs] for bfloat16; words [num_out (gated: twice), num_words]. SETS: groups a turn."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    SPAN: gl.constexpr = 16 if GATED else 32
    thread = gl.arange(0, 32 * WARPS, gl.SliceLayout(1, LAYOUT))[:, None]
    four = gl.arange(0, 4, gl.SliceLayout(0, LAYOUT))[None, :]
    warp, g, t = thread // 32, thread % 32 // 4, thread % 4
    groups = num_words // 16
    tile = gl.program_id(0) * SPAN
    far = num_out * 1 if GATED else 16  # where the second tile lies: up's rows, or the next 16
    if DEPENDENT:
        _fetch(words_ptr, thread, tile, num_words, SPAN, LINES, WARPS)
        if GATED:
            _fetch(words_ptr, thread, num_out + tile, num_words, SPAN, LINES, WARPS)
    wait_for_inputs(DEPENDENT)
    low = tile + g
    first = words_ptr + low.to(gl.int64) * num_words + 4 * t + four
    second = words_ptr + (low + far).to(gl.int64) * num_words + 4 * t + four
    x_row = x_ptr + g.to(gl.int64) * x_stride + 4 * t + four
    row = low + 8 * (four // 2)
    total = gl.zeros([32 * WARPS, 4], gl.float32, LAYOUT)
    total_2 = gl.zeros([32 * WARPS, 4], gl.float32, LAYOUT)
    for turn in range((groups + SETS * WARPS - 1) // (SETS * WARPS)):
        for s in gl.static_range(SETS):
            group = (turn * WARPS + warp) * SETS + s
            here = group < groups
            mine = here & (g < num_rows)
            at = 16 * group
            words = gl.load(first + at, mask=here, other=0, eviction_policy="evict_first")
            words_8 = gl.load(first + 8 * num_words + at, mask=here, other=0, eviction_policy="evict_first")
            up = gl.load(second + at, mask=here, other=0, eviction_policy="evict_first")
            up_8 = gl.load(second + 8 * num_words + at, mask=here, other=0, eviction_policy="evict_first")
            near = x_row + 128 * group
            x0 = gl.load(near, mask=mine, other=0)
            x1 = gl.load(near + 16, mask=mine, other=0)
            x2 = gl.load(near + 32, mask=mine, other=0)
            x3 = gl.load(near + 48, mask=mine, other=0)
            x4 = gl.load(near + 64, mask=mine, other=0)
            x5 = gl.load(near + 80, mask=mine, other=0)
            x6 = gl.load(near + 96, mask=mine, other=0)
            x7 = gl.load(near + 112, mask=mine, other=0)
            sums, sums_2, ones = gl.inline_asm_elementwise(
                _PRODUCTS, _OPERANDS, [words, words_8, up, up_8, x0, x1, x2, x3, x4, x5, x6, x7],
                dtype=(gl.float32, gl.float32, gl.float32), is_pure=True, pack=4,
            )  # fmt: skip
            total = _add_scaled(total, sums, ones, scale_ptr, zero_ptr, row, group, groups, ZEROS, ZERO)
            total_2 = _add_scaled(total_2, sums_2, ones, scale_ptr, zero_ptr, row + far, group, groups, ZEROS, ZERO)
    result, result_2 = _whole(total, WARPS), _whole(total_2, WARPS)
    if GATED:
        result = result / (1.0 + gl.exp(-result)) * result_2
        _store(result, bias_ptr, out_ptr, tile, num_rows, num_out, HAS_BIAS)
    else:
        _store(result, bias_ptr, out_ptr, tile, num_rows, num_out, HAS_BIAS)
        _store(result_2, bias_ptr, out_ptr, tile + 16, num_rows, num_out, HAS_BIAS)


def applies(x: torch.Tensor, words: torch.Tensor, group: int) -> bool:
    """Whether `linear` and `gated_linear` can serve, of codes of 4 bits with an integer for a group's zero point."""
    aligned = x.dtype == torch.bfloat16 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.storage_offset() % 8 == 0
    fits = 2 <= x.shape[0] <= MOST_ROWS and words.shape[0] % 32 == 0 and words.shape[1] % 16 == 0 and group == GROUP
    return runs_gluon(x.device) and bool(aligned) and fits


def linear(
    x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None, zero: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """x [n, in] times the matrix of words [out, in / 8], scale and zeros (None: `zero`) [out, in / 128]: [n, out]."""
    return _launch(x, words, scale, zeros, zero, bias, gated=False)


def gated_linear(
    x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None, zero: int
) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T) for words [2 * d, in / 8], the gate first: [n, d]."""
    return _launch(x, words, scale, zeros, zero, None, gated=True)


def _launch(
    x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None, zero: int,
    bias: torch.Tensor | None, *, gated: bool,
) -> torch.Tensor:  # fmt: skip
    num_words = words.shape[1]
    num_out = words.shape[0] // 2 if gated else words.shape[0]
    out = torch.empty((x.shape[0], num_out), dtype=x.dtype, device=x.device)
    warps = 8 if num_words >= 1024 and not gated else 4
    _few_kernel[(num_out // (16 if gated else 32),)](
        x.view(torch.int16), words, scale, scale if zeros is None else zeros, x if bias is None else bias, out,
        x.shape[0], num_out, num_words, x.stride(0), ZEROS=zeros is not None, ZERO=zero, HAS_BIAS=bias is not None,
        GATED=gated, SETS=2 if gated else 4, LINES=4, WARPS=warps, num_warps=warps, **dependent_launch(x.device),
    )  # fmt: skip
    return out
