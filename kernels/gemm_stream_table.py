"""Configs of the streaming GEMM as they were measured, each in the piece that it is for, and the rule they follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import ceil

import triton

from .gemm import GemmProblem, Measured, Table, lookup, measured, nearest
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


# What `tools/tune_piece.py` found best where the GEMM runs: in the model's middle piece, its neighbours' kernels around
# it. A row serves the m below it too; `us` is what the launch adds to the piece, counted from the end of the kernel
# before: less than W's bytes take, where they were on their way by then. In most of the H100's rows of
# 4096x4096 and 2048x2048 the piece's first product asked early as well, which it does no more.
CONFIGS: dict[str, Table] = {
    "h200": measured(
        Config,
        """
    N     K kind    m   bm  bn  bk  st  wp  sk  tf      us
 2048  2048  sum    8   8  64 128   8   4   2   0     8.8
 2048  2048  sum   16  16  64 128   8   4   2   0     9.2
 2048  2048  sum   32  32  64 128   8   4   2   0     9.7
 2048  2048  sum   64  64  32 128   8   4   1   1     9.0
 2048  2048  sum  128  64  32 128   8   4   1   1     7.7
 2048  6144  sum   64  64  32 128   8   4   2   1    10.8
 2048  8192  sum    8   8  64 128   8   4   4   0    10.3
 2048  8192  sum   16  16  64 128   8   4   4   0    10.8
 2048  8192  sum   32  32  64 128   8   4   4   0    11.0
 2048  8192  sum   64  64  32 128   8   4   2   1    12.9
 2048  8192  sum  128  64  32 128   8   4   1   1    15.8
 2560  4096  sum   64  64  32 128   8   4   1   1    12.0
 2560  4096  sum  128  64  64 128   7   4   1   0    14.2
 2560  9728  sum   64  64  32 128   8   4   1   1    19.0
 2560  9728  sum  128  64  64 128   7   4   1   1    22.0
 3072  2048 head    8   8  64 128   6   4   4   0     3.8
 3072  2048 head   16  16  64 128   5   4   4   0     4.1
 3072  2048 head   32  32  64 128   4   4   2   0     6.3
 3072  2048 head   64  64  32 128   8   4   1   1     5.6
 3072  2048 head  128  64  64 128   7   4   1   1     6.4
 3072  3072  sum   64  64  32 128   8   4   1   1    10.6
 3072  3072  sum  128  64  64 128   7   4   1   0    12.6
 3072  8192  sum   64  64  32 128   8   4   1   1    18.2
 3072  8192  sum  128  64  64 128   7   4   1   0    21.8
 3584  3584  sum  128  64  64 128   7   4   1   0    11.3
 3584  4096  one   64  64  32 128   8   4   1   1    12.0
 3584  4096  one  128  64  64 128   7   4   1   1    14.6
 3584 14336  one   64  64  32 128   8   4   1   1    29.4
 3584 14336  one  128 128  64  64   8   8   2   1    33.9
 3584 18944  sum  128 128  64  64   8   4   2   1    45.0
 4096  2048  one   64  64  32 128   8   4   1   1     5.3
 4096  4096  sum    8   8  64 128   6   4   4   0    15.9
 4096  4096  sum   16  16  64 128   8   4   2   0    15.4
 4096  4096  sum   32  32  64 128   8   4   2   0    15.3
 4096  4096  sum   64  64  32 128   8   4   1   1    14.3
 4096  4096  sum  128  64  64 128   7   4   1   0    16.8
 4096 11008  sum   64  64  32 128   8   4   1   1    26.8
 4096 12288  sum    8   8  64 128   6   4   4   0    24.5
 4096 12288  sum   16  16  64 128   8   4   2   0    25.4
 4096 12288  sum   32  32  64 128   8   4   2   0    26.3
 4096 12288  sum   64  64  32 128   8   4   1   1    28.3
 4096 12288  sum  128 128  64  64   8   4   2   1    35.0
 4096 14336  sum    8   8  64 128   6   4   4   0    28.0
 4096 14336  sum   16  16  64 128   8   4   2   0    28.9
 4096 14336  sum   32  32  64 128   8   4   2   0    29.9
 4096 14336  sum   64  64  32 128   8   4   1   1    33.0
 4096 14336  sum  128 128  64  64   8   4   2   1    39.1
 4608  3584 head  128 128  64 128   4   4   1   0    16.2
 5120  3072 head   64  64  64 128   7   4   1   1    10.5
 5120  3072 head  128 128  64 128   4   8   1   1    14.0
 5120  4096  sum   16  16  64 128   5   4   1   0    18.6
 5120  4096  sum   64  64  64 128   7   4   1   1    18.2
 5120  4096  one  128 128  64  64   8   4   1   1    19.7
 5120  4096  sum  128  64 128 128   4   8   1   0    20.4
 5120  5120  sum   16  16  64 128   8   4   1   0    21.0
 5120  5120  sum   64  64  64 128   7   4   1   1    20.1
 5120  5120  one  128 128  64  64   8   4   1   0    21.7
 5120  5120  sum  128  64 128  64   8   4   1   1    22.3
 5120 14336  sum   16  16  64 128   5   4   4   0    38.9
 5120 14336  sum   64  64  64 128   7   4   2   1    47.9
 5120 14336  one  128 128  64  64   8   4   1   0    49.9
 5120 14336  sum  128 128 128  64   7   8   3   1    50.1
 5120 17408  sum   16  16  64 128   8   4   1   0    47.7
 5120 17408  sum   64  64  64 128   7   4   1   1    48.4
 5120 17408  one  128 128  64  64   8   4   1   0    58.2
 5120 17408  sum  128 128 128  64   7   8   3   0    57.2
 5120 32768  sum   16  16  64 128   8   4   4   0    84.3
 5120 32768  one  128 128 128  64   7   8   3   1   103.3
 6144  2048 pair   64  64  64  64   8   4   1   1    14.6
 6144  2560  one   64  64  64 128   7   4   1   0     8.8
 6144  2560  one  128 128  64  64   8   4   1   1    11.9
 6144  4096 head    8   8  64  64   8   4   4   0    10.1
 6144  4096 head   16  16  64 128   8   4   1   0    12.7
 6144  4096 head   32  32  64 128   8   4   1   0    13.0
 6144  4096 head   64  64  64 128   7   4   1   1    14.4
 6144  4096 head  128 128  64 128   4   4   1   0    19.5
 6144  5120 head   16  16  64 128   8   4   1   0    15.2
 6144  5120 head   64  64  64 128   7   4   1   1    17.0
 6144  5120 head  128 128  64 128   4   4   1   0    23.8
 7168  5120  one   16  16  64 128   8   4   1   0    17.1
 7168  5120  one   64  64  64  64   8   4   1   0    21.0
 7168  5120  one  128 128  64 128   4   8   1   1    25.5
 8192  2048 pair    8   8  64 128   6   4   1   0    14.6
 8192  2048 pair   16  16  64 128   6   4   1   0    14.9
 8192  2048 pair   32  32  64 128   5   4   1   0    16.3
 8192  2048 pair   64  64  64 128   4   4   1   1    17.4
 8192  2048 pair  128 128  64  64   7   4   1   0    21.6
 8192  3072 pair   64  64  32  64   6   4   1   1    26.3
 8192  3072 pair  128 128  64  64   7   4   1   0    28.2
 8192  3584 head   64  64  64 128   7   4   1   0    14.8
 8192  3584 head  128 128  64 128   4   8   1   1    19.4
 9728  2560 pair   64  64  64  64   4   4   1   1    28.1
 9728  2560 pair  128 128 128  64   4   8   1   0    33.2
