"""Skinny GEMM: y[M, N] = epilogue(x[M, K] @ W) for few tokens, where reading W once is the whole cost.

Schedule: W's tile is the dot's M operand (a warpgroup wants 64 rows there, and M may be 1), so accumulators are
[BLOCK_N, BLOCK_M]; both operands arrive by TMA in a pipeline of `stages` tiles. Split-K programs write fp32 partials
and count in; the last to arrive sums them in the order of the splits, so results repeat bit by bit.
Bytes: W once, x once per column tile (from L2), partials 2 * 4 * split_k * M * N (in L2). FLOPs: 2 * M * N * K per
accumulator.
Source: weights as the M operand and last-arriver reduction are common to decode GEMMs (FlashInfer, CUTLASS split-K).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl

from . import workspace
from .gemm import (
    GemmProblem,
    Measured,
    Table,
    descriptor,
    load_tile,
    lookup,
    reference,
    silu_mul_sample,
    store_sample,
    tma_obstacle,
    type_name,
    w_block,
)
from .jobs import CompileJob
from .launch import Kernel
from .target import Target

__all__ = ["CONFIGS", "Config", "choose", "compile_jobs", "estimate_us", "prepare", "reference", "supports"]

# Largest m of each row of CONFIGS; beyond the last, W is read more than once and gemm_persistent takes over.
BUCKETS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Config:
    """Tile sizes and pipeline of one launch.

    Args:
        block_m: tokens per tile, at least 16.
        block_n: columns of W per tile, at least 64 for Hopper's warpgroup dot.
        block_k: depth per pipeline step.
        stages: tiles in flight.
        warps: 4 or 8.
        split_k: programs that share one output tile.
        prefetch: depth steps of W asked into L2 before waiting for the previous kernel; with PDL only.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    split_k: int
    prefetch: int = 0

    def __str__(self) -> str:
        tile = f"{self.block_n}x{self.block_m}x{self.block_k}"
        return f"{tile} stages {self.stages} warps {self.warps} split {self.split_k} prefetch {self.prefetch}"


EVIDENCE = "NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-24"

CONFIGS: Table = {}


def supports(problem: GemmProblem) -> str | None:
    """Return why this family cannot do the problem, or None."""
    if problem.m > BUCKETS[-1]:
        return f"{problem.m} tokens; beyond {BUCKETS[-1]} reading W is no longer the cost"
    return tma_obstacle(problem)


def choose(problem: GemmProblem, target: Target) -> tuple[Config, str]:
    """Return the config for the problem and why: the measured one, else the cheapest by `estimate_us`."""
    if target.interpreted:
        return _interpreter_config(problem), "interpreter: few programs, large tiles"
    if target.arch == 90 and (hit := lookup(CONFIGS, BUCKETS, problem)) is not None:
        return hit.config, hit.why(EVIDENCE)
    config = min(_candidates(problem, target), key=lambda c: estimate_us(problem, c, target))
    return config, f"estimated {estimate_us(problem, config, target):.1f} us, no measurement for this N and K"


def estimate_us(problem: GemmProblem, config: Config, target: Target) -> float:
    """Estimate the time of a config; see the constants for what stands behind each term."""
    hit = lookup(CONFIGS, BUCKETS, problem) if target.arch == 90 and not target.interpreted else None
    if hit is not None and hit.config == config:
        return hit.us
    programs, slots = _programs(problem, config), _slots(problem, config, target)
    waves = ceil(programs / slots)
    # Each tile of tokens reads W again, and each column tile reads x again (from L2, counted as memory).
    tiles_m = ceil(problem.m / config.block_m)
    x_bytes = tiles_m * config.block_m * problem.k * problem.dtype.itemsize * ceil(problem.n / config.block_n)
    busy = min(1.0, programs / (waves * slots) * (1 if waves > 1 else 2))
    stream_us = (problem.weight_bytes * tiles_m + x_bytes / X_FROM_L2) / target.bandwidth_bytes_s / busy * 1e6
    split_us = SPLIT_US * (config.split_k - 1) * config.block_m / 64 + (SPLIT_US if config.split_k > 1 else 0)
    return FIXED_US + (waves - 1) * WAVE_US + stream_us + split_us


# Launch, latency of the first tiles and epilogue: what a GEMM of 8 MB takes above its bytes (4.4 - 1.9 us).
FIXED_US = 2.5
# One more wave fills the pipeline anew: the latency of a first tile.
WAVE_US = 1.0
# L2 serves x about this much faster than memory serves W.
X_FROM_L2 = 3.0
# Reading one split's partial of 64 tokens back from L2.
SPLIT_US = 0.15


def _programs(problem: GemmProblem, config: Config) -> int:
    return ceil(problem.n / config.block_n) * ceil(max(problem.m, 1) / config.block_m) * config.split_k


def smem_bytes(problem: GemmProblem, config: Config) -> int:
    """Shared memory of the pipeline: every stage holds one x tile and one W tile per accumulator."""
    rows = config.block_m + problem.accumulators * config.block_n
    return config.stages * rows * config.block_k * problem.dtype.itemsize + 1024


