"""The persistent GEMM's kernel for Hopper in 16 bits: a tile's epilogue runs while the next tile is multiplied.

Schedule: as `gemm_persistent`, one program per multiprocessor over tiles of BLOCK_M rows, a ring of STAGES steps by TMA
that goes on from tile to tile. A tile's sums are rounded to the operands' dtype, where eager rounds them as well, and
held in registers, two adjacent columns in one; each time that one of the next tile's first steps has been handed to the
tensor cores, a part of them goes through the epilogue: some columns of the upper or of the lower eight of every warp's
16 rows, so that a thread has one row of it. Lanes exchange columns within their warp until each has eight adjacent
ones. So the tensor cores wait for the rounding only, 64 instructions, and never for accumulators to be set to zero.
Steps and parts are loops: what differs from part to part, which registers, is a jump, and the code stands once.
Bytes and FLOPs: as `gemm_persistent`. Registers: accumulators, half as many that are held, and a part.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .gemm import GemmProblem, type_name
from .gemm_boxes import box_type, layout
from .gemm_persistent_table import Config
from .gemm_steps import as_rows, first_row, let_successor_start, wait_for_predecessor
from .gemm_tiles import apart as triton_apart
from .gemm_tiles import tile_of_w, w_descriptor
from .gemm_tiles import tile_origin as triton_tile_origin

# For Gluon, which cannot call what Triton interprets. A tile's halves are registers of every thread's own.
tile_origin = gluon.jit(triton_tile_origin.fn)
apart = gluon.jit(triton_apart.fn)

# Columns of a part, each of half a tile's rows: what a part takes fits into the time of a step. Of heads, whose
# epilogues read most, so many of each half.
PART_COLUMNS, PART_COLUMNS_OF_HALVES = 64, 32
# Steps in flight at most; more fit into shared memory where tiles are small.
MOST_STAGES = 8


def obstacle(problem: GemmProblem) -> str | None:
    """Why the epilogue cannot be held, or None."""
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {problem.dtype} is not float16 or bfloat16"
    if problem.layout != "nk":
        return "W is stored as [K, N]"
    if not problem.rounds:
        return "the graph takes the sums as they are, not rounded"
    if problem.epilogue_itemsize > 4:
        return "the epilogue moves 8-byte elements, and numbers of that size cannot be written in a Gluon body"
    if problem.summed:
        return "the epilogue sums over columns: of as many as that takes, a part leaves no registers"
    return None


@gluon.constexpr_function
def _ptx(dtype: gl.dtype, number: int) -> str:
    """What rounds two numbers into a register's halves (0), and what makes fp32 of the first (1) and the second (2)."""
    if dtype == gl.bfloat16:
        return ("cvt.rn.bf16x2.f32 $0, $2, $1;", "shl.b32 $0, $1, 16;", "and.b32 $0, $1, 0xffff0000;")[number]
    apart = "{ .reg .b16 a, b; mov.b32 {a, b}, $1; cvt.f32.f16 $0, %s; }"
    return ("cvt.rn.f16x2.f32 $0, $2, $1;", apart % "a", apart % "b")[number]


