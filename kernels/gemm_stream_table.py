"""Configs of the streaming GEMM as they were measured, each in the piece that it is for, and the rule they follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import triton

from .gemm import GemmProblem, measured
from .target import Target

# Beyond, reading W is no longer the cost.
MOST_TOKENS = 128
# The m of CONFIGS' rows.
BUCKETS = (8, 16, 32, 64, MOST_TOKENS)


@dataclass(frozen=True)
class Config:
    """Tile sizes and pipeline of one launch.

    Args:
        block_m: tokens per tile: at least 8, or 64 where tokens are the rows.
        block_n: columns of W per tile: at least 64, or 16 where tokens are the rows.
        block_k: depth per pipeline step.
        stages: tiles in the ring.
        warps: 4, or 8 for tiles of 128 rows.
        split_k: programs that share one output tile.
        tokens_first: tokens are the rows of the product.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    split_k: int
    tokens_first: bool = False

    def __str__(self) -> str:
        # Rows by columns by depth; where the rows are tokens it says so.
        tile = f"{self.block_m} tokens x {self.block_n}" if self.tokens_first else f"{self.block_n}x{self.block_m}"
        return f"{tile}x{self.block_k} stages {self.stages} warps {self.warps} split {self.split_k}"


EVIDENCE = "added to a piece, NVIDIA H100 80GB, torch 2.11, triton 3.6, bf16, 2026-11-25 and 26"

# What `tools/tune_piece.py` found best where the GEMM runs: in the model's middle piece, its neighbours' kernels around
# it. A row serves the m below it too; `us` is what the launch adds to the piece, counted from the end of the kernel
# before: less than W's bytes take, where they were on their way by then. In most rows of
# 4096x4096 and 2048x2048 the piece's first product asked early as well, which it does no more.
CONFIGS = measured(
    Config,
    """
    N     K kind    m   bm  bn  bk  st  wp  sk  tf      us
 2048  2048  one    8    8  64 128   8   4   2   0     6.0
 2048  2048  one   16   16  64 128   8   4   2   0     7.2
 2048  2048  one   32   32  64 128   8   4   2   0     7.2
 2048  2048  one   64   64  32 128   8   4   1   1     5.6
 2048  2048  one  128   64  64 128   7   4   1   0     7.2
 2048  8192  one    8    8  64 128   8   4   4   0    12.9
 2048  8192  one   16   16  64 128   8   4   4   0    12.8
 2048  8192  one   32   32  64 128   8   4   4   0    13.5
 2048  8192  one   64   64  32 128   8   4   2   1    14.4
 2048  8192  one  128   64  32 128   8   4   1   1    18.1
 3072  2048  one    8    8  64 128   6   4   4   0     3.7
 3072  2048  one   16   16  64 128   5   4   2   0     5.5
 3072  2048  one   32   32  64 128   4   4   2   0     6.9
 3072  2048  one   64   64  32 128   8   4   1   1     5.3
 3072  2048  one  128   64  64 128   7   4   1   0     6.4
 3072  2048 head   32   64  32 128   8   4   1   1     6.9
 4096  4096  one    8    8  64 128   6   4   4   0    12.4
 4096  4096  one   16   16  64 128   8   4   2   0    20.8
 4096  4096  one   32   32  64 128   8   4   2   0    19.7
 4096  4096  one   64   64  32 128   8   4   1   1    15.6
 4096  4096  one  128  128  64  64   8   4   1   0    16.9
 4096  4096  sum  128   64  64 128   7   4   1   0    21.2
 4096 12288  one    8    8  64 128   6   4   4   0    34.0
 4096 12288  one   16   16  64 128   8   4   2   0    34.6
 4096 12288  one   32   32  64 128   8   4   2   0    35.2
 4096 12288  one   64   64  32 128   8   4   1   1    38.2
 4096 12288  one  128   64  64  64   8   4   1   0    44.7
 4096 14336  one    8    8  64 128   6   4   4   0    36.8
 4096 14336  one   16   16  64 128   8   4   2   0    40.0
 4096 14336  one   32   32  64 128   8   4   2   0    41.0
 4096 14336  one   64   64  32 128   8   4   1   1    42.3
 4096 14336  one  128  128  32 128   5   4   1   1    50.1
 4096 14336  sum  128   64  64  64   8   4   1   1    48.1
 6144  4096  one    8    8  64 128   8   4   1   0    18.6
 6144  4096  one   16   16  64 128   8   4   1   0    18.1
 6144  4096  one   32   32  64 128   8   4   1   0    18.0
 6144  4096  one   64   64  32 128   4   4   1   1    19.1
 6144  4096  one  128  128  64 128   4   4   1   0    20.9
 6144  4096 head  128  128  64  64   8   8   1   1    21.9
 8192  2048 pair    8    8  64 128   6   4   1   0    18.9
 8192  2048 pair   16   16  64 128   6   4   1   0    20.5
 8192  2048 pair   32   32  64 128   5   4   1   0    21.9
 8192  2048 pair   64   64  32 128   3   4   1   1    23.7
 8192  2048 pair  128  128  64 128   3   4   1   0    27.9
12288  4096 pair    8    8  64 128   6   4   1   0    68.4
12288  4096 pair   16   16  64 128   3   4   1   0    68.1
12288  4096 pair   32   32  64 128   5   4   1   0    68.9
12288  4096 pair   64   64  32 128   7   4   1   1    70.0
14336  4096 pair    8    8  64 128   3   4   1   0    76.3
14336  4096 pair   16   16  64 128   3   4   1   0    78.4
14336  4096 pair   32   32  64 128   2   4   1   0    81.5
14336  4096 pair   64   64  32 128   3   4   1   1    80.6
14336  4096 pair  128  128  64 128   3   4   1   0    85.0
""",
    EVIDENCE,
)


