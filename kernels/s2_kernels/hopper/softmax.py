"""Softmax over scores [64, N] in the registers of a warpgroup, with little to do a tile.

Four threads share a row, and what is known of it, its maximum and its sum, is kept as [64, 4], one
copy a thread. The sum is each thread's own part of it until the end. The maximum need not be that
of all tiles: what is subtracted may lag behind by up to LAG, so that probabilities reach 2**LAG and
are rounded no worse for it. It is moved when a score of a tile lies further above, by the warps
whose rows have one; the others pass over that and over rescaling (as FlashAttention-4 does).

Everything is in base 2: scores are scaled by log2(e) as well.
"""

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LAG = gl.constexpr(8.0)


def _bits(x: float) -> str:
    """A float32 as PTX writes it."""
    return "0f" + struct.pack(">f", x).hex()


def _passed_over(test: list[str], body: list[str]) -> str:
    """PTX that sets the predicate p by `test` and runs `body` in the warps that have a p."""
    return "\n".join(
        [
            "{ .reg .pred p, some; .reg .f32 t;",
            *test,
            "vote.sync.any.pred some, p, 0xffffffff;",
            "@!some bra.uni PASS_${:uid};",
            *body,
            "PASS_${:uid}: }",
        ]
    )


def _rise() -> str:
    """Of $2 and $3, a thread's maxima of its two rows: the rows' maxima, or 0 up to LAG."""
    lag, body = _bits(LAG.value), []
    for out, top in (("$0", "$2"), ("$1", "$3")):
        body += [f"mov.f32 {out}, {top};"]
        for lane in (1, 2):
            body += [f"shfl.sync.bfly.b32 t, {out}, {lane}, 31, 0xffffffff;"]
            body += [f"max.f32 {out}, {out}, t;"]
        body += [f"setp.gt.f32 p, {out}, {lag};", f"selp.f32 {out}, {out}, {_bits(0)}, p;"]
    test = [f"setp.gt.f32 p, $2, {lag};", f"setp.gt.or.f32 p, $3, {lag}, p;"]
    zeros = f"mov.f32 $0, {_bits(0)};\nmov.f32 $1, {_bits(0)};\n"
    return zeros + _passed_over(test, body)


