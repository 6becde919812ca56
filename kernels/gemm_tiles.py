"""The persistent GEMM's kernel and its steps: where a tile lies, the pipelined sum over K that fills it, epilogues."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .gemm import GemmProblem, first_row, halves_apart, load_tile, w_block
from .tma import descriptor


@triton.jit
def tile_origin(
    tile, tiles_m, TILES_N: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """First row and column of a tile; groups of GROUP_M rows of tiles are walked column by column."""
    group = tile // (GROUP_M * TILES_N)
    rows = min(tiles_m - group * GROUP_M, GROUP_M)
    in_group = tile % (GROUP_M * TILES_N)
    return (group * GROUP_M + in_group % rows) * BLOCK_M, in_group // rows * BLOCK_N


@triton.jit
def accumulate(
    x_desc,
    w_desc,
    beside_desc,
    m0,
    n0,
    K: tl.constexpr,
    PAIR_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXTRA_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    HALVES: tl.constexpr,
    PAIRED: tl.constexpr,
    KN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum x[m0:, k] * W[k, n0:] over all k; returns two accumulators: a pair's, or the first and second halves of
    heads, or the same one twice; then two for the columns beside them (n0 + BLOCK_N …, EXTRA_N of them), if any.

    A pair from an [N, K] matrix comes as one tile [2, BLOCK_N, BLOCK_K] of a three-dimensional view, so that one
    instruction of twice the width multiplies both halves and x's tile is read from shared memory once, not twice.
    Halves of heads likewise, as [2, heads, HALVES, BLOCK_K] of a four-dimensional one: the columns of the product lie
    in the order in which the epilogue wants them.
    """
    if (PAIRED or HALVES > 0) and not KN:
        COLUMNS: tl.constexpr = 2 * BLOCK_N if PAIRED else BLOCK_N
        both = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
        beside = tl.zeros([BLOCK_M, 2 * EXTRA_N], tl.float32) if EXTRA_N > 0 else both
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            x = x_desc.load([m0, k])  # [BLOCK_M, BLOCK_K]
            if PAIRED:
                w = w_desc.load([0, n0, k])
            else:
                w = w_desc.load([0, n0 // (2 * HALVES), 0, k])
            both = tl.dot(x, w.reshape(COLUMNS, BLOCK_K).T, both, input_precision=PRECISION)  # [BLOCK_M, COLUMNS]
            if EXTRA_N > 0:
                w = beside_desc.load([0, n0 + BLOCK_N, k]).reshape(2 * EXTRA_N, BLOCK_K)
                beside = tl.dot(x, w.T, beside, input_precision=PRECISION)  # [BLOCK_M, 2 * EXTRA_N]
        acc, acc2 = apart(both)
        beside, beside2 = apart(beside)
        return acc, acc2, beside, beside2
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc2 = acc
        beside = tl.zeros([BLOCK_M, EXTRA_N], tl.float32) if EXTRA_N > 0 else acc
        beside2 = beside
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            x = x_desc.load([m0, k])  # [BLOCK_M, BLOCK_K]
            acc = tl.dot(x, load_tile(w_desc, n0, k, KN).T, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            if PAIRED:
                acc2 = tl.dot(x, load_tile(w_desc, n0 + PAIR_OFFSET, k, KN).T, acc2, input_precision=PRECISION)
            if EXTRA_N > 0:
                w = load_tile(beside_desc, n0 + BLOCK_N, k, KN)
                beside = tl.dot(x, w.T, beside, input_precision=PRECISION)  # [BLOCK_M, EXTRA_N]
                if PAIRED:
                    w = load_tile(beside_desc, n0 + BLOCK_N + PAIR_OFFSET, k, KN)
                    beside2 = tl.dot(x, w.T, beside2, input_precision=PRECISION)
        if HALVES > 0:
            acc, acc2 = halves_apart(acc, HALVES, 1)
        elif not PAIRED:
            acc2 = acc
            beside2 = beside
        return acc, acc2, beside, beside2


@triton.jit
def apart(both):
    """A tile's first and second half of columns."""
    return both.reshape(both.shape[0], 2, both.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def run_epilogue(acc, acc2, m, own, n0, N: tl.constexpr, t, RUNS: tl.constexpr, EPILOGUE: tl.constexpr):
    """The epilogue over rows m, of which `own` are this tile's, and columns n0 … of both accumulators, in `RUNS` runs
    of columns: each needs registers and shared memory only for itself."""
    if RUNS == 1:
        n = n0 + tl.arange(0, acc.shape[1])[None, :]
        EPILOGUE(acc, acc2, m, n, own & (n < N), t)
    else:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = apart(acc)
        left2, right2 = apart(acc2)
        run_epilogue(left, left2, m, own, n0, N, t, RUNS // 2, EPILOGUE)
        run_epilogue(right, right2, m, own, n0 + HALF, N, t, RUNS // 2, EPILOGUE)


@triton.jit
def compute_tile(
    x_desc,
    w_desc,
    beside_desc,
    m0,
    n0,
    m_size,
    t,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIR_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXTRA_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    RUNS: tl.constexpr,
    HALVES: tl.constexpr,
    PAIRED: tl.constexpr,
    KN: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """Products and epilogue of the tile at rows m0 … and columns n0 …."""
    first = first_row(m0, m_size, BLOCK_M)
    acc, acc2, beside, beside2 = accumulate(
        x_desc, w_desc, beside_desc, first, n0, K,
        PAIR_OFFSET, BLOCK_M, BLOCK_N, EXTRA_N, BLOCK_K, STAGES, HALVES, PAIRED, KN, PRECISION,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # Bodies multiply m by a row length: M * N may exceed 2^31 here.
    m = first.to(tl.int64) + tl.arange(0, BLOCK_M)[:, None]
    # The tile before has the others.
    own = (m >= m0) & (m < m_size)
    m = tl.minimum(m, m_size - 1)
    # Columns of heads are counted in their first halves.
    ACROSS: tl.constexpr = 2 if HALVES > 0 else 1
    run_epilogue(acc, acc2, m, own, n0 // ACROSS, N // ACROSS, t, RUNS, EPILOGUE)
    if EXTRA_N > 0:
        run_epilogue(beside, beside2, m, own, n0 + BLOCK_N, N, t, RUNS, EPILOGUE)


@triton.jit(do_not_specialize=["m_size"])
def gemm_persistent_kernel(
    x_desc,
    w_desc,
    second_desc,
    m_size,
    t,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIR_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXTRA_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    TAIL_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    RUNS: tl.constexpr,
    HALVES: tl.constexpr,
    PAIRED: tl.constexpr,
    KN: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    tiles_m = tl.cdiv(m_size, BLOCK_M)
    WIDTH: tl.constexpr = BLOCK_N + EXTRA_N
    TILES_N: tl.constexpr = (N + WIDTH - 1) // WIDTH
    tiles, programs = tiles_m * TILES_N, tl.num_programs(0)
    # As many are computed as they are; the others as SPLIT narrower ones each, at most one a program.
    whole = tiles
    if TAIL_N > 0:
        SPLIT: tl.constexpr = BLOCK_N // TAIL_N
        rest = tiles % programs
        whole = tl.where(rest * SPLIT <= programs, tiles - rest, tiles)
    for tile in tl.range(tl.program_id(0), whole, programs, flatten=FLATTEN):
        m0, n0 = tile_origin(tile, tiles_m, TILES_N, GROUP_M, BLOCK_M, WIDTH)
        compute_tile(
            x_desc, w_desc, second_desc, m0, n0, m_size, t,
            N, K, PAIR_OFFSET, BLOCK_M, BLOCK_N, EXTRA_N, BLOCK_K, STAGES, RUNS, HALVES, PAIRED, KN, PDL, PRECISION,
            EPILOGUE,
        )  # fmt: skip
    if TAIL_N > 0:
        part = whole * SPLIT + tl.program_id(0)
        if part < tiles * SPLIT:
            m0, n0 = tile_origin(part // SPLIT, tiles_m, TILES_N, GROUP_M, BLOCK_M, WIDTH)
            compute_tile(
                x_desc, second_desc, second_desc, m0, n0 + part % SPLIT * TAIL_N, m_size, t,
                N, K, PAIR_OFFSET, BLOCK_M, TAIL_N, 0, BLOCK_K, STAGES, 1, HALVES, PAIRED, KN, PDL, PRECISION, EPILOGUE,
            )  # fmt: skip


def w_descriptor(w: torch.Tensor, problem: GemmProblem, block_n: int, block_k: int, layout: Any = None) -> Any:
    """Describe W for `accumulate`: as it is, or halves, a pair's or those of heads, as the outermost axis of more; for
    Gluon where a layout is given.

    Raises:
        Unsupported: W's base or row stride is not a multiple of 16 bytes.
    """
    block = tile_of_w(problem, block_n, block_k)
    made = descriptor(w, block[-2:], "W", layout)
    row, depth, half = made.strides[0], problem.k, problem.halves
    if len(block) == 3:
        made.shape, made.strides = [2, problem.n, depth], [problem.pair_offset * row, row, 1]
    elif len(block) == 4:
        made.shape, made.strides = [2, problem.n // (2 * half), half, depth], [half * row, 2 * half * row, row, 1]
    made.block_shape = block
    return made


def tile_of_w(problem: GemmProblem, block_n: int, block_k: int) -> list[int]:
    """Shape in which W's tile comes, of its descriptor's axes."""
    if problem.layout == "nk" and problem.paired:
        return [2, block_n, block_k]
    if problem.layout == "nk" and problem.halves:
        return [2, block_n // (2 * problem.halves), problem.halves, block_k]
    return w_block(problem, block_n, block_k)


def w_descriptor_type(problem: GemmProblem, block_n: int, block_k: int, dtype: str) -> str:
    """Triton's type of that descriptor, for compile jobs."""
    return f"tensordesc<{dtype}[{','.join(map(str, tile_of_w(problem, block_n, block_k)))}]>"
