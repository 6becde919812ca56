"""Scalar functions that bodies call: torch's arithmetic where Triton's differs, in fp32 or the integers given.

    relu, maximum, minimum   hand NaN on, as torch does and `tl.maximum` alone does not
    div_floor, remainder     round towards minus infinity for both signs; `//` and `%` of Triton truncate
    row_max, row_min, …      reductions over axis 1 that keep the axis
    row_running_sum, …       scans along axis 1
    store_sums, load_parts,  what a GEMM's epilogue leaves of rows whose other columns are other tiles',
    sum_of_parts             and what takes it up
    sum_of_heads             sums over the heads that a GEMM's tile holds

Schedule, bytes: none of their own; they are inlined into the body.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .launch import INTERPRETED


@triton.jit
def maximum(a, b):
    """Elementwise maximum; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    """Elementwise minimum; NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu(x):
    """max(x, 0); NaN stays."""
    return tl.where((x > 0) | (x != x), x, 0)


@triton.jit
def _quick_exp2(x):
    """2^x, fp32, by one instruction; 0 for a result below fp32's normal numbers, whose guard costs three more."""
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _quick_reciprocal(x):
    """1 / x, fp32, by one instruction; 0 for x above 2^126."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _exp2_by_numpy(x):
    return tl.exp2(x)


@triton.jit
def _reciprocal_by_numpy(x):
    return 1.0 / x


if INTERPRETED:
    _quick_exp2, _quick_reciprocal = _exp2_by_numpy, _reciprocal_by_numpy


@triton.jit
def _four_sigmoids(x):
    """4 / (1 + exp(-x)) of fp32, by a quarter of the denominator: that stays below 2^126 for as long as exp(-x) is one.

    A GEMM's epilogue computes it while the tensor cores wait, so that every instruction counts: `tl.exp` and a division
    take nine more.
    """
    return _quick_reciprocal(0.25 + _quick_exp2(x * -1.4426950408889634 - 2.0))


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    if x.dtype == tl.float64:
        return x / (1.0 + tl.exp(-x))
    else:
        return (0.25 * x) * _four_sigmoids(x)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    if x.dtype == tl.float64:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        return 0.25 * _four_sigmoids(x)


@triton.jit
def tanh(x):
    """Hyperbolic tangent."""
    return libdevice.tanh(x)


@triton.jit
def sign(x):
    """−1, 0 or 1 in x's dtype; 0 for NaN."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def divide(a, b):
    """a / b rounded to nearest, fp32 or fp64; one of them may be a number."""
    if (a + b).dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def div_floor(a, b):
    """a / b rounded towards minus infinity, floating point; exact where the quotient lies next to a whole number.

    Source: the algorithm of torch's `floor_divide`, which is that of Python's `//`.
    """
    rest = libdevice.fmod(a, b)
    quotient = divide(a - rest, b)
    quotient = tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1.0, quotient)
    whole = tl.floor(quotient)
    whole = tl.where(quotient - whole > 0.5, whole + 1.0, whole)
    plain = divide(a, b)
    return tl.where(b == 0, plain, tl.where(quotient == 0, libdevice.copysign(plain * 0, plain), whole))


@triton.jit
def _by_zero(value, b):
    """What an integer division made, -1 where b is 0 as torch's CUDA kernels have it.

    The compiler divides 64-bit numbers that fit into 32 bits as such; by zero that gives 2**32 - 1.
    """
    if value.dtype.primitive_bitwidth == 64:
        return tl.where((value * 0 + b == 0) & (value == 4294967295), -1, value)
    else:
        return value


