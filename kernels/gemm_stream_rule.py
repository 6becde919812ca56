"""Rules of the streaming GEMM: when it asks for W, what a config takes, and the one for shapes without a row."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, inf

import triton

from .gemm import GemmProblem
from .gemm_persistent import MEASURED_SM_COUNT
from .gemm_stream_table import MOST_TOKENS, Config, measurement, smem_bytes
from .target import Target


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
    """Estimate the time of a config: its own measurement, else W's bytes, and those that come again from L2. More than
    `MOST_TOKENS` are not estimated where nothing was measured on the device."""
    hit = measurement(problem, target)
    if hit is not None and hit.config == config:
        return hit.us
    if hit is None and problem.m > MOST_TOKENS:
        return inf
    tiles_m, tiles_n = ceil(max(problem.m, 1) / config.tokens), ceil(problem.n / config.block_n)
    again = problem.weight_bytes * (tiles_m - 1) + tiles_n * problem.m * problem.k * problem.dtype.itemsize
    stream_us = (problem.weight_bytes + AGAIN * again) / target.bandwidth_bytes_s * 1e6
    # Too few programs cannot ask for enough at once.
    idle = max(1.0, 0.45 * target.sm_count / (tiles_m * tiles_n * config.split_k))
    padded = 2 * tiles_m * config.tokens * problem.n * problem.k * problem.accumulators
    rate = FLOPS * (2 if problem.dtype.itemsize == 1 else 1)
    product_us = padded / rate * MEASURED_SM_COUNT / target.sm_count * 1e6
    parts_mb = (config.split_k - 1) * config.block_n * config.tokens * problem.accumulators * 4e-6
    split_us = SPLIT_US + SPLIT_US_PER_MB * parts_mb if config.split_k > 1 else 0.0
    return FIXED_US + split_us + max(stream_us * idle, product_us)


def alike(problem: GemmProblem, target: Target) -> Config:
    """What the H200's rows, and what came close to them, have in common, for shapes without a row.

    All programs should be there at once, and most multiprocessors have one: what memory gives then flows to the end,
    and one ring may take all shared memory. Tiles are as narrow, and K is split in as many parts, as that allows. Where
    tiles are more than that however wide they are, but no more than twice that, two programs share a multiprocessor.
    """
    sms, itemsize = target.sm_count, problem.dtype.itemsize
    block_m, block_n, tokens_first = _tile(problem, sms)
    block_n = max(block_n, problem.summed)
    tiles = ceil(problem.n / block_n) * ceil(max(problem.m, 1) / block_m)
    # Tiles of 128 tokens are large: deep ones would leave a ring of two or three.
    shallow = block_m > 64 and (problem.paired or block_n > 64 or _deep(problem))
    # The epilogue of eight-bit floats scales rows and columns: with four warps such a tile keeps some of it in memory.
    warps = 8 if block_m > 64 and (block_n > 64 or (tokens_first and itemsize == 1)) else 4
    block_k = (128 if shallow else 256) // itemsize
    split_k = _splits(problem, block_m, tiles, ceil(problem.k / block_k), sms)
    shared = sms < tiles * split_k <= 2 * sms
    if shared and problem.m > 32:
        block_k = 128 // itemsize
    one = Config(block_m, block_n, block_k, 1, warps, split_k, tokens_first)
    room = target.smem_bytes // 2 - 1024 if shared else target.smem_bytes
    stages = min(8, (room - 1024) // (smem_bytes(problem, one) - 1024))
    return replace(one, stages=max(2, stages))


# Programs for such a share of the multiprocessors are enough: 80 of 132 ask for nearly all that memory gives.
ENOUGH = 0.6
# Bytes of a row of x. Beyond, x's rows from L2 cost two tiles of 64 tokens more than parts cost two halves of K: so it
# was for K of 12288 and 14336 with 3584 and 4096 columns at 128 tokens in 16 bits, and not for 8192 and 9728 with 2048
# to 3072, nor for 14336 in eight bits.
DEEP_BYTES = 20_000


def _deep(problem: GemmProblem) -> bool:
    return problem.k * problem.dtype.itemsize > DEEP_BYTES


def _tile(problem: GemmProblem, sms: int) -> tuple[int, int, bool]:
    """Tokens and columns of a tile, and whether tokens are its rows."""
    m = problem.m

    def programs(block_n: int) -> int:
        return ceil(problem.n / block_n)

    if m <= 32:
        return max(8, triton.next_power_of_2(m)), 64, False
    if m <= 64:
        return 64, 32 if programs(32) <= sms else 64, True
    if problem.summed > 64:
        # The sizes of tiles that won for 5120 columns, 4096 to 17408 deep, where each tile sums 128 of them.
        return (128, 128, True) if _deep(problem) else (64, 128, False)
    # Pairs of eight-bit tiles go to two programs a multiprocessor instead: 0.987 of 8B's piece.
    if programs(128) <= sms < programs(64) and not (problem.paired and problem.dtype.itemsize == 1):
        return 128, 128, True
    if programs(64) * _most_splits(problem) >= ENOUGH * sms:
        return 128, 64, not problem.paired
    return 64, 32 if problem.summed <= 32 and 2 * programs(32) <= sms else 64, True


def _most_splits(problem: GemmProblem) -> int:
    """Parts that K of a tile of 128 tokens is worth, at the most."""
    if problem.summed > 64:
        return 4
    return 2 if _deep(problem) else 1


def _splits(problem: GemmProblem, block_m: int, tiles: int, steps: int, sms: int) -> int:
    """Parts of K: as many as leave all programs there at once, and each enough to do."""
    few = problem.m <= 8
    if block_m > 64:
        most, enough = _most_splits(problem), steps
    else:
        most, enough = 4, steps // (4 if few else 8 if problem.m <= 32 else 16)
    # The fewest tokens may have two programs a multiprocessor, as their tiles of x are small.
    at_once = 2 * sms if few and tiles < 0.7 * sms else sms
    split_k = max(1, min(most, at_once // tiles, enough))
    # No part without a step of its own.
    return ceil(steps / ceil(steps / split_k))
