"""Skinny GEMM: y[M, N] = epilogue(x[M, K] @ W) for few tokens, where reading W once is the whole cost.

Where gemm_stream can be had (sm_90, fp16 and bf16) it is taken instead: it asks for W before its predecessor has ended.
Schedule: W's tile is the dot's M operand (a warpgroup wants 64 rows there, and M may be 1), so accumulators are
[BLOCK_N, BLOCK_M]; both operands arrive by TMA in a pipeline of `stages` tiles. Split-K programs write fp32 partials
and count in; the last to arrive sums them in the order of the splits, so results repeat bit by bit.
Bytes: W, x per column tile (L2), partials 8 * split_k * M * N (L2). FLOPs: 2 * M * N * K per accumulator.
Source: weights as M operand and the last arriver's reduction are common in decode GEMMs (CUTLASS's split-K among them).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl

from . import workspace
from .functions import sum_of_parts
from .gemm import (
    GemmProblem,
    halves_apart,
    k_per_split,
    load_tile,
    reference,
    sum_of_splits,
    tma_obstacle,
    type_name,
    w_block,
    whole_heads,
)
from .gemm_jobs import job_configs, label, sample
from .jobs import CompileJob
from .launch import Kernel
from .target import Target
from .tma import Descriptors, descriptor

__all__ = ["Config", "choose", "compile_jobs", "estimate_us", "prepare", "reference", "supports"]

MOST_TOKENS = 128
# The m that compile jobs are made for.
JOB_TOKENS = (16, 32, 64, MOST_TOKENS)


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
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    split_k: int

    def __str__(self) -> str:
        tile = f"{self.block_n}x{self.block_m}x{self.block_k}"
        return f"{tile} stages {self.stages} warps {self.warps} split {self.split_k}"


# A tile of 128 columns holds a head of two such halves.
WIDEST_HALVES = 64


def supports(problem: GemmProblem) -> str | None:
    """Return why this family cannot do the problem, or None."""
    if problem.m > MOST_TOKENS:
        return f"{problem.m} tokens, and beyond {MOST_TOKENS} reading W is no longer the cost"
    if problem.dtype.itemsize == 1:
        return "it does not multiply eight-bit floats"
    if problem.halves > WIDEST_HALVES:
        return f"heads of {2 * problem.halves} columns are wider than its tiles"
    if problem.paired and problem.summed > 64:
        return f"two accumulators of the {problem.summed} columns that are summed spill registers"
    if problem.dtype == torch.float32 and not problem.allow_tf32 and (problem.m > 16 or problem.halves > 32):
        return f"{problem.m} tokens in fp32: an IEEE product of this tile spills registers"
    return tma_obstacle(problem)


def choose(problem: GemmProblem, target: Target) -> tuple[Config, str]:
    """Return the config for the problem and why: the cheapest by `estimate_us`."""
    if target.interpreted:
        m, n, k = (max(16, triton.next_power_of_2(size)) for size in (problem.m, problem.n, problem.k))
        return Config(min(m, 128), min(n, 256), min(k, 256), 1, 4, 1), "interpreter: few programs, large tiles"
    config = min(_candidates(problem, target), key=lambda c: estimate_us(problem, c, target))
    return config, f"estimated {estimate_us(problem, config, target):.1f} us, no measurement for this N and K"


# Fitted to timings of ten shapes at 16 to 128 tokens (NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-24). Held
# against them, what it chooses is 2.7 % slower than the best config tried on average (6144x4096 at m = 128: 23 %, the
# worst), and takes 1.14 times its estimate (median).
# Launch, first tiles and epilogue that the predecessor's end does not hide; and what each wave of programs adds.
FIXED_US, WAVE_US = 0.85, 0.30
# Bytes in flight must cover this much of the memory's bandwidth, or the loads wait for one another.
LATENCY_US = 1.46
# A program's depth step cannot be shorter, however little it loads.
STEP_US = 0.25
# Counting in and reading back: once, and per MB of fp32 parts that the last program reads.
SPLIT_US, SPLIT_US_PER_MB = 3.25, 29.0
# How much of an uneven last wave is lost: other programs take the bandwidth it leaves.
UNEVEN = 0.38
# A tile of W from L2 costs this share of one from memory (assumed: L2 is about three times as fast).
AGAIN = 0.33


def estimate_us(problem: GemmProblem, config: Config, target: Target) -> float:
    """Estimate the time of a config: the bytes of W at the bandwidth it can keep busy."""
    tiles = ceil(problem.n / config.block_n) * ceil(max(problem.m, 1) / config.block_m)
    programs, slots = tiles * config.split_k, _slots(problem, config, target)
    waves = ceil(programs / slots)
    steps = ceil(problem.k / config.block_k / config.split_k)
    w_tile = problem.accumulators * config.block_n * config.block_k * problem.dtype.itemsize
    in_flight_us = min(programs, slots) * max(config.stages - 1, 1) * w_tile / target.bandwidth_bytes_s * 1e6
    full = (programs / (waves * slots)) ** UNEVEN if waves > 1 else 1.0
    rate = target.bandwidth_bytes_s * min(1.0, in_flight_us / LATENCY_US) * full
    # W comes from memory once, and again from L2 for every further tile of tokens.
    tiles_m = ceil(max(problem.m, 1) / config.block_m)
    reads = (1 + AGAIN * (tiles_m - 1)) / tiles_m
    stream_us = max(programs * steps * w_tile * reads / rate * 1e6, waves * steps * STEP_US)
    parts_mb = (config.split_k - 1) * config.block_n * config.block_m * problem.accumulators * 4e-6
    split_us = SPLIT_US + SPLIT_US_PER_MB * parts_mb if config.split_k > 1 else 0.0
    return FIXED_US + WAVE_US * waves + stream_us + split_us


def smem_bytes(problem: GemmProblem, config: Config) -> int:
    """Shared memory of the pipeline: every stage holds one x tile and one W tile per accumulator; 1 KB of barriers."""
    rows = config.block_m + problem.accumulators * config.block_n
    return config.stages * rows * config.block_k * problem.dtype.itemsize + 1024


def _slots(problem: GemmProblem, config: Config, target: Target) -> int:
    """Programs resident at once: bounded by shared memory, and by 64 K registers at 128 a thread."""
    per_sm = min(max(1, target.smem_bytes // smem_bytes(problem, config)), 16 // config.warps)
    return per_sm * target.sm_count


def _candidates(problem: GemmProblem, target: Target) -> Iterable[Config]:
    """Every tile that spills no register, with the deepest pipeline that one, two or three programs leave room for."""
    ieee = problem.dtype == torch.float32 and not problem.allow_tf32
    whole = 16 if ieee else min(128, max(16, triton.next_power_of_2(problem.m)))
    depths = (32,) if ieee else (64, 128) if problem.dtype.itemsize == 2 else (32, 64)
    for block_m, block_n, block_k, split_k in product({whole, min(whole, 64)}, (64, 128), depths, (1, 2, 3, 4, 6, 8)):
        if not whole_heads(problem, block_n) or block_n < problem.summed:
            continue
        if block_n == 128 and (ieee or block_m * problem.accumulators >= 128):
            continue
        base = Config(block_m, block_n, block_k, 1, 4, split_k)
        for resident in (1, 2, 3):
            stages = min(8, (target.smem_bytes // resident - 1024) // (smem_bytes(problem, base) - 1024))
            if stages >= 2:
                yield replace(base, stages=stages)


@triton.jit(do_not_specialize=["m_size"])
def gemm_skinny_kernel(
    x_desc,
    w_desc,
    partials,
    counters,
    m_size,
    t,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIR_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT_K: tl.constexpr,
    K_PER_SPLIT: tl.constexpr,
    HALVES: tl.constexpr,
    PAIRED: tl.constexpr,
    KN: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    LOAD_PARTS: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    tile_n, split, tile_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n0 = tile_n * BLOCK_N
    m0 = tile_m * BLOCK_M
    k0 = split * K_PER_SPLIT
    if PDL:
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
    if SPLIT_K == 1:
        _finish(acc, acc2, m0, n0, m_size, t, N, HALVES, LOAD_PARTS, EPILOGUE)
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
            total = sum_of_splits(base, at, SPLIT_K, ACCS * TILE)
            total2 = total
            if PAIRED:
                total2 = sum_of_splits(base + TILE, at, SPLIT_K, ACCS * TILE)
            tl.store(counters + unit, 0)
            _finish(total, total2, m0, n0, m_size, t, N, HALVES, LOAD_PARTS, EPILOGUE)


@triton.jit
def _finish(
    acc,
    acc2,
    m0,
    n0,
    m_size,
    t,
    N: tl.constexpr,
    HALVES: tl.constexpr,
    LOAD_PARTS: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    ACROSS: tl.constexpr = 2 if HALVES > 0 else 1
    m = m0 + tl.arange(0, acc.shape[1])[None, :]
    n = n0 // ACROSS + tl.arange(0, acc.shape[0] // ACROSS)[:, None]
    row = tl.minimum(m, m_size - 1)
    if HALVES > 0:
        acc, acc2 = halves_apart(acc, HALVES, 0)
    if LOAD_PARTS is not None:
        t = t + (sum_of_parts(LOAD_PARTS(row, n, t), n),)
    EPILOGUE(acc, acc2, row, n, (n < N // ACROSS) & (m < m_size), t)


def _constexprs(problem: GemmProblem, config: Config, epilogue: Any, pdl: bool, parts: Any = None) -> dict[str, Any]:
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
        "PAIRED": problem.paired,
        "KN": problem.layout == "kn",
        "PDL": pdl,
        "PRECISION": problem.precision,
        "LOAD_PARTS": parts,
        "EPILOGUE": epilogue,
    }


class SkinnyGemm:
    """A prepared launch; call it with x [M, K], W in the problem's layout and the epilogue's tensors."""

    def __init__(self, epilogue: Any, config: Config, problem: GemmProblem, parts: Any, pdl: bool, slot: int) -> None:
        self.config, self.problem, self.slot = config, problem, slot
        self.kernel = Kernel(
            gemm_skinny_kernel,
            _constexprs(problem, config, epilogue, pdl, parts),
            num_warps=config.warps,
            num_stages=config.stages,
            pdl=pdl,
        )
        block = w_block(problem, config.block_n, config.block_k)
        self._describe_x = Descriptors(lambda x: descriptor(x, [config.block_m, config.block_k], "x"))
        self._describe_w = Descriptors(lambda w: descriptor(w, block, "W"))

    def arguments(self, x: torch.Tensor, w: torch.Tensor, t: tuple) -> tuple[tuple[int, int, int], tuple]:
        """Return grid and kernel arguments, as the next call would launch them."""
        config, m = self.config, x.shape[0]
        tiles_n, tiles_m = ceil(self.problem.n / config.block_n), ceil(m / config.block_m)
        sums = config.block_n * config.block_m * self.problem.accumulators
        scratch = workspace.for_splits(x.device, tiles_n * tiles_m, config.split_k, sums, self.slot)
        args = (self._describe_x(x), self._describe_w(w), scratch.partials, scratch.counters, m, t)
        return (tiles_n, config.split_k, tiles_m), args

    def __call__(self, x: torch.Tensor, w: torch.Tensor, t: tuple) -> None:
        if x.shape[0] == 0:
            return
        grid, args = self.arguments(x, w, t)
        self.kernel(grid, *args)


def prepare(
    epilogue: Any, config: Config, problem: GemmProblem, *, parts: Any = None, pdl: bool = False, slot: int = 0
) -> SkinnyGemm:
    """Fix everything that does not change between calls.

    Args:
        epilogue: `@triton.jit` body `(acc, acc2, m, n, mask, t)`; accumulators are [BLOCK_N, BLOCK_M].
        config: from `choose`.
        problem: sizes and strides; `m` is only a hint.
        parts: as for `gemm_stream.prepare`.
        pdl: wait for the predecessor in the kernel and let the successor start before the epilogue.
        slot: workspace slot; differs between kernels that may run at the same time.
    """
    return SkinnyGemm(epilogue, config, problem, parts, pdl, slot)


def compile_jobs(arch: int) -> Iterable[CompileJob]:
    """Yield one job for every config that `choose` gives for a measured or a sample problem, with sample epilogues."""
    for problem, config in job_configs({}, JOB_TOKENS, supports, choose, arch):
        yield _job(problem, config)


def _job(problem: GemmProblem, config: Config) -> CompileJob:
    dtype = type_name(problem.dtype)
    epilogue = sample(problem)
    return CompileJob(
        family="gemm_skinny",
        label=label(problem),
        fn=gemm_skinny_kernel,
        signature={
            "x_desc": f"tensordesc<{dtype}[{config.block_m},{config.block_k}]>",
            "w_desc": f"tensordesc<{dtype}[{','.join(map(str, w_block(problem, config.block_n, config.block_k)))}]>",
            "partials": "*fp32",
            "counters": "*i32",
            "m_size": "i32",
            "t": (f"*{dtype}",),
        },
        constexprs=_constexprs(problem, config, epilogue, pdl=True),
        num_warps=config.warps,
        num_stages=config.stages,
        divisible=("partials", "counters", "t"),
    )
