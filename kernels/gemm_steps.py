"""Steps of the Gluon schedules: waiting, asking for W, one product, the epilogue."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma, warpgroup_mma_wait

from .functions import sum_of_parts as triton_sum_of_parts
from .gemm import first_row as triton_first_row
from .gemm import sum_of_splits as triton_sum_of_splits
from .ptx import next_two_are_one

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
def ask_w(
    w_desc,
    n,
    k,
    ready,
    ring,
    slot,
    ACCS: gl.constexpr,
    PAIR_OFFSET: gl.constexpr,
    APART: gl.constexpr,
    TOGETHER: gl.constexpr,
    KN: gl.constexpr,
    pred,
):
    """A step's tiles of W, at column n."""
    for a in gl.static_range(ACCS):
        tile = ring.index(slot * ACCS + a)
        column = n + a * PAIR_OFFSET
        if APART > 0:
            # The two boxes that belong together, of a head that is wider than the tile.
            at = [column // 2 // APART * 2, column // 2 % APART, k]
        elif TOGETHER:
            at = [column // 8, 0, 0, k]
        elif KN:
            at = [k, column]
        else:
            at = [column, k]
        tma.async_copy_global_to_shared(w_desc, at, ready.index(slot), tile, pred=pred)


@gluon.constexpr_function
def folds(block_m: int) -> bool:
    """Whether tiles of so many rows of x come in halves: the second may begin before the first ends."""
    return block_m >= 64


@gluon.jit
def eights_of_rows(DTYPE: gl.constexpr, ROWS: gl.constexpr, DEPTH: gl.constexpr):
    """A ring of rows of x: TMA and the tensor cores put eight of them after another."""
    laid: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, DEPTH], DTYPE)
    return gl.allocate_shared_memory(DTYPE, [ROWS // 8, 8, DEPTH], laid)


@gluon.jit
def from_row(ring, slot, TOKENS: gl.constexpr, ROW: gl.constexpr):
    """A slot's tile, of so many tokens, from a row on."""
    return ring.index(slot * (TOKENS // 8) + ROW // 8)


@gluon.jit
def rows_of(ring, slot, TOKENS: gl.constexpr, FIRST: gl.constexpr, ROWS: gl.constexpr, DEPTH: gl.constexpr):
    """Some rows of a slot's tile, as a matrix."""
    return as_rows(from_row(ring, slot, TOKENS, FIRST), ROWS, DEPTH)


@gluon.jit
def ask_x(descs, rows, k, ready, ring, slot, BLOCK_M: gl.constexpr, EXTRA_M: gl.constexpr, pred):
    """A step's tile of x and, where there are EXTRA_M rows, the one beside it; descriptors and first rows of both."""
    TOKENS: gl.constexpr = BLOCK_M + EXTRA_M
    at = [0, rows[0], k] if folds(BLOCK_M) else [rows[0], k]
    tile = as_box(from_row(ring, slot, TOKENS, 0), descs[0])
    tma.async_copy_global_to_shared(descs[0], at, ready.index(slot), tile, pred=pred)
    if EXTRA_M > 0:
        beside = as_box(from_row(ring, slot, TOKENS, BLOCK_M), descs[1])
        tma.async_copy_global_to_shared(descs[1], [rows[1], k], ready.index(slot), beside, pred=pred)


@gluon.jit
def as_box(tile, desc):
    """Memory as what a descriptor brings."""
    return tile._reinterpret(desc.dtype, desc.block_shape, desc.layout)


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


@gluon.jit
def multiply_both(w, x, more, acc, extra, KN: gl.constexpr, NOTE: gl.constexpr):
    """The same for x and the rows that follow it, in one instruction."""
    next_two_are_one(NOTE)
    return multiply(w, x, acc, False, KN), multiply(w, more, extra, False, KN)


@gluon.jit
def multiplied(acc, acc2, extra, extra2, SEPARATE: gl.constexpr, EXTRA_M: gl.constexpr, STEPS: gl.constexpr):
    """The accumulators that there are, once all but the products of so many last steps are in them; where tokens stand
    beside a tile, two products are one."""
    PENDING: gl.constexpr = STEPS * (2 if SEPARATE else 1)
    if SEPARATE and EXTRA_M > 0:
        acc, acc2, extra, extra2 = warpgroup_mma_wait(PENDING, deps=(acc, acc2, extra, extra2))
    elif SEPARATE:
        acc, acc2 = warpgroup_mma_wait(PENDING, deps=(acc, acc2))
    elif EXTRA_M > 0:
        acc, extra = warpgroup_mma_wait(PENDING, deps=(acc, extra))
    else:
        acc = warpgroup_mma_wait(PENDING, deps=(acc,))
    return acc, acc2, extra, extra2


@gluon.jit
def in_fours(acc):
    """Sums of tensor cores with the four adjacent ones that a thread has in a row of their own: it stores those at
    once, and a warp whole lines."""
    ROWS: gl.constexpr = acc.shape[0]
    COLS: gl.constexpr = acc.shape[1]
    apart = acc.reshape([ROWS // 16, 2, 8, COLS // 8, 4, 2])
    return apart.permute((0, 3, 2, 4, 1, 5)).reshape([ROWS * COLS // 4, 4])


@gluon.jit
def out_of_fours(fours, ROWS: gl.constexpr, COLS: gl.constexpr):
    """The matrix that `in_fours` was given."""
    apart = fours.reshape([ROWS // 16, COLS // 8, 8, 4, 2, 2])
    return apart.permute((0, 4, 2, 1, 3, 5)).reshape([ROWS, COLS])


@gluon.jit
def places(fours):
    laid: gl.constexpr = fours.type.layout
    row = gl.expand_dims(gl.arange(0, fours.shape[0], gl.SliceLayout(1, laid)), 1)
    return row * 4 + gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, laid)), 0)


@gluon.jit
def leave(memory, acc):
    """Store sums as `collect` finds them."""
    fours = in_fours(acc)
    gl.store(memory + places(fours), fours)


@gluon.jit
def collect(memory, like, SPLIT_K: gl.constexpr, STRIDE: gl.constexpr):
    """The sums of all splits, in their order; of one, its own."""
    if SPLIT_K == 1:
        return like
    else:
        fours = in_fours(like)
        return out_of_fours(sum_of_splits(memory, places(fours), SPLIT_K, STRIDE), like.shape[0], like.shape[1])


@gluon.jit
def pairs_apart(acc):
    """Of a tile in which eight rows of W and the eight that belong to them follow one another, either kind."""
    ROWS: gl.constexpr = acc.shape[0]
    COLS: gl.constexpr = acc.shape[1]
    both = acc.reshape([ROWS // 16, 2, 8, COLS]).permute((0, 2, 3, 1))
    return gl.split(both.reshape([ROWS // 2, COLS, 2]))


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
    FOLDS: gl.constexpr,
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
    if FOLDS:
        twice = gl.where(m_size > HALF, gl.maximum(BLOCK_M - m_size, 0), 0)
        m = gl.where(row < HALF, m, m - twice)
    own = (m >= m0) & (m < m_size)
    if FOLDS:
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
    TOGETHER: gl.constexpr,
    WARPS: gl.constexpr,
    FOLDS: gl.constexpr,
    EPILOGUE: gl.constexpr,
):
    """The epilogue, on sums laid out as it stores them."""
    if TOGETHER:
        acc, acc2 = pairs_apart(acc)
    BLOCK_M: gl.constexpr = acc.shape[0 if TOKENS_FIRST else 1]
    BLOCK_N: gl.constexpr = acc.shape[1 if TOKENS_FIRST else 0]
    ACROSS: gl.constexpr = 2 if HALVES > 0 else 1
    laid: gl.constexpr = lines(BLOCK_N // ACROSS, TOKENS_FIRST, WARPS)
    if HALVES > 0:
        # Of a head that is wider than the tile, the tile holds as much of both halves.
        acc, acc2 = halves_apart(acc, min(HALVES, BLOCK_N // 2), TOKENS_FIRST, WARPS)
    m, n, mask = rows_and_columns(m0, n0, m_size, N, BLOCK_M, BLOCK_N, HALVES, TOKENS_FIRST, WARPS, FOLDS)
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