def alike(problem: GemmProblem, target: Target) -> Config:
    """What the rows of CONFIGS, and what came close to them, have in common, for shapes without a row.

    All programs should be there at once, and most multiprocessors have one: what memory gives then flows to the end,
    and one ring may take all shared memory. Tiles are as narrow, and K is split in as many parts, as that allows. Where
    tiles are more than that however wide they are, two programs share a multiprocessor, if the last wave would
    otherwise be a small one.
    """
    sms, n, m = target.sm_count, problem.n, max(problem.m, 1)
    block_m, block_n, tokens_first = _tile(problem, sms)
    tiles = ceil(n / block_n) * ceil(m / block_m)
    block_k, warps = 256 // problem.dtype.itemsize, 8 if block_m > 64 and tokens_first else 4
    # The fewest tokens may have two programs a multiprocessor, as their tiles of x are small.
    most = 2 * sms if m <= 8 and tiles < 0.7 * sms else sms
    steps = ceil(problem.k / block_k)
    split_k = max(1, min(4, most // tiles, steps // (4 if m <= 8 else 8 if m <= 32 else 16)))
    # No split without a step of its own.
    split_k = ceil(steps / ceil(steps / split_k))
    waves = tiles * split_k / sms
    shared = waves > 1 and (m <= 8 or waves / ceil(waves) < (0.8 if block_m > 64 else 0.9))
    one = Config(block_m, block_n, block_k, 1, warps, split_k, tokens_first)
    if shared and block_m > 64:
        one = replace(one, block_k=block_k // 2)
    room = target.smem_bytes // 2 - 1024 if shared else target.smem_bytes
    stages = min(8, (room - 1024) // (smem_bytes(problem, one) - 1024))
    return replace(one, stages=max(2, stages))


# Programs for such a share of the multiprocessors are enough: 80 of 132 ask for nearly all that memory gives.
ENOUGH = 0.6


def _tile(problem: GemmProblem, sms: int) -> tuple[int, int, bool]:
    """Tokens and columns of a tile, and whether tokens are its rows."""
    n, m = problem.n, problem.m
    if m <= 32:
        return max(8, triton.next_power_of_2(m)), 64, False
    if m <= 64:
        # Narrow tiles, unless only wide ones are there at once.
        return 64, 64 if ceil(n / 64) <= sms < ceil(n / 32) else 32, True
    if ceil(n / 64) >= ENOUGH * sms:
        return 128, 64, not problem.paired
    return 64, 32 if problem.part <= 32 and 2 * ceil(n / 32) <= sms else 64, True


def smem_bytes(problem: GemmProblem, config: Config) -> int:
    """Shared memory of the ring: every stage holds one x tile and one W tile per accumulator; 1 KB of barriers."""
    rows = config.block_m + problem.accumulators * config.block_n
    return config.stages * rows * config.block_k * problem.dtype.itemsize + 1024
