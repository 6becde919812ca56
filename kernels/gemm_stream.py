"""Streaming GEMM: y[M, N] = epilogue(x[M, K] @ W) for few tokens, W on its way before x exists.

Schedule: a ring of `stages` tiles in shared memory. Every program asks for its first tiles of W at once, then waits for
the previous kernel (programmatic dependent launch), then asks for the tiles of x beside them: what memory has to give
flows across the border between two kernels. Where W may be what another kernel still computes it waits first (see
launch.py). Triton's pipeliner issues both loads of a step together, behind the wait, so the ring is written out, in
Gluon. What the epilogue reads is asked for before the loop.
Either operand may be the one a warpgroup takes 64 rows of: W (accumulators [BLOCK_N, BLOCK_M]), so that few tokens cost
nothing; or x (accumulators [BLOCK_M, BLOCK_N]), so that a tile may be as narrow as 16 columns of W and few columns
still occupy every multiprocessor.
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
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from . import workspace
from .gemm import GemmProblem, k_per_split, reference, tma_obstacle, type_name
from .gemm_boxes import box_type, describe_w, describe_x, w_box, x_box
from .gemm_jobs import job_configs, label, sample
from .gemm_persistent import MEASURED_SM_COUNT
from .gemm_steps import (
    as_rows,
    ask_w,
    ask_x,
    finish,
    first_row,
    let_successor_start,
    multiply,
    rows_and_columns,
    sum_of_parts,
    sum_of_splits,
    wait_for_predecessor,
)
from .gemm_stream_table import BUCKETS, CONFIGS, MOST_TOKENS, Config, alike, measurement, smem_bytes
from .jobs import CompileJob
from .launch import Kernel
from .target import Target
from .tma import Descriptors

__all__ = [
    "CONFIGS", "Config", "choose", "compile_jobs", "estimate_us", "measurement", "prepare", "reference", "smem_bytes",
    "supports",
]  # fmt: skip


def supports(problem: GemmProblem) -> str | None:
    """Return why this family cannot do the problem, or None."""
    if problem.m > MOST_TOKENS:
        return f"{problem.m} tokens, and beyond {MOST_TOKENS} reading W is no longer the cost"
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


def asks_early(problem: GemmProblem, leads: bool) -> bool:
    """Whether W may be asked for before the wait: another kernel of the plan has waited since it was given, or it was
    there before any plan ran."""
    return problem.w_given and (problem.w_steady or not leads)


# Launch, first tiles and epilogue that the predecessor's end does not hide.
FIXED_US = 1.2
# Counting in, once, and per MB of fp32 parts that the last program reads (as gemm_skinny).
SPLIT_US, SPLIT_US_PER_MB = 1.0, 29.0
# A byte from L2 costs this share of one from memory: 64 tokens for 1 add 3 to 4 us to a piece of 154, 0.9 GB of x's
# tiles from L2 (the rows of CONFIGS).
AGAIN = 0.05
# FLOP/s of these tiles in 16 bits at most: a bound that few tokens do not reach. In eight bits they are twice as many.
FLOPS = 500e12


def estimate_us(problem: GemmProblem, config: Config, target: Target) -> float:
    """Estimate the time of a config: its own measurement, else W's bytes, and those that come again from L2."""
    hit = measurement(problem, target)
    if hit is not None and hit.config == config:
        return hit.us
    tiles_m, tiles_n = ceil(max(problem.m, 1) / config.block_m), ceil(problem.n / config.block_n)
    again = problem.weight_bytes * (tiles_m - 1) + tiles_n * problem.m * problem.k * problem.dtype.itemsize
    stream_us = (problem.weight_bytes + AGAIN * again) / target.bandwidth_bytes_s * 1e6
    # Too few programs cannot ask for enough at once.
    idle = max(1.0, 0.45 * target.sm_count / (tiles_m * tiles_n * config.split_k))
    padded = 2 * tiles_m * config.block_m * problem.n * problem.k * problem.accumulators
    rate = FLOPS * (2 if problem.dtype.itemsize == 1 else 1)
    product_us = padded / rate * MEASURED_SM_COUNT / target.sm_count * 1e6
    parts_mb = (config.split_k - 1) * config.block_n * config.block_m * problem.accumulators * 4e-6
    split_us = SPLIT_US + SPLIT_US_PER_MB * parts_mb if config.split_k > 1 else 0.0
    return FIXED_US + split_us + max(stream_us * idle, product_us)