11008  4096 pair   64  64  64  64   4   4   1   0    46.9
12288  4096 head   64  64  64 128   7   4   1   1    28.0
12288  4096 pair    8   8  64 128   3   4   1   0    50.5
12288  4096 pair   16  16  64 128   3   4   1   0    48.6
12288  4096 pair   32  32  64  64   5   4   1   0    50.4
12288  4096 pair   64  64  64  64   4   4   1   1    52.6
12288  4096 pair  128 128 128  64   4   8   1   1    58.2
14336  3584 pair   64  64  64  64   4   4   1   1    52.6
14336  3584 pair  128 128 128  64   4   8   1   1    59.5
14336  4096 pair    8   8  64 128   3   4   1   0    54.4
14336  4096 pair   16  16  64 128   3   4   1   0    54.1
14336  4096 pair   32  32  64 128   2   4   1   0    58.2
14336  4096 pair   64  64  64 128   2   4   1   1    60.1
14336  4096 pair  128 128 128  64   4   8   1   1    65.2
14336  5120 pair   16  16  64 128   3   4   1   0    68.8
14336  5120 pair   64  64  64 128   4   4   1   0    75.0
14336  5120 pair  128 128  64  64   3   4   1   0    80.4
17408  5120 pair   16  16  64 128   6   4   1   0    83.6
17408  5120 pair   64  64  32 128   7   4   1   1    95.1
17408  5120 pair  128 128  64  64   7   4   1   0   112.0
18944  3584 pair  128 128  64  64   7   4   1   0    85.9
32768  5120 pair   16  16  64 128   6   4   1   0   152.0
32768  5120 pair  128 128  64  64   3   4   1   0   176.3
""",
        "added to a piece, NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-26",
    ),
    "h100": measured(
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
 4096 12288  sum  128   64  64 128   7   4   1   1    41.7
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
 6144  4096 norm    8    8 128 128   3   4   4   0    17.2
 6144  4096 norm   16   16 128 128   6   4   2   0    16.7
 6144  4096 norm   32   32 128 128   5   4   2   0    19.7
 8192  2048 pair    8    8  64 128   6   4   1   0    18.9
 8192  2048 pair   16   16  64 128   6   4   1   0    20.5
 8192  2048 pair   32   32  64 128   5   4   1   0    21.9
 8192  2048 pair   64   64  32 128   3   4   1   1    23.7
 8192  2048 pair  128  128  64 128   3   4   1   0    27.9
12288  4096 pair    8    8  64 128   3   4   1   0    70.9
12288  4096 pair   16   16  64 128   3   4   1   0    68.1
12288  4096 pair   32   32  64 128   2   4   1   0    71.7
12288  4096 pair   64   64  32 128   7   4   1   1    70.0
12288  4096 pair  128  128  64  64   7   4   1   0    77.6
14336  4096 pair    8    8  64 128   3   4   1   0    76.3
14336  4096 pair   16   16  64 128   3   4   1   0    78.4
14336  4096 pair   32   32  64 128   2   4   1   0    81.5
14336  4096 pair   64   64  32 128   3   4   1   1    80.6
14336  4096 pair  128  128  64 128   3   4   1   0    85.0
""",
        "added to a piece, NVIDIA H100 80GB, torch 2.11, triton 3.6, bf16, 2026-11-25 and 26",
    ),
}