@gluon.jit
def _held(acc, DTYPE: gl.constexpr):
    """An accumulator, rounded, two adjacent columns to a register."""
    first, second = gl.split(acc.reshape([acc.shape[0], acc.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(_ptx(DTYPE, 0), "=r,f,f", [first, second], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _number(held, WHICH: gl.constexpr, DTYPE: gl.constexpr):
    """The first or the second of the two numbers in every register, in fp32."""
    return gl.inline_asm_elementwise(_ptx(DTYPE, 1 + WHICH), "=f,r", [held], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _rows(held, HALF: gl.constexpr, WARPS: gl.constexpr):
    """The upper or the lower eight of every warp's 16 rows: of each, a thread has one."""
    both = held.reshape([WARPS, 2, 8, held.shape[1]]).permute((0, 2, 3, 1))
    upper, lower = gl.split(both)
    chosen = lower if HALF else upper
    return chosen.reshape([8 * WARPS, held.shape[1]])


@gluon.jit
def _columns(held, NUMBER: gl.constexpr, OF: gl.constexpr):
    """So many columns of what is held."""
    if OF == 1:
        return held
    else:
        left, right = apart(held)
        if NUMBER < OF // 2:
            return _columns(left, NUMBER, OF // 2)
        else:
            return _columns(right, NUMBER - OF // 2, OF // 2)


@gluon.constexpr_function
def _quads(rows: int, columns: int, warps: int, adjacent: int):
    """Four lanes have 4 * `adjacent` columns of a row, each `adjacent` at a time; a warp has eight rows."""
    registers = [[0, 1 << i] for i in range(adjacent.bit_length() - 1)]
    registers += [[0, 4 * adjacent << i] for i in range((columns // (4 * adjacent)).bit_length() - 1)]
    lanes = [[0, adjacent], [0, 2 * adjacent], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[8 << i, 0] for i in range(warps.bit_length() - 1)], [], [rows, columns]
    )


@gluon.jit
def _numbers(chosen, WARPS: gl.constexpr, DTYPE: gl.constexpr):
    """Some columns of some rows in fp32, eight adjacent ones a lane."""
    ROWS: gl.constexpr = chosen.shape[0]
    PAIRS: gl.constexpr = chosen.shape[1]
    laid: gl.constexpr = _quads(ROWS, PAIRS, WARPS, 4)
    chosen = gl.convert_layout(chosen, laid)
    joined = gl.join(_number(chosen, 0, DTYPE), _number(chosen, 1, DTYPE)).reshape([ROWS, 2 * PAIRS])
    return gl.convert_layout(joined, _quads(ROWS, 2 * PAIRS, WARPS, 8), assert_trivial=True)


@gluon.jit
def _place(
    m0,
    n0,
    m_size,
    number,
    OF: gl.constexpr,
    N: gl.constexpr,
    COLUMNS: gl.constexpr,
    HALVES: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Rows and columns of a part of the tile at m0 and n0, and which are there and the tile's own."""
    laid: gl.constexpr = _quads(8 * WARPS, COLUMNS, WARPS, 8)
    row = gl.expand_dims(gl.arange(0, 8 * WARPS, gl.SliceLayout(1, laid)), 1)
    m = first_row(m0, m_size, 16 * WARPS) + row // 8 * 16 + number // (OF // 2) * 8 + row % 8
    # The tile before has the others.
    own = (m >= m0) & (m < m_size)
    # Bodies multiply m by a row length: M * N may exceed 2^31 here.
    m = gl.minimum(m, m_size - 1).to(gl.int64)
    # Columns of heads are counted in their first halves.
    ACROSS: gl.constexpr = 2 if HALVES > 0 else 1
    n = n0 // ACROSS + number % (OF // 2) * COLUMNS
    n = n + gl.expand_dims(gl.arange(0, COLUMNS, gl.SliceLayout(0, laid)), 0)
    return m, n, own & (n < N // ACROSS)


@gluon.jit
def _part(held, NUMBER: gl.constexpr, OF: gl.constexpr, APART: gl.constexpr, WARPS: gl.constexpr):
    """A part of what is held: some columns of half the rows, of both accumulators where there are two."""
    ACROSS: gl.constexpr = OF // 2
    rows = _rows(held, NUMBER // ACROSS, WARPS)
    if APART:
        first, second = apart(rows)
        return (_columns(first, NUMBER % ACROSS, ACROSS), _columns(second, NUMBER % ACROSS, ACROSS))
    else:
        return (_columns(rows, NUMBER % ACROSS, ACROSS),)


@gluon.jit
def _finish(
    held,
    number,
    m0,
    n0,
    m_size,
    t,
    OF: gl.constexpr,
    N: gl.constexpr,
    COLUMNS: gl.constexpr,
    HALVES: gl.constexpr,
    APART: gl.constexpr,
    DTYPE: gl.constexpr,
    WARPS: gl.constexpr,
    EPILOGUE: gl.constexpr,
):
    """The epilogue of one part of the tile at m0 and n0."""
    m, n, mask = _place(m0, n0, m_size, number, OF, N, COLUMNS, HALVES, WARPS)
    # Registers have no numbers at run time; what follows the choice stands here once.
    part = _part(held, 0, OF, APART, WARPS)
    for other in gl.static_range(1, OF):
        if number == other:
            part = _part(held, other, OF, APART, WARPS)
    acc = _numbers(part[0], WARPS, DTYPE)
    acc2 = _numbers(part[1], WARPS, DTYPE) if APART else acc
    EPILOGUE(acc, acc2, m, n, mask, t)


@gluon.jit
def _ask(request, x_desc, w_desc, x_ring, w_ring, ready, slot, tiles, HALVES: gl.constexpr, PAIRED: gl.constexpr):
    """Ask for the tiles of x and W that `request` names, if they are of one of the tiles."""
    tile, k, m, n = request
    there = tile < tiles
    mbarrier.expect(ready.index(slot), x_desc.block_type.nbytes + w_desc.block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(x_desc, [m, k], ready.index(slot), x_ring.index(slot), pred=there)
    if PAIRED:
        at = [0, n, k]
    elif HALVES > 0:
        at = [0, n // (2 * HALVES), 0, k]
    else:
        at = [n, k]
    tma.async_copy_global_to_shared(w_desc, at, ready.index(slot), w_ring.index(slot), pred=there)


@gluon.jit
def _after(
    request,
    m_size,
    tiles_m,
    TILES_N: gl.constexpr,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """The request that follows: deeper, or the program's next tile. A request is (tile, k, first row, first column)."""
    tile, k, m, n = request
    k += BLOCK_K
    if k >= K:
        k = 0
        tile += gl.num_programs(0)
        # Beyond the last tile nothing is asked for, and its group would have no rows to divide by.
        m0, n = tile_origin(gl.minimum(tile, tiles_m * TILES_N - 1), tiles_m, TILES_N, GROUP_M, BLOCK_M, BLOCK_N)
        m = first_row(m0, m_size, BLOCK_M)
    return tile, k, m, n


@gluon.jit
def _step(
    acc,
    request,
    slot,
    parity,
    x_desc,
    w_desc,
    x_ring,
    w_ring,
    ready,
    m_size,
    tiles_m,
    TILES_N: gl.constexpr,
    K: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    HALVES: gl.constexpr,
    PAIRED: gl.constexpr,
    onto,
):
    """Hand the next step of a tile to the tensor cores, `onto` what it has or as its first, and ask for a later one."""
    BLOCK_M: gl.constexpr = x_desc.block_shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_shape[1]
    mbarrier.wait(ready.index(slot), parity)
    w = as_rows(w_ring.index(slot), acc.shape[1], BLOCK_K).permute((1, 0))
    acc = warpgroup_mma(x_ring.index(slot), w, acc, use_acc=onto, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    # The step before this one has been multiplied: its slot takes what comes STAGES steps after it.
    free = gl.where(slot == 0, STAGES - 1, slot - 1)
    _ask(request, x_desc, w_desc, x_ring, w_ring, ready, free, tiles_m * TILES_N, HALVES, PAIRED)
    request = _after(request, m_size, tiles_m, TILES_N, K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)
    parity = gl.where(slot == STAGES - 1, parity ^ 1, parity)
    slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    return acc, request, slot, parity


@gluon.jit(do_not_specialize=["m_size"])
def gemm_held_kernel(
    x_desc,
    w_desc,
    m_size,
    t,
    N: gl.constexpr,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    OF: gl.constexpr,
    HALVES: gl.constexpr,
    PAIRED: gl.constexpr,
    PDL: gl.constexpr,
    WARPS: gl.constexpr,
    EPILOGUE: gl.constexpr,
):
    COLUMNS: gl.constexpr = 2 * BLOCK_N if PAIRED else BLOCK_N
    APART: gl.constexpr = PAIRED or HALVES > 0
    # Columns that the epilogue gets at once.
    AT_ONCE: gl.constexpr = (COLUMNS // 2 if APART else COLUMNS) // (OF // 2)
    DTYPE: gl.constexpr = x_desc.dtype
    TILES_N: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_m = gl.cdiv(m_size, BLOCK_M)
    tiles = tiles_m * TILES_N
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_shape, x_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_desc.block_shape, w_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    if PDL:
        wait_for_predecessor()
    first = gl.program_id(0)
    m0, n0 = tile_origin(first, tiles_m, TILES_N, GROUP_M, BLOCK_M, BLOCK_N)
    request = (first, 0, first_row(m0, m_size, BLOCK_M), n0)
    for s in gl.static_range(STAGES - 1):
        _ask(request, x_desc, w_desc, x_ring, w_ring, ready, s, tiles, HALVES, PAIRED)
        request = _after(request, m_size, tiles_m, TILES_N, K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)

    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    acc = gl.zeros([BLOCK_M, COLUMNS], gl.float32, sums)
    held = _held(acc, DTYPE)
    held_m, held_n = m0, n0
    slot = 0
    parity = 0
    HEAD: gl.constexpr = OF if OF < STEPS else STEPS
    for tile in range(first, tiles, gl.num_programs(0)):
        m0, n0 = tile_origin(tile, tiles_m, TILES_N, GROUP_M, BLOCK_M, BLOCK_N)
        for step in range(HEAD):
            acc, request, slot, parity = _step(
                acc, request, slot, parity, x_desc, w_desc, x_ring, w_ring, ready, m_size, tiles_m,
                TILES_N, K, BLOCK_N, STAGES, GROUP_M, HALVES, PAIRED, step > 0,
            )  # fmt: skip
            if tile > first:
                _finish(held, step, held_m, held_n, m_size, t, OF, N, AT_ONCE, HALVES, APART, DTYPE, WARPS, EPILOGUE)
        if tile > first:
            for part in range(HEAD, OF):
                _finish(held, part, held_m, held_n, m_size, t, OF, N, AT_ONCE, HALVES, APART, DTYPE, WARPS, EPILOGUE)
        for _ in range(HEAD, STEPS):
            acc, request, slot, parity = _step(
                acc, request, slot, parity, x_desc, w_desc, x_ring, w_ring, ready, m_size, tiles_m,
                TILES_N, K, BLOCK_N, STAGES, GROUP_M, HALVES, PAIRED, True,
            )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if PDL:
            let_successor_start()
        held = _held(acc, DTYPE)
        held_m, held_n = m0, n0
    # What follows changes lanes in the ring's memory, and four warps wait for products of their own only, while the
    # others' still read it (https://github.com/triton-lang/triton/issues/11047). Within the loop it has its own.
    if WARPS > 4:
        gl.thread_barrier()
    for part in range(OF):
        _finish(held, part, held_m, held_n, m_size, t, OF, N, AT_ONCE, HALVES, APART, DTYPE, WARPS, EPILOGUE)
    # Nothing else may take the barriers' memory before the end, as they are not invalidated.
    ready._keep_alive()


def constexprs(problem: GemmProblem, config: Config, epilogue: Any, pdl: bool) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "N": problem.n,
        "K": problem.k,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
        "GROUP_M": config.group_m,
        "OF": parts(problem, config),
        "HALVES": problem.halves,
        "PAIRED": problem.paired,
        "PDL": pdl,
        "WARPS": config.warps,
        "EPILOGUE": epilogue,
    }


def parts(problem: GemmProblem, config: Config) -> int:
    """In how many parts a tile goes through the epilogue, of half its rows each."""
    if problem.halves:
        columns, most = config.block_n // 2, PART_COLUMNS_OF_HALVES
    else:
        columns, most = config.block_n, PART_COLUMNS
    return 2 * (columns // min(columns, most))


def describe_w(w: torch.Tensor, problem: GemmProblem, config: Config) -> Any:
    """Describe W for the kernel: as it is, or in halves, as `gemm_tiles.w_descriptor`.

    Raises:
        Unsupported: base or row stride is not a multiple of 16 bytes.
    """
    block = tile_of_w(problem, config.block_n, config.block_k)
    return w_descriptor(w, problem, config.block_n, config.block_k, layout(tuple(block), w.dtype))


def signature(problem: GemmProblem, config: Config) -> dict[str, Any]:
    """Types of the kernel's arguments, for compile jobs."""
    return {
        "x_desc": box_type([config.block_m, config.block_k], problem.dtype),
        "w_desc": box_type(tile_of_w(problem, config.block_n, config.block_k), problem.dtype),
        "m_size": "i32",
        "t": (f"*{type_name(problem.dtype)}",),
    }