@gluon.jit(do_not_specialize=["m_size"])
def gemm_stream_kernel(
    x_desc,
    w_desc,
    partials,
    counters,
    m_size,
    t,
    N: gl.constexpr,
    K: gl.constexpr,
    PAIR_OFFSET: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT_K: gl.constexpr,
    K_PER_SPLIT: gl.constexpr,
    HALVES: gl.constexpr,
    TOKENS_FIRST: gl.constexpr,
    PAIRED: gl.constexpr,
    KN: gl.constexpr,
    PDL: gl.constexpr,
    LEADS: gl.constexpr,
    ASKS_EARLY: gl.constexpr,
    WARPS: gl.constexpr,
    LOAD_PARTS: gl.constexpr,
    LOADS: gl.constexpr,
    EPILOGUE: gl.constexpr,
):
    ACCS: gl.constexpr = 2 if PAIRED else 1
    APART: gl.constexpr = HALVES if BLOCK_N < 2 * HALVES else 0
    # Programs that share a tile of W follow one another: the second finds it in L2. All in the grid's first dimension:
    # the others end at 65535.
    unit, split = gl.program_id(0), gl.program_id(1)
    tiles_m = gl.cdiv(m_size, BLOCK_M)
    tile_m, tile_n = unit % tiles_m, unit // tiles_m
    n0, m0, k0 = tile_n * BLOCK_N, tile_m * BLOCK_M, split * K_PER_SPLIT
    k_end = gl.minimum(k0 + K_PER_SPLIT, K)
    if PDL and not LEADS:
        let_successor_start()
    if PDL and not ASKS_EARLY:
        wait_for_predecessor()
        if LEADS:
            let_successor_start()
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES * ACCS] + w_desc.block_shape, w_desc.layout)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_shape, x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    STEP_BYTES: gl.constexpr = ACCS * w_desc.block_type.nbytes + x_desc.block_type.nbytes
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    for s in gl.static_range(STAGES):
        k = k0 + s * BLOCK_K
        mbarrier.expect(ready.index(s), STEP_BYTES, pred=k < k_end)
        for a in gl.static_range(ACCS):
            ask_w(w_desc, n0 + a * PAIR_OFFSET, k, ready.index(s), w_ring.index(s * ACCS + a), APART, KN, k < k_end)
    if PDL and ASKS_EARLY:
        wait_for_predecessor()
        if LEADS:
            let_successor_start()
    first = first_row(m0, m_size, BLOCK_M)
    for s in gl.static_range(STAGES):
        k = k0 + s * BLOCK_K
        ask_x(x_desc, first, k, ready.index(s), x_ring.index(s), BLOCK_M, k < k_end)
    # What the epilogue reads: nothing waits for it before the product is done.
    EARLY: gl.constexpr = ACCS * BLOCK_M * BLOCK_N <= 64 * 32 * WARPS
    if LOAD_PARTS is not None or LOADS is not None:
        m, n, mask = rows_and_columns(m0, n0, m_size, N, BLOCK_M, BLOCK_N, HALVES, TOKENS_FIRST, WARPS)
    if LOAD_PARTS is not None:
        parts = LOAD_PARTS(m, n, t)
    if LOADS is not None and EARLY:
        read = LOADS(m, n, mask, t)

    ROWS: gl.constexpr = BLOCK_M if TOKENS_FIRST else BLOCK_N
    COLS: gl.constexpr = BLOCK_N if TOKENS_FIRST else BLOCK_M
    DEPTH: gl.constexpr = 256 // x_desc.dtype.primitive_bitwidth
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLS, DEPTH])
    acc = gl.zeros([ROWS, COLS], gl.float32, sums)
    acc2 = acc
    slot = 0
    parity = 0
    for k in range(k0, k_end, BLOCK_K):
        mbarrier.wait(ready.index(slot), parity)
        x = as_rows(x_ring.index(slot), BLOCK_M, BLOCK_K)
        w = w_ring.index(slot * ACCS)
        if APART > 0:
            w = as_rows(w, BLOCK_N, BLOCK_K)
        acc = multiply(w, x, acc, TOKENS_FIRST, KN)
        if PAIRED:
            acc2 = multiply(w_ring.index(slot * ACCS + 1), x, acc2, TOKENS_FIRST, KN)
            acc, acc2 = warpgroup_mma_wait(2, deps=(acc, acc2))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        # The step before this one has been multiplied: its slot takes the tiles that come STAGES steps after it.
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        ahead = k + (STAGES - 1) * BLOCK_K
        there = (ahead < k_end) & (k > k0)
        mbarrier.expect(ready.index(free), STEP_BYTES, pred=there)
        for a in gl.static_range(ACCS):
            ask_w(
                w_desc, n0 + a * PAIR_OFFSET, ahead, ready.index(free), w_ring.index(free * ACCS + a), APART, KN, there
            )
        ask_x(x_desc, first, ahead, ready.index(free), x_ring.index(free), BLOCK_M, there)
        last = slot == STAGES - 1
        slot = gl.where(last, 0, slot + 1)
        parity = gl.where(last, parity ^ 1, parity)
    if PAIRED:
        acc, acc2 = warpgroup_mma_wait(0, deps=(acc, acc2))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    if WARPS > 4:
        # What follows may use the ring's memory, and four warps wait for products of their own only, while the others'
        # still read it (https://github.com/triton-lang/triton/issues/11047).
        gl.thread_barrier()
    if LOAD_PARTS is not None:
        t = t + (sum_of_parts(parts, n),)
    if LOADS is not None:
        if not EARLY:
            read = LOADS(m, n, mask, t)
        t = t + read

    if SPLIT_K > 1:
        TILE: gl.constexpr = ROWS * COLS
        base = partials + unit.to(gl.int64) * (SPLIT_K * ACCS * TILE)
        row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, sums)), 1)
        at = row * COLS + gl.expand_dims(gl.arange(0, COLS, gl.SliceLayout(0, sums)), 0)
        gl.store(base + split * (ACCS * TILE) + at, acc)
        if PAIRED:
            gl.store(base + split * (ACCS * TILE) + TILE + at, acc2)
        # Every thread's partial is written before one of them releases it by counting in.
        gl.thread_barrier()
        arrived = gl.atomic_add(counters + unit, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT_K - 1:
            acc = sum_of_splits(base, at, SPLIT_K, ACCS * TILE)
            if PAIRED:
                acc2 = sum_of_splits(base + TILE, at, SPLIT_K, ACCS * TILE)
            gl.store(counters + unit, 0)
            finish(acc, acc2, m0, n0, m_size, t, N, HALVES, TOKENS_FIRST, PAIRED, WARPS, EPILOGUE)
    else:
        finish(acc, acc2, m0, n0, m_size, t, N, HALVES, TOKENS_FIRST, PAIRED, WARPS, EPILOGUE)
    # Nothing else may take the barriers' memory before the end, as they are not invalidated: for each, that would cost
    # a barrier of all threads.
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
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
        "SPLIT_K": config.split_k,
        "K_PER_SPLIT": k_per_split(problem.k, config.block_k, config.split_k),
        "HALVES": problem.halves,
        "TOKENS_FIRST": config.tokens_first,
        "PAIRED": problem.paired,
        "KN": problem.layout == "kn",
        "PDL": pdl,
        "LEADS": leads,
        "ASKS_EARLY": asks_early(problem, leads),
        "WARPS": config.warps,
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
        self.config, self.problem, self.epilogue = config, problem, epilogue
        self.parts, self.loads, self.leads, self.slot = parts, loads, leads, slot
        constexprs = _constexprs(problem, config, epilogue, pdl, leads, parts, loads)
        self.kernel = Kernel(gemm_stream_kernel, constexprs, num_warps=config.warps, pdl=pdl)
        self._describe_x = Descriptors(partial(describe_x, box=x_box(config)))
        self._describe_w = Descriptors(partial(describe_w, box=w_box(problem, config), halves=problem.halves))

    def arguments(self, x: torch.Tensor, w: torch.Tensor, t: tuple) -> tuple[tuple[int, int, int], tuple]:
        """Return grid and kernel arguments, as the next call would launch them."""
        config, m = self.config, x.shape[0]
        tiles = ceil(self.problem.n / config.block_n) * ceil(m / config.block_m)
        sums = config.block_n * config.block_m * self.problem.accumulators
        scratch = workspace.for_splits(x.device, tiles, config.split_k, sums, self.slot)
        described = self._describe_x(x), self._describe_w(w)
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
    return CompileJob(
        family="gemm_stream",
        label=f"{label(problem)}: {config}",
        fn=gemm_stream_kernel,
        signature={
            "x_desc": box_type(x_box(config), problem.dtype),
            "w_desc": box_type(w_box(problem, config), problem.dtype),
            "partials": "*fp32",
            "counters": "*i32",
            "m_size": "i32",
            "t": ("*bf16" if problem.dtype.itemsize == 1 else f"*{type_name(problem.dtype)}",),
        },
        constexprs=_constexprs(problem, config, sample(problem), pdl=True),
        num_warps=config.warps,
        divisible=("partials", "counters", "t"),
    )