@triton.jit
def div_trunc_int(a, b):
    """a / b rounded towards zero, integers."""
    return _by_zero(a // b, b)


@triton.jit
def div_floor_int(a, b):
    """a / b rounded towards minus infinity, integers; `//` of Triton truncates."""
    quotient = div_trunc_int(a, b)
    return quotient - ((fmod_int(a, b) != 0) & ((a < 0) != (b < 0))).to(quotient.dtype)


@triton.jit
def div_trunc(a, b):
    """a / b rounded towards zero, floating point."""
    return libdevice.trunc(divide(a, b))


@triton.jit
def remainder(a, b):
    """The remainder that has the sign of b, floating point."""
    rest = libdevice.fmod(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def fmod_int(a, b):
    """The remainder that has the sign of a, integers."""
    return _by_zero(a % b, b)


@triton.jit
def remainder_int(a, b):
    """The remainder that has the sign of b, integers; `%` of Triton has a's."""
    rest = fmod_int(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def pow_int(a, b):
    """a to the power of b modulo a's size; a negative power of what is not 1 or -1 is 0."""
    a, b = a + b * 0, b + a * 0
    power, square, rest = a * 0 + 1, a, b
    for _ in range(a.dtype.primitive_bitwidth):
        power = tl.where(rest & 1 != 0, power * square, power)
        square, rest = square * square, rest >> 1
    if a.dtype.is_int_signed():
        unit = tl.where(a == 1, a, tl.where(a == -1, tl.where(b & 1 != 0, a, -a), 0))
        power = tl.where(b < 0, unit, power)
    return power.to(a.dtype)


@triton.jit
def shift_left(a, b):
    """a << b; 0 for a b that is negative or beyond a's bits."""
    inside = (b >= 0) & (b < a.dtype.primitive_bitwidth)
    return tl.where(inside, a << tl.where(inside, b, 0), 0).to(a.dtype)


@triton.jit
def shift_right(a, b):
    """a >> b; all bits shifted out for a b that is negative or beyond a's bits."""
    most: tl.constexpr = a.dtype.primitive_bitwidth - 1
    if a.dtype.is_int_signed():
        return a >> tl.where((b >= 0) & (b < most), b, most).to(a.dtype)
    else:
        inside = (b >= 0) & (b <= most)
        return tl.where(inside, a >> tl.where(inside, b, 0), 0).to(a.dtype)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def row_sum(x):
    """Sum over the columns, [R, C] to [R, 1], in the dtype of x: integers wrap, where Triton's sum widens them."""
    return tl.sum(x, axis=1, keep_dims=True).to(x.dtype)


@triton.jit
def row_max(x):
    """Largest over the columns, [R, C] to [R, 1]; NaN if there is one."""
    return tl.reduce(x, axis=1, combine_fn=_larger, keep_dims=True)


@triton.jit
def row_min(x):
    """Smallest over the columns, [R, C] to [R, 1]; NaN if there is one."""
    return tl.reduce(x, axis=1, combine_fn=_smaller, keep_dims=True)


@triton.jit
def _row_max_by_numpy(x):
    if x.dtype.is_floating():
        lost = tl.max((x != x).to(tl.int32), axis=1, keep_dims=True) != 0
        return tl.where(lost, float("nan"), tl.max(x, axis=1, keep_dims=True))
    else:
        # `tl.max` widens whole numbers to 32 bits, and what is computed from them would not wrap.
        return tl.max(x, axis=1, keep_dims=True).to(x.dtype)


@triton.jit
def _row_min_by_numpy(x):
    if x.dtype.is_floating():
        lost = tl.max((x != x).to(tl.int32), axis=1, keep_dims=True) != 0
        return tl.where(lost, float("nan"), tl.min(x, axis=1, keep_dims=True))
    else:
        return tl.min(x, axis=1, keep_dims=True).to(x.dtype)


if INTERPRETED:
    # It reduces with numpy, and only knows plain combine functions as fast. Not asked inside them: with a constexpr of
    # the module's in a function, Triton's key of a caller depends on which of the two keys was asked for first.
    row_max, row_min = _row_max_by_numpy, _row_min_by_numpy


@triton.jit
def row_prod(x):
    """Product over the columns, [R, C] to [R, 1]."""
    return tl.reduce(x, axis=1, combine_fn=_times, keep_dims=True)


@triton.jit
def row_any(x):
    """Whether any column holds, [R, C] to [R, 1]."""
    return tl.max(x.to(tl.int32), axis=1, keep_dims=True) != 0


@triton.jit
def row_all(x):
    """Whether every column holds, [R, C] to [R, 1]."""
    return tl.min(x.to(tl.int32), axis=1, keep_dims=True) != 0


@triton.jit
def _first(hit):
    """First column that holds, [R, C] to [R, 1], int64."""
    column = tl.arange(0, hit.shape[1])[None, :]
    return tl.min(tl.where(hit, column, hit.shape[1]), axis=1, keep_dims=True).to(tl.int64)


@triton.jit
def row_argmax(x):
    """Index of the first largest column (the first NaN, if there is one), [R, C] to [R, 1], int64."""
    return _first((x == row_max(x)) | (x != x))


@triton.jit
def row_argmin(x):
    """Index of the first smallest column (the first NaN, if there is one), [R, C] to [R, 1], int64."""
    return _first((x == row_min(x)) | (x != x))


@triton.jit
def row_running_sum(x):
    """Sum of every column and those before it, [R, C]; of fp32 in fp64.

    A scan adds in another order for each column. What models subtract from one another again (decays in log space) has
    to be equal where only zeros lie between, as it is where a CPU adds one after the other.
    """
    if x.dtype == tl.float32:
        return tl.cumsum(x.to(tl.float64), axis=1).to(tl.float32)
    return tl.cumsum(x, axis=1).to(x.dtype)


@triton.jit
def row_running_prod(x):
    """Product of every column and those before it, [R, C]; of fp32 in fp64, as sums are."""
    if x.dtype == tl.float32:
        return tl.cumprod(x.to(tl.float64), axis=1).to(tl.float32)
    return tl.cumprod(x, axis=1)


@triton.jit
def store_sums(rows, x, n, mask, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Leave the sums of a tile over its columns, each as the first of as many parts as the tile is wide; the others, 0.

    Args:
        rows: pointers to each row's PARTS parts, in the shape of `m`, [R, 1] or [1, R].
        x, mask: the tile, columns along the other axis; n: their numbers, consecutive, from a multiple of WIDTH on.
        WIDTH: columns of a part.
    """
    ALONG: tl.constexpr = 0 if n.shape[0] > 1 else 1
    TILE: tl.constexpr = n.shape[ALONG]
    tl.static_assert(TILE % WIDTH == 0, "a tile has to hold whole parts")
    total = tl.sum(tl.where(mask, x, 0.0), axis=ALONG, keep_dims=True)
    there = tl.max(mask.to(tl.int32), axis=ALONG, keep_dims=True) != 0
    first = tl.min(n, axis=ALONG, keep_dims=True) // WIDTH
    for part in tl.static_range(TILE // WIDTH):
        value = total if part == 0 else tl.where(there, 0.0, total)
        tl.store(rows + first + part, value, mask=there & (first + part < PARTS))


@triton.jit
def load_parts(rows, n, PARTS: tl.constexpr):
    """Each row's PARTS parts, to which `rows` points, as a tuple of tiles with the columns `n` along the other axis.

    `n` begins at a multiple of the tile's width, as the alignment of vectors needs it.
    """
    TILE: tl.constexpr = n.shape[0] if n.shape[0] > 1 else n.shape[1]
    parts = ()
    for first in tl.static_range(0, PARTS, TILE):
        part = first + n % TILE
        if first + TILE <= PARTS:
            parts = parts + (tl.load(rows + part),)  # type: ignore[assignment]
        else:
            parts = parts + (tl.load(rows + part, mask=part < PARTS, other=0.0),)  # type: ignore[assignment]
    return parts


@triton.jit
def sum_of_parts(parts, n):
    """Sums of each row's parts, from `load_parts`, in the shape of `m`."""
    ALONG: tl.constexpr = 0 if n.shape[0] > 1 else 1
    total = parts[0]
    for number in tl.static_range(1, len(parts)):
        total += parts[number]
    return tl.sum(total, axis=ALONG, keep_dims=True)


@triton.jit
def sum_of_heads(x, n, HALF: tl.constexpr):
    """Sums of each row over each HALF of a tile's columns, as wide as the tile or, of a tile that is no wider, in the
    shape of `m`.

    Args:
        x: the tile; n: numbers of its columns, along either axis, consecutive, from a multiple of HALF on.
    """
    ALONG: tl.constexpr = 0 if n.shape[0] > 1 else 1
    HEADS: tl.constexpr = n.shape[ALONG] // HALF
    tl.static_assert(HEADS > 0, "a tile has to hold whole heads")
    if HEADS == 1:
        return tl.sum(x, axis=ALONG, keep_dims=True)
    else:
        # By comparison, as a reshaped tile is laid out in another way than what it is used with.
        head = n // HALF % HEADS
        total = tl.where(head == 0, tl.sum(tl.where(head == 0, x, 0.0), axis=ALONG, keep_dims=True), 0.0)
        for number in tl.static_range(1, HEADS):
            own = tl.sum(tl.where(head == number, x, 0.0), axis=ALONG, keep_dims=True)
            total = tl.where(head == number, own, total)
        return total
