"""Steps of the Gluon schedules: waiting, asking for W, one product, the epilogue."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma

from .gemm import sum_of_splits as triton_sum_of_splits

# For Gluon, which cannot call what Triton interprets.
sum_of_splits = gluon.jit(triton_sum_of_splits.fn)


@gluon.jit
def wait_for_predecessor():
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_successor_start():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def ask_w(w_desc, n, k, ready, tile, APART: gl.constexpr, KN: gl.constexpr, pred):
    if APART > 0:
        # The two boxes that belong together, of a head that is wider than the tile.
        first = n // 2
        at = [first // APART * 2, first % APART, k]
        tma.async_copy_global_to_shared(w_desc, at, ready, tile, pred=pred)
    elif KN:
        tma.async_copy_global_to_shared(w_desc, [k, n], ready, tile, pred=pred)
    else:
        tma.async_copy_global_to_shared(w_desc, [n, k], ready, tile, pred=pred)


@gluon.jit
def multiply(w, x, acc, TOKENS_FIRST: gl.constexpr, KN: gl.constexpr):
    """One step: acc += the product of the tiles, without waiting for it."""
    if TOKENS_FIRST:
        return warpgroup_mma(x, w if KN else w.permute((1, 0)), acc, is_async=True)
    else:
        return warpgroup_mma(w.permute((1, 0)) if KN else w, x.permute((1, 0)), acc, is_async=True)


@gluon.jit
def finish(
    acc,
    acc2,
    m0,
    n0,
    m_size,
    t,
    N: gl.constexpr,
    HALVES: gl.constexpr,
    TOKENS_FIRST: gl.constexpr,
    PAIRED: gl.constexpr,
    WARPS: gl.constexpr,
    EPILOGUE: gl.constexpr,
):
    """The epilogue, on sums laid out so that a warp stores whole lines: columns of W are adjacent in memory."""
    ACROSS: gl.constexpr = 2 if HALVES > 0 else 1
    LAST: gl.constexpr = N // ACROSS
    ALONG_N: gl.constexpr = (acc.shape[1] if TOKENS_FIRST else acc.shape[0]) // ACROSS
    WIDE: gl.constexpr = 4 if ALONG_N >= 32 else 2
    LANES: gl.constexpr = min(32, ALONG_N // WIDE)
    lines: gl.constexpr = (
        gl.BlockedLayout([1, WIDE], [32 // LANES, LANES], [WARPS, 1], [1, 0])
        if TOKENS_FIRST
        else gl.BlockedLayout([WIDE, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    )
    if HALVES > 0:
        # Of a head that is wider than the tile, the tile holds as much of both halves.
        acc, acc2 = halves_apart(acc, min(HALVES, ALONG_N), TOKENS_FIRST, WIDE, LANES, WARPS)
    first = gl.expand_dims(gl.arange(0, acc.shape[0], gl.SliceLayout(1, lines)), 1)
    second = gl.expand_dims(gl.arange(0, acc.shape[1], gl.SliceLayout(0, lines)), 0)
    if TOKENS_FIRST:
        m, n = m0 + first, n0 // ACROSS + second
    else:
        m, n = m0 + second, n0 // ACROSS + first
    acc = gl.convert_layout(acc, lines)
    acc2 = gl.convert_layout(acc2, lines) if PAIRED or HALVES > 0 else acc
    EPILOGUE(acc, acc2, gl.minimum(m, m_size - 1), n, (n < LAST) & (m < m_size), t)


@gluon.jit
def halves_apart(
    acc, HALF: gl.constexpr, TOKENS_FIRST: gl.constexpr, WIDE: gl.constexpr, LANES: gl.constexpr, WARPS: gl.constexpr
):
    """As `gemm.halves_apart`, each thread with both halves of its elements."""
    ROWS: gl.constexpr = acc.shape[0]
    COLS: gl.constexpr = acc.shape[1]
    pairs: gl.constexpr = (
        gl.BlockedLayout([1, WIDE, 2], [32 // LANES, LANES, 1], [WARPS, 1, 1], [2, 1, 0])
        if TOKENS_FIRST
        else gl.BlockedLayout([WIDE, 1, 2], [LANES, 32 // LANES, 1], [1, WARPS, 1], [2, 0, 1])
    )
    if TOKENS_FIRST:
        heads = acc.reshape([ROWS, COLS // (2 * HALF), 2, HALF]).permute((0, 1, 3, 2)).reshape([ROWS, COLS // 2, 2])
    else:
        heads = acc.reshape([ROWS // (2 * HALF), 2, HALF, COLS]).permute((0, 2, 3, 1)).reshape([ROWS // 2, COLS, 2])
    return gl.split(gl.convert_layout(heads, pairs))
