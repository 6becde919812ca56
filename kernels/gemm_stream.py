"""Streaming GEMM: y[M, N] = epilogue(x[M, K] @ W) for few tokens, W on its way before x exists.

Schedule: a ring of `stages` tiles in shared memory. Every program asks for its first tiles of W at once, then waits for
the previous kernel (programmatic dependent launch), then asks for the tiles of x beside them: what memory has to give
flows across the border between two kernels. Where another kernel may still compute W it waits first (see launch.py).
Triton's pipeliner issues both loads of a step together, behind the wait, so the ring is written out, in Gluon.
Either operand may be the one a warpgroup takes 64 rows of: W (accumulators [BLOCK_N, BLOCK_M]), so that few tokens cost
nothing; or x (accumulators [BLOCK_M, BLOCK_N]), so that a tile may be as narrow as 16 columns of W and few columns
still occupy every multiprocessor. Where it is W, EXTRA_M tokens may follow BLOCK_M in accumulators of their own, as 128
+ 16 for 136, multiplied by one instruction (ptx.py); and a pair may be rows of one product (`gemm_boxes.together`).
Split-K programs write fp32 partials and count in; the last to arrive sums them in the order of the splits, so results
repeat bit by bit.
Bytes: W, x per column tile (L2), partials 8 * split_k * M * N (L2). FLOPs: 2 * M * N * K per accumulator.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from math import ceil
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import workspace
from .gemm import GemmProblem, k_per_split, reference, tma_obstacle, type_name
from .gemm_boxes import box_type, describe_w, describe_x, extra_box, takes_extra, together, w_box, x_box
from .gemm_jobs import job_configs, label, sample
from .gemm_steps import (
    as_rows,
    ask_w,
    ask_x,
    collect,
    eights_of_rows,
    finish,
    first_row,
    folds,
    leave,
    let_successor_start,
    multiplied,
    multiply,
    multiply_both,
    rows_and_columns,
    rows_of,
    sum_of_parts,
    wait_for_predecessor,
)
from .gemm_stream_rule import alike, asks_early, estimate_us
from .gemm_stream_table import BUCKETS, CONFIGS, MOST_TOKENS, Config, known, measurement, smem_bytes
from .jobs import CompileJob
from .launch import Kernel
from .ptx import NOTE
from .target import Target
from .tma import Descriptors

__all__ = [
    "CONFIGS", "Config", "choose", "compile_jobs", "estimate_us", "measurement", "prepare", "reference", "smem_bytes",
    "supports",
]  # fmt: skip


def supports(problem: GemmProblem) -> str | None:
    """Return why this family cannot do the problem, or None."""
    if problem.m > MOST_TOKENS and not known(problem):
        return f"{problem.m} tokens: beyond {MOST_TOKENS} reading W is no longer the cost, and it was not measured"
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        return f"dtype {problem.dtype} is not float16, bfloat16 or float8_e4m3fn"
    if problem.dtype.itemsize == 1 and problem.layout == "kn":
        return "tensor cores take eight-bit floats along depth only; W is stored the other way"
    if problem.epilogue_itemsize > 4:
        return "the epilogue moves 8-byte elements, and numbers of that size cannot be written in a Gluon body"
    if problem.halves and problem.layout == "kn":
        return "halves of heads are brought together as rows of W, which is stored the other way"
    return tma_obstacle(problem)


def choose(problem: GemmProblem, target: Target) -> tuple[Config, str]:
    """Return the config for the problem and why: the measured one, else what the measured ones have in common."""
    if (hit := measurement(problem, target)) is not None:
        return hit.config, hit.why(problem)
    config = alike(problem, target)
    us = estimate_us(problem, config, target)
    return config, f"estimated {us:.1f} us, no measurement for this N, K and m: a tile as those of the measured ones"


@gluon.jit(do_not_specialize=["m_size"])
def gemm_stream_kernel(
    x_desc,
    extra_desc,
    w_desc,
    partials,
    counters,
    m_size,
    t,
    N: gl.constexpr,
    K: gl.constexpr,
    PAIR_OFFSET: gl.constexpr,
    BLOCK_M: gl.constexpr,
    EXTRA_M: gl.constexpr,
    NOTE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT_K: gl.constexpr,
    K_PER_SPLIT: gl.constexpr,
    HALVES: gl.constexpr,
    TOKENS_FIRST: gl.constexpr,
    PAIRED: gl.constexpr,
    TOGETHER: gl.constexpr,
    KN: gl.constexpr,
    PDL: gl.constexpr,
    LEADS: gl.constexpr,
    ASKS_EARLY: gl.constexpr,
    WARPS: gl.constexpr,
    LEAVES_PARTS: gl.constexpr,
    LOAD_PARTS: gl.constexpr,
    LOADS: gl.constexpr,
    EPILOGUE: gl.constexpr,
):
    SEPARATE: gl.constexpr = PAIRED and not TOGETHER
    ACCS: gl.constexpr = 2 if SEPARATE else 1
    APART: gl.constexpr = HALVES if BLOCK_N < 2 * HALVES else 0
    # Programs that share a tile of W follow one another: the second finds it in L2. The grid's others end at 65535.
    unit, split = gl.program_id(0), gl.program_id(1)
    TOKENS: gl.constexpr = BLOCK_M + EXTRA_M
    tiles_m = gl.cdiv(m_size, TOKENS)
    tile_m, tile_n = unit % tiles_m, unit // tiles_m
    n0, m0, k0 = tile_n * BLOCK_N, tile_m * TOKENS, split * K_PER_SPLIT
    k_end = gl.minimum(k0 + K_PER_SPLIT, K)
    if PDL and not LEADS:
        let_successor_start()
    if PDL and not ASKS_EARLY:
        wait_for_predecessor()
        if LEADS:
            let_successor_start()
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES * ACCS] + w_desc.block_shape, w_desc.layout)
    x_ring = eights_of_rows(x_desc.dtype, STAGES * TOKENS, BLOCK_K)
    X_BYTES: gl.constexpr = x_desc.block_type.nbytes // BLOCK_M * TOKENS
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    STEP_BYTES: gl.constexpr = ACCS * w_desc.block_type.nbytes + X_BYTES
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    for s in gl.static_range(STAGES):
        k = k0 + s * BLOCK_K
        mbarrier.expect(ready.index(s), STEP_BYTES, pred=k < k_end)
        ask_w(w_desc, n0, k, ready, w_ring, s, ACCS, PAIR_OFFSET, APART, TOGETHER, KN, k < k_end)
    if PDL and ASKS_EARLY:
        wait_for_predecessor()
        if LEADS:
            let_successor_start()
    descs = (x_desc, extra_desc)
    rows = (first_row(m0, m_size, BLOCK_M), first_row(m0 + BLOCK_M, m_size, EXTRA_M))
    for s in gl.static_range(STAGES):
        k = k0 + s * BLOCK_K
        ask_x(descs, rows, k, ready, x_ring, s, BLOCK_M, EXTRA_M, k < k_end)
    # What the epilogue reads: nothing waits for it before the product is done.
    EARLY: gl.constexpr = (2 if PAIRED else 1) * BLOCK_M * BLOCK_N <= 64 * 32 * WARPS and EXTRA_M == 0
    m, n, mask = rows_and_columns(m0, n0, m_size, N, BLOCK_M, BLOCK_N, HALVES, TOKENS_FIRST, WARPS, folds(BLOCK_M))
    t_extra = t
    if EXTRA_M > 0:
        m_extra, n_extra, mask_extra = rows_and_columns(
            m0 + BLOCK_M, n0, m_size, N, EXTRA_M, BLOCK_N, HALVES, TOKENS_FIRST, WARPS, False
        )
    if LOAD_PARTS is not None:
        parts = LOAD_PARTS(m, n, t)
        if EXTRA_M > 0:
            # Accumulators leave no registers for parts, which are summed before there are any.
            t = t + (sum_of_parts(parts, n),)
            t_extra = t_extra + (sum_of_parts(LOAD_PARTS(m_extra, n_extra, t_extra), n_extra),)
    if LOADS is not None and EARLY:
        read = LOADS(m, n, mask, t)

    W_ROWS: gl.constexpr = 2 * BLOCK_N if TOGETHER else BLOCK_N
    ROWS: gl.constexpr = BLOCK_M if TOKENS_FIRST else W_ROWS
    COLS: gl.constexpr = BLOCK_N if TOKENS_FIRST else BLOCK_M
    DEPTH: gl.constexpr = 256 // x_desc.dtype.primitive_bitwidth
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLS, DEPTH])
    acc = gl.zeros([ROWS, COLS], gl.float32, sums)
    acc2, extra, extra2 = acc, acc, acc
    if EXTRA_M > 0:
        laid: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, EXTRA_M, DEPTH])
        extra = gl.zeros([ROWS, EXTRA_M], gl.float32, laid)
        extra2 = extra
    slot, parity = 0, 0
    for k in range(k0, k_end, BLOCK_K):
        mbarrier.wait(ready.index(slot), parity)
        x = rows_of(x_ring, slot, TOKENS, 0, BLOCK_M, BLOCK_K)
        more = rows_of(x_ring, slot, TOKENS, BLOCK_M, EXTRA_M, BLOCK_K) if EXTRA_M > 0 else x
        w = w_ring.index(slot * ACCS)
        if APART > 0 or TOGETHER:
            w = as_rows(w, W_ROWS, BLOCK_K)
        if EXTRA_M > 0:
            acc, extra = multiply_both(w, x, more, acc, extra, KN, NOTE)
        else:
            acc = multiply(w, x, acc, TOKENS_FIRST, KN)
        if SEPARATE and EXTRA_M > 0:
            acc2, extra2 = multiply_both(w_ring.index(slot * ACCS + 1), x, more, acc2, extra2, KN, NOTE)
        elif SEPARATE:
            acc2 = multiply(w_ring.index(slot * ACCS + 1), x, acc2, TOKENS_FIRST, KN)
        acc, acc2, extra, extra2 = multiplied(acc, acc2, extra, extra2, SEPARATE, EXTRA_M, 1)
        # The step before this one has been multiplied: its slot takes the tiles that come STAGES steps after it.
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        ahead = k + (STAGES - 1) * BLOCK_K
        there = (ahead < k_end) & (k > k0)
        mbarrier.expect(ready.index(free), STEP_BYTES, pred=there)
        ask_w(w_desc, n0, ahead, ready, w_ring, free, ACCS, PAIR_OFFSET, APART, TOGETHER, KN, there)
        ask_x(descs, rows, ahead, ready, x_ring, free, BLOCK_M, EXTRA_M, there)
        last = slot == STAGES - 1
        slot = gl.where(last, 0, slot + 1)
        parity = gl.where(last, parity ^ 1, parity)
    acc, acc2, extra, extra2 = multiplied(acc, acc2, extra, extra2, SEPARATE, EXTRA_M, 0)
    if WARPS > 4:
        # What follows may use the ring's memory, and four warps wait for products of their own only, while the others'
        # still read it (https://github.com/triton-lang/triton/issues/11047).
        gl.thread_barrier()
    if LOAD_PARTS is not None and EXTRA_M == 0:
        t = t + (sum_of_parts(parts, n),)
    TILE: gl.constexpr = ROWS * COLS
    SUMS: gl.constexpr = ACCS * ROWS * (COLS + EXTRA_M)
    parts_of_tile = partials + unit.to(gl.int64) * (SPLIT_K * SUMS)
    extra_parts = parts_of_tile + ACCS * TILE
    finishes = True
    if SPLIT_K > 1:
        leave(parts_of_tile + split * SUMS, acc)
        if SEPARATE:
            leave(parts_of_tile + split * SUMS + TILE, acc2)
        if EXTRA_M > 0:
            leave(extra_parts + split * SUMS, extra)
        if SEPARATE and EXTRA_M > 0:
            leave(extra_parts + split * SUMS + ROWS * EXTRA_M, extra2)
    # Of large tiles behind the stores, where sums need no registers, or behind the sums, where epilogues need most.
    LAST: gl.constexpr = LOADS is not None and EXTRA_M > 0 and LEAVES_PARTS
    if LOADS is not None and not LAST:
        t = t + (read if EARLY else LOADS(m, n, mask, t))
    if SPLIT_K > 1:
        # Every thread's partial is written before one of them releases it by counting in.
        gl.thread_barrier()
        finishes = gl.atomic_add(counters + unit, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
    if finishes:
        total = collect(parts_of_tile, acc, SPLIT_K, SUMS)
        total2 = collect(parts_of_tile + TILE, acc2, SPLIT_K, SUMS) if SEPARATE else total
        given = t + LOADS(m, n, mask, t) if LAST else t
        finish(
            total, total2, m0, n0, m_size, given, N, HALVES, TOKENS_FIRST, PAIRED, TOGETHER, WARPS, folds(BLOCK_M),
            EPILOGUE,
        )  # fmt: skip
        if EXTRA_M > 0:
            total = collect(extra_parts, extra, SPLIT_K, SUMS)
            total2 = collect(extra_parts + ROWS * EXTRA_M, extra2, SPLIT_K, SUMS) if SEPARATE else total
            given = t_extra if LOADS is None else t_extra + LOADS(m_extra, n_extra, mask_extra, t_extra)
            finish(
                total, total2, m0 + BLOCK_M, n0, m_size, given, N, HALVES, TOKENS_FIRST, PAIRED, TOGETHER, WARPS,
                False, EPILOGUE,
            )  # fmt: skip
        if SPLIT_K > 1:
            gl.store(counters + unit, 0)
    # Nothing else may take the barriers' memory: to invalidate them would cost a barrier of all threads for each.
    ready._keep_alive()


def _constexprs(
    problem: GemmProblem,
    config: Config,
    epilogue: Any,
    pdl: bool,
    leads: bool = False,
    parts: Any = None,
    loads: Any = None,
) -> dict[str, Any]:
    return {
        "N": problem.n,
        "K": problem.k,
        "PAIR_OFFSET": problem.pair_offset if problem.paired else 0,
        "BLOCK_M": config.block_m,
        "EXTRA_M": config.extra_m,
        "NOTE": NOTE if config.extra_m else "",
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
        "SPLIT_K": config.split_k,
        "K_PER_SPLIT": k_per_split(problem.k, config.block_k, config.split_k),
        "HALVES": problem.halves,
        "TOKENS_FIRST": config.tokens_first,
        "PAIRED": problem.paired,
        "TOGETHER": together(problem, config),
        "KN": problem.layout == "kn",
        "PDL": pdl,
        "LEADS": leads,
        "ASKS_EARLY": asks_early(problem, leads),
        "WARPS": config.warps,
        "LEAVES_PARTS": problem.leaves_parts,
        "LOAD_PARTS": parts,
        "LOADS": loads,
        "EPILOGUE": epilogue,
    }


class StreamGemm:
    """A prepared launch; call it with x [M, K], W in the problem's layout and the epilogue's tensors."""

    def __init__(
        self,
        epilogue: Any,
        config: Config,
        problem: GemmProblem,
        *,
        parts: Any,
        loads: Any,
        pdl: bool,
        leads: bool,
        slot: int,
    ) -> None:
        assert config.stages > 1, "a ring of one slot is never refilled"
        assert takes_extra(problem, config), "one instruction multiplies what follows one another"
        self.config, self.problem, self.epilogue = config, problem, epilogue
        self.parts, self.loads, self.leads, self.slot = parts, loads, leads, slot
        constexprs = _constexprs(problem, config, epilogue, pdl, leads, parts, loads)
        self.kernel = Kernel(gemm_stream_kernel, constexprs, num_warps=config.warps, pdl=pdl)
        self._describe_x = Descriptors(partial(describe_x, box=x_box(config)))
        extra = extra_box(config)
        self._describe_extra = extra and Descriptors(partial(describe_x, box=extra))
        self._describe_w = Descriptors(partial(describe_w, box=w_box(problem, config), problem=problem))

    def arguments(self, x: torch.Tensor, w: torch.Tensor, t: tuple) -> tuple[tuple[int, int, int], tuple]:
        """Return grid and kernel arguments, as the next call would launch them."""
        config, m = self.config, x.shape[0]
        tiles = ceil(self.problem.n / config.block_n) * ceil(m / config.tokens)
        sums = config.block_n * config.tokens * self.problem.accumulators
        scratch = workspace.for_splits(x.device, tiles, config.split_k, sums, self.slot)
        extra = self._describe_extra and self._describe_extra(x)
        described = self._describe_x(x), extra, self._describe_w(w)
        return (tiles, config.split_k, 1), (*described, scratch.partials, scratch.counters, m, t)

    def __call__(self, x: torch.Tensor, w: torch.Tensor, t: tuple) -> None:
        if x.shape[0] == 0:
            return
        grid, args = self.arguments(x, w, t)
        self.kernel(grid, *args)


def prepare(
    epilogue: Any,
    config: Config,
    problem: GemmProblem,
    *,
    parts: Any = None,
    loads: Any = None,
    pdl: bool = False,
    leads: bool = False,
    slot: int = 0,
) -> StreamGemm:
    """Fix everything that does not change between calls.

    Args:
        epilogue: `@triton.jit` body `(acc, acc2, m, n, mask, t)`, elementwise; accumulators are [BLOCK_N, BLOCK_M], or
            [BLOCK_M, BLOCK_N] where tokens are the rows.
        config: from `choose`.
        problem: sizes and strides; `m` is only a hint.
        parts: `@triton.jit` function `(m, n, t)`: what an earlier kernel left of its rows' sums (`load_parts`);
            the epilogue finds the sums, in the shape of `m`, behind the tensors of `t`.
        loads: `@triton.jit` function `(m, n, mask, t)`: what the epilogue reads, a tuple that it finds behind those.
        pdl, leads: programmatic dependent launch (see launch.py); `asks_early` says whether W is asked for before the
            wait.
        slot: workspace slot; differs between kernels that may run at the same time.
    """
    return StreamGemm(epilogue, config, problem, parts=parts, loads=loads, pdl=pdl, leads=leads, slot=slot)


def compile_jobs(arch: int) -> Iterable[CompileJob]:
    """Yield one job for every config that `choose` gives for a measured or a sample problem, with sample epilogues."""
    if arch != 90:
        return
    for problem, config in job_configs(CONFIGS, BUCKETS, supports, choose, arch):
        yield _job(problem, config)


def _job(problem: GemmProblem, config: Config) -> CompileJob:
    extra = extra_box(config)
    more: dict[str, Any] = {"extra_desc": extra and box_type(extra, problem.dtype)}
    return CompileJob(
        family="gemm_stream",
        label=f"{label(problem)}: {config}",
        fn=gemm_stream_kernel,
        signature={
            "x_desc": box_type(x_box(config), problem.dtype),
            **(more if extra else {}),
            "w_desc": box_type(w_box(problem, config), problem.dtype),
            "partials": "*fp32",
            "counters": "*i32",
            "m_size": "i32",
            "t": ("*bf16" if problem.dtype.itemsize == 1 else f"*{type_name(problem.dtype)}",),
        },
        constexprs={**_constexprs(problem, config, sample(problem), pdl=True), **({} if extra else more)},
        num_warps=config.warps,
        divisible=("partials", "counters", "t"),
    )
