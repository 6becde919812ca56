"""Steps of the Gluon schedules: waiting, asking for W, one product, the epilogue."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma

from .functions import sum_of_parts as triton_sum_of_parts
from .gemm import first_row as triton_first_row
from .gemm import sum_of_splits as triton_sum_of_splits

# For Gluon, which cannot call what Triton interprets.
first_row = gluon.jit(triton_first_row.fn)
sum_of_splits = gluon.jit(triton_sum_of_splits.fn)
sum_of_parts = gluon.jit(triton_sum_of_parts.fn)


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


@gluon.constexpr_function
def folds(block_m: int) -> bool:
    """Whether tiles of so many rows of x come in halves: the second may begin before the first ends."""
    return block_m >= 64


@gluon.jit
def ask_x(x_desc, m, k, ready, tile, BLOCK_M: gl.constexpr, pred):
    tma.async_copy_global_to_shared(x_desc, [0, m, k] if folds(BLOCK_M) else [m, k], ready, tile, pred=pred)


@gluon.jit
def as_rows(tile, ROWS: gl.constexpr, DEPTH: gl.constexpr):
    """A tile that came in boxes of rows, as a matrix."""
    shape: gl.constexpr = [ROWS, DEPTH]
    return tile._reinterpret(tile.dtype, shape, gl.NVMMASharedLayout.get_default_for(shape, tile.dtype))


@gluon.jit
def multiply(w, x, acc, TOKENS_FIRST: gl.constexpr, KN: gl.constexpr):
    """One step: acc += the product of the tiles, without waiting for it."""
    if TOKENS_FIRST:
        return warpgroup_mma(x, w if KN else w.permute((1, 0)), acc, is_async=True)
    else:
        return warpgroup_mma(w.permute((1, 0)) if KN else w, x.permute((1, 0)), acc, is_async=True)


@gluon.constexpr_function
def lines(along_n: int, tokens_first: bool, warps: int):
    """The layout of an epilogue's tile, so many columns wide: a warp stores whole lines, as columns of W are adjacent
    in memory."""
    wide = 4 if along_n >= 32 else 2
    lanes = min(32, along_n // wide)
    if tokens_first:
        return gl.BlockedLayout([1, wide], [32 // lanes, lanes], [warps, 1], [1, 0])
    return gl.BlockedLayout([wide, 1], [lanes, 32 // lanes], [1, warps], [0, 1])


@gluon.constexpr_function
def lines_of_pairs(along_n: int, tokens_first: bool, warps: int):
    """The same for pairs of elements, both in one thread."""
    laid = lines(along_n, tokens_first, warps)
    return gl.BlockedLayout(
        [*laid.size_per_thread, 2], [*laid.threads_per_warp, 1], [*laid.warps_per_cta, 1], [2, *laid.order]
    )


@gluon.jit
def rows_and_columns(
    m0,
    n0,
    m_size,
    N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HALVES: gl.constexpr,
    TOKENS_FIRST: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Where the elements of a tile's epilogue lie: `m` and `n`, each along its own axis; of heads, in first halves. And
    which are there and the tile's own: as no row is read beyond the last, some are there twice, or another tile's."""
    ACROSS: gl.constexpr = 2 if HALVES > 0 else 1
    WIDE: gl.constexpr = BLOCK_N // ACROSS
    laid: gl.constexpr = lines(WIDE, TOKENS_FIRST, WARPS)
    M_AXIS: gl.constexpr = 0 if TOKENS_FIRST else 1
    row = gl.expand_dims(gl.arange(0, BLOCK_M, gl.SliceLayout(1 - M_AXIS, laid)), 1 - M_AXIS)
    first = first_row(m0, m_size, BLOCK_M)
    m = first + row
    HALF: gl.constexpr = BLOCK_M // 2
    if folds(BLOCK_M):
        twice = gl.where(m_size > HALF, gl.maximum(BLOCK_M - m_size, 0), 0)
        m = gl.where(row < HALF, m, m - twice)
    own = (m >= m0) & (m < m_size)
    if folds(BLOCK_M):
        own = own & ((row < HALF) | (m >= first + HALF))
    n = n0 // ACROSS + gl.expand_dims(gl.arange(0, WIDE, gl.SliceLayout(M_AXIS, laid)), M_AXIS)
    return gl.minimum(m, m_size - 1), n, (n < N // ACROSS) & own


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
    """The epilogue, on sums laid out as it stores them."""
    BLOCK_M: gl.constexpr = acc.shape[0 if TOKENS_FIRST else 1]
    BLOCK_N: gl.constexpr = acc.shape[1 if TOKENS_FIRST else 0]
    ACROSS: gl.constexpr = 2 if HALVES > 0 else 1
    laid: gl.constexpr = lines(BLOCK_N // ACROSS, TOKENS_FIRST, WARPS)
    if HALVES > 0:
        # Of a head that is wider than the tile, the tile holds as much of both halves.
        acc, acc2 = halves_apart(acc, min(HALVES, BLOCK_N // 2), TOKENS_FIRST, WARPS)
    m, n, mask = rows_and_columns(m0, n0, m_size, N, BLOCK_M, BLOCK_N, HALVES, TOKENS_FIRST, WARPS)
    acc = gl.convert_layout(acc, laid)
    acc2 = gl.convert_layout(acc2, laid) if PAIRED or HALVES > 0 else acc
    EPILOGUE(acc, acc2, m, n, mask, t)


@gluon.jit
def halves_apart(acc, HALF: gl.constexpr, TOKENS_FIRST: gl.constexpr, WARPS: gl.constexpr):
    """As `gemm.halves_apart`, each thread with both halves of its elements."""
    ROWS: gl.constexpr = acc.shape[0]
    COLS: gl.constexpr = acc.shape[1]
    pairs: gl.constexpr = lines_of_pairs((COLS if TOKENS_FIRST else ROWS) // 2, TOKENS_FIRST, WARPS)
    if TOKENS_FIRST:
        heads = acc.reshape([ROWS, COLS // (2 * HALF), 2, HALF]).permute((0, 1, 3, 2)).reshape([ROWS, COLS // 2, 2])
    else:
        heads = acc.reshape([ROWS // (2 * HALF), 2, HALF, COLS]).permute((0, 2, 3, 1)).reshape([ROWS // 2, COLS, 2])
    return gl.split(gl.convert_layout(heads, pairs))