def _unless_neutral(op: str, neutral: float, n: int) -> str:
    """x = op(x, y) for a thread's n elements; y has one value for each of two rows.

    Elements are in pairs of one row, then of the other: $0 to $(n - 1) are x, $(2 n) on are y.
    """
    test = [
        f"setp.neu.f32 p, ${2 * n}, {_bits(neutral)};",
        f"setp.neu.or.f32 p, ${2 * n + 2}, {_bits(neutral)}, p;",
    ]
    return _passed_over(test, [f"{op}.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n)])


def _in_place(n: int) -> str:
    """Operands of `_unless_neutral`: x comes and goes in the same registers."""
    return ",".join(["=&f"] * n + [str(i) for i in range(n)] + ["f"] * n)


RISE = gl.constexpr(_rise())
LOWER = gl.constexpr({n: _unless_neutral("sub", 0.0, n) for n in (32, 64)})
SCALE = gl.constexpr({n: _unless_neutral("mul", 1.0, n) for n in (32, 64)})
IN_PLACE = gl.constexpr({n: _in_place(n) for n in (32, 64)})


@gluon.jit
def in_parts(b_x):
    """[64, N] as [64, N / 8, 4, 2]: the second and the last axis lie within a thread."""
    return gl.reshape(b_x, [64, b_x.shape[1] // 8, 4, 2])


@gluon.jit
def spread(b_x, b_like):
    """[64, 4], what threads have of a row, in the shape and layout of b_like [64, N]."""
    b_parts = in_parts(b_like)
    layout: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(1, b_parts.type.layout))
    b_x = gl.convert_layout(b_x, layout).expand_dims(2).expand_dims(1)
    b_x = gl.reshape(b_x.broadcast_to(b_parts.shape), b_like.shape)
    return gl.convert_layout(b_x, b_like.type.layout)


@gluon.jit
def unless_neutral(b_x, b_y, ASM: gl.constexpr):
    """b_x [64, N] with b_y [64, 4], by LOWER (minus) or SCALE (times)."""
    n: gl.constexpr = min(b_x.shape[1] // 2, 64)
    asm: gl.constexpr = ASM[n]
    operands: gl.constexpr = IN_PLACE[n]
    return gl.inline_asm_elementwise(
        asm, operands, [b_x, spread(b_y, b_x)], dtype=gl.float32, is_pure=False, pack=n
    )


@gluon.jit
def first_max(b_s, scale_log2):
    """The maximum of the first tile's scaled scores, [64, 4]."""
    b_m = gl.max(gl.max(in_parts(b_s), 1), 2)
    return gl.max(b_m, 1).expand_dims(1).broadcast_to(b_m.shape) * scale_log2


@gluon.jit
def row_sum(b_p):
    """Sums of the rows of b_p [64, N], each thread's part: [64, 4]."""
    return gl.sum(gl.sum(in_parts(b_p), 1), 2)


@gluon.jit
def first_softmax(b_s, scale_log2):
    """Probabilities of a first tile's scores [64, N], and of its rows maximum and sum [64, 4]."""
    b_m = first_max(b_s, scale_log2)
    b_p = gl.exp2(b_s * scale_log2 - spread(b_m, b_s))
    return b_p, b_m, row_sum(b_p)


@gluon.jit
def exponents(b_s, b_m, scale_log2):
    """What the probabilities of a tile's scores [64, N] are powers of 2 of; and the new b_m.

    The third: by how much that was moved, [64, 4], 0 for most.
    """
    b_t = b_s * scale_log2 - spread(b_m, b_s)
    # The largest, as integers, which the chip compares three at a time. Of negative numbers it is
    # the smallest, but these lie below LAG either way.
    b_top = gl.max(gl.max(in_parts(b_t.to(gl.int32, bitcast=True)), 1), 2)
    b_rise = gl.inline_asm_elementwise(
        RISE, "=&f,=&f,f,f", [b_top.to(gl.float32, bitcast=True)],
        dtype=gl.float32, is_pure=False, pack=2,
    )  # fmt: skip
    b_t = unless_neutral(b_t, b_rise, LOWER)
    b_rise = gl.convert_layout(b_rise, b_m.type.layout)
    return b_t, b_m + b_rise, b_rise


@gluon.jit
def rescale(b_acc, b_rescale):
    """The rows of b_acc [64, n] times b_rescale [64, 4], which is 1 for most."""
    return unless_neutral(b_acc, b_rescale, SCALE)


@gluon.jit
def pack(b_x, DTYPE: gl.constexpr):
    """float32 [64, n], rounded to DTYPE, in pairs: int32 [64, n / 2].

    What a loop carries in halves of registers, ptxas carries with the halves exchanged, and puts
    that right with an instruction for each register before every product.
    """
    b_even, b_odd = gl.split(gl.reshape(b_x, [64, b_x.shape[1] // 2, 2]))
    PAIR: gl.constexpr = "bf16x2" if DTYPE.is_bf16() else "f16x2"
    return gl.inline_asm_elementwise(
        f"cvt.rn.{PAIR}.f32 $0, $2, $1;", "=r,r,r", [b_even, b_odd],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def unpack(b_x, DTYPE: gl.constexpr, layout: gl.constexpr):
    """What went into `pack`, rounded to DTYPE."""
    b_even, b_odd = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [b_x],
        dtype=(gl.int16, gl.int16), is_pure=True, pack=1,
    )  # fmt: skip
    b_x = gl.reshape(gl.join(b_even, b_odd), [64, 2 * b_x.shape[1]])
    return gl.convert_layout(b_x.to(DTYPE, bitcast=True), layout)