def measurement(problem: GemmProblem, target: Target) -> Measured | None:
    """Return what was measured for the problem's N and K in the bucket that holds its m: on this device, or else on the
    one with the nearest bandwidth, the time by the ratio of the two."""
    return next((hit for table in _tables(target) if (hit := lookup(table, BUCKETS, problem)) is not None), None)


@cache
def _tables(target: Target) -> tuple[Table, ...]:
    """The tables of all devices, the nearest first."""
    ratios = {name: Target.named(name).bandwidth_bytes_s / target.bandwidth_bytes_s for name in CONFIGS}

    def here(hit: Measured, ratio: float) -> Measured:
        return hit if ratio == 1 else replace(hit, us=hit.us * ratio, vendor_us=hit.vendor_us * ratio, elsewhere=True)

    return tuple(
        {key: {m: here(hit, ratios[name]) for m, hit in row.items()} for key, row in CONFIGS[name].items()}
        for name in nearest(CONFIGS, target)
    )


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


def smem_bytes(problem: GemmProblem, config: Config) -> int:
    """Shared memory of the ring: every stage holds one x tile and one W tile per accumulator; 1 KB of barriers."""
    rows = config.block_m + problem.accumulators * config.block_n
    return config.stages * rows * config.block_k * problem.dtype.itemsize + 1024