def _slots(problem: GemmProblem, config: Config, target: Target) -> int:
    """Programs resident at once: bounded by shared memory, and by 64 K registers (255 each at worst)."""
    per_sm = min(max(1, target.smem_bytes // smem_bytes(problem, config)), 2 if config.warps == 8 else 4)
    return per_sm * target.sm_count


def _block_m(m: int) -> int:
    return min(256, max(16, triton.next_power_of_2(m)))


def _candidates(problem: GemmProblem, target: Target) -> Iterable[Config]:
    """Every tile that fits, for `choose` to estimate."""
    itemsize = problem.dtype.itemsize
    block_m = min(_block_m(problem.m), 256 if itemsize == 2 else 128)
    # fp32 without TF32 multiplies in the FMA units from registers: small tiles, or they spill.
    depths = (32,) if problem.dtype == torch.float32 else (64, 128)
    for block_n in (64,) if problem.dtype == torch.float32 or problem.paired else (64, 128):
        for block_k in depths:
            for split_k in (1, 2, 4, 8):
                warps = 8 if block_n * block_m * problem.accumulators > 128 * 128 else 4
                for stages in (6, 5, 4, 3, 2):
                    config = Config(block_m, block_n, block_k, stages, warps, split_k)
                    if smem_bytes(problem, config) <= target.smem_bytes:
                        yield config
                        break


def _interpreter_config(problem: GemmProblem) -> Config:
    block_n = min(256, max(16, triton.next_power_of_2(problem.n)))
    block_k = min(256, max(16, triton.next_power_of_2(problem.k)))
    return Config(min(128, _block_m(problem.m)), block_n, block_k, 1, 4, 1)


@triton.jit
def _ask_into_l2(w, row0, k0, ROWS: tl.constexpr, ROW_STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr):
    """Ask L2 for W[row0 : row0 + BLOCK_N, k0 : k0 + DEPTH]; a hint, nothing waits for it."""
    # Rows beyond the end ask for the last row again.
    rows = tl.minimum(row0 + tl.arange(0, BLOCK_N), ROWS - 1).to(tl.int64)
    size = tl.full([BLOCK_N], DEPTH * (w.dtype.element_ty.primitive_bitwidth // 8), tl.int32)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [w + rows * ROW_STRIDE + k0, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["m_size"])
def gemm_skinny_kernel(
    x_desc,
    w_desc,
    w,
    partials,
    counters,
    m_size,
    t,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIR_OFFSET: tl.constexpr,
    W_ROWS: tl.constexpr,
    W_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT_K: tl.constexpr,
    K_PER_SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    PAIRED: tl.constexpr,
    KN: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    tile_n = tl.program_id(0)
    split = tl.program_id(1)
    tile_m = tl.program_id(2)
    n0 = tile_n * BLOCK_N
    m0 = tile_m * BLOCK_M
    k0 = split * K_PER_SPLIT
    if PDL:
        if PREFETCH > 0:
            _ask_into_l2(w, n0, k0, W_ROWS, W_STRIDE, BLOCK_N, PREFETCH * BLOCK_K)
            if PAIRED:
                _ask_into_l2(w, n0 + PAIR_OFFSET, k0, W_ROWS, W_STRIDE, BLOCK_N, PREFETCH * BLOCK_K)
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc2 = acc
    for k in tl.range(k0, min(k0 + K_PER_SPLIT, K), BLOCK_K, num_stages=STAGES):
        x = x_desc.load([m0, k])  # [BLOCK_M, BLOCK_K]
        acc = tl.dot(load_tile(w_desc, n0, k, KN), x.T, acc, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if PAIRED:
            acc2 = tl.dot(load_tile(w_desc, n0 + PAIR_OFFSET, k, KN), x.T, acc2, input_precision=PRECISION)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if not PAIRED:
        acc2 = acc

    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    m = m0 + tl.arange(0, BLOCK_M)[None, :]
    mask = (n < N) & (m < m_size)
    if SPLIT_K == 1:
        EPILOGUE(acc, acc2, m, n, mask, t)
    else:
        unit = tile_m * tl.num_programs(0) + tile_n
        TILE: tl.constexpr = BLOCK_N * BLOCK_M
        ACCS: tl.constexpr = 2 if PAIRED else 1
        base = partials + unit.to(tl.int64) * (SPLIT_K * ACCS * TILE)
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(base + split * (ACCS * TILE) + at, acc)
        if PAIRED:
            tl.store(base + split * (ACCS * TILE) + TILE + at, acc2)
        # Every thread's partial is written before one of them releases it by counting in.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + unit, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT_K - 1:
            # .cg: other SMs wrote these, so L1 must not answer.
            total = tl.load(base + at, cache_modifier=".cg")
            for i in tl.static_range(1, SPLIT_K):
                total += tl.load(base + i * (ACCS * TILE) + at, cache_modifier=".cg")
            total2 = total
            if PAIRED:
                total2 = tl.load(base + TILE + at, cache_modifier=".cg")
                for i in tl.static_range(1, SPLIT_K):
                    total2 += tl.load(base + i * (ACCS * TILE) + TILE + at, cache_modifier=".cg")
            tl.store(counters + unit, 0)
            EPILOGUE(total, total2, m, n, mask, t)


def _constexprs(problem: GemmProblem, config: Config, epilogue: Any, pdl: bool) -> dict[str, Any]:
    # Splits are whole depth steps; the last may be shorter, or empty.
    per_split = ceil(ceil(problem.k / config.block_k) / config.split_k) * config.block_k
    # The hint must stay inside a row: no prefetch where a split is shorter than it, or W's rows are not along K
    # (nor in the interpreter, which has no inline assembly).
    short = problem.k - (config.split_k - 1) * per_split < config.prefetch * config.block_k
    _, w_n, _ = problem.w_stride
    return {
        "N": problem.n,
        "K": problem.k,
        "PAIR_OFFSET": problem.pair_offset if problem.paired else 0,
        "W_ROWS": problem.w_columns,
        "W_STRIDE": w_n,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
        "SPLIT_K": config.split_k,
        "K_PER_SPLIT": per_split,
        "PREFETCH": 0 if short or problem.layout == "kn" or triton.knobs.runtime.interpret else config.prefetch,
        "PAIRED": problem.paired,
        "KN": problem.layout == "kn",
        "PDL": pdl,
        "PRECISION": problem.precision,
        "EPILOGUE": epilogue,
    }


class SkinnyGemm:
    """A prepared launch; call it with x [M, K], W in the problem's layout and the epilogue's tensors."""

    def __init__(self, epilogue: Any, config: Config, problem: GemmProblem, pdl: bool, slot: int) -> None:
        self.config, self.problem, self.slot = config, problem, slot
        self.kernel = Kernel(
            gemm_skinny_kernel,
            _constexprs(problem, config, epilogue, pdl),
            num_warps=config.warps,
            num_stages=config.stages,
            pdl=pdl,
        )
        self._w_block = w_block(problem, config.block_n, config.block_k)

    def arguments(self, x: torch.Tensor, w: torch.Tensor, t: tuple) -> tuple[tuple[int, int, int], tuple]:
        """Return grid and kernel arguments, as the next call would launch them."""
        config, m = self.config, x.shape[0]
        tiles_n, tiles_m = ceil(self.problem.n / config.block_n), ceil(m / config.block_m)
        need = tiles_n * tiles_m if config.split_k > 1 else 0
        tile = config.block_n * config.block_m * self.problem.accumulators
        scratch = workspace.get(x.device, need * config.split_k * tile, need, self.slot)
        x_desc = descriptor(x, [config.block_m, config.block_k], "x")
        w_desc = descriptor(w, self._w_block, "W")
        args = (x_desc, w_desc, w, scratch.partials, scratch.counters, m, t)
        return (tiles_n, config.split_k, tiles_m), args

    def __call__(self, x: torch.Tensor, w: torch.Tensor, t: tuple) -> None:
        if x.shape[0] == 0:
            return
        grid, args = self.arguments(x, w, t)
        self.kernel(grid, *args)


def prepare(epilogue: Any, config: Config, problem: GemmProblem, *, pdl: bool = False, slot: int = 0) -> SkinnyGemm:
    """Fix everything that does not change between calls.

    Args:
        epilogue: `@triton.jit` body `(acc, acc2, m, n, mask, t)`; accumulators are [BLOCK_N, BLOCK_M].
        config: from `choose`.
        problem: sizes and strides; `m` is only a hint.
        pdl: wait for the predecessor in the kernel and let the successor start before the epilogue.
        slot: workspace slot; differs between kernels that may run at the same time.
    """
    return SkinnyGemm(epilogue, config, problem, pdl, slot)


def compile_jobs(arch: int) -> Iterable[CompileJob]:
    """Yield one job for every measured config, with the sample epilogues."""
    if arch < 90:
        return
    for (n, k, paired), row in CONFIGS.items():
        for bucket, entry in row.items():
            yield _job(GemmProblem(bucket, n, k, torch.bfloat16, paired=paired, pair_offset=n), entry)


def _job(problem: GemmProblem, entry: Measured) -> CompileJob:
    config, dtype = entry.config, type_name(problem.dtype)
    epilogue = silu_mul_sample if problem.paired else store_sample
    return CompileJob(
        family="gemm_skinny",
        label=f"{problem.n}x{problem.k}{' paired' if problem.paired else ''} m<={problem.m}",
        fn=gemm_skinny_kernel,
        signature={
            "x_desc": f"tensordesc<{dtype}[{config.block_m},{config.block_k}]>",
            "w_desc": f"tensordesc<{dtype}[{config.block_n},{config.block_k}]>",
            "w": f"*{dtype}",
            "partials": "*fp32",
            "counters": "*i32",
            "m_size": "i32",
            "t": (f"*{dtype}",),
        },
        constexprs=_constexprs(problem, config, epilogue, pdl=True),
        num_warps=config.warps,
        num_stages=config.stages,
        divisible=("w", "partials", "counters", "t"),
    )
