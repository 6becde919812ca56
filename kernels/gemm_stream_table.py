"""Configs of the streaming GEMM as they were measured, most in the piece that they are for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from .gemm import GemmProblem, Measured, Table, in_bucket, joined, measured, nearest, row_of
from .target import Target

# Beyond, reading W is no longer the cost; products that were measured with more tokens stream all the same.
MOST_TOKENS = 128
# The m of CONFIGS' rows.
BUCKETS = (8, 16, 32, 64, 96, MOST_TOKENS, 144, 160, 192, 320)
# Those that a row may lack: where it has the next one, that serves their m as well.
BETWEEN = (96, 144, 160)
# Kinds of products that were measured with norms and rotations in epilogues, for as many tokens as they have rows.
FUSED = ("pair", "head", "sum")


@dataclass(frozen=True)
class Config:
    """Tile sizes and pipeline of one launch.

    Args:
        block_m: tokens per tile: at least 8, or 64 where tokens are the rows.
        block_n: columns of W per tile: at least 64, 32 of a pair in one product, or 16 where tokens are the rows.
        block_k: depth per pipeline step.
        stages: tiles in the ring.
        warps: 4, or 8 for tiles of 128 rows, a pair's together.
        split_k: programs that share one output tile.
        tokens_first: tokens are the rows of the product.
        extra_m: tokens beside those, of accumulators of their own, so that a tile may hold 128 + 16; not where tokens
            are the rows, and where a step is 128 bytes deep only.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    split_k: int
    tokens_first: bool = False
    extra_m: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.block_m + self.extra_m

    def __str__(self) -> str:
        # Rows by columns by depth; where the rows are tokens it says so.
        tokens = f"{self.block_m}+{self.extra_m}" if self.extra_m else f"{self.block_m}"
        tile = f"{tokens} tokens x {self.block_n}" if self.tokens_first else f"{self.block_n}x{tokens}"
        return f"{tile}x{self.block_k} stages {self.stages} warps {self.warps} split {self.split_k}"


# What `tools/tune_piece.py` found best where the GEMM runs: in the model's middle piece, its neighbours' kernels around
# it. A row serves the m below it too; `us` is what the launch adds to the piece, counted from the end of the kernel
# before: less than W's bytes take, where they were on their way by then. Rows "alone" are timed as `gemm_persistent`'s
# are, beside which they are chosen. In most of the H100's rows of 4096x4096 and 2048x2048 the piece's first product
# asked early as well, which it does no more.
CONFIGS: dict[str, Table] = {
    "h200": joined(
        measured(
            Config,
            """
    N     K kind    m   bm  bn  bk  st  wp  sk  tf  ex      us
 2048  2048  sum    8   8  64 128   8   4   2   0   0     8.8
 2048  2048  sum   16  16  64 128   8   4   2   0   0     9.2
 2048  2048  sum   32  32  64 128   8   4   2   0   0     9.7
 2048  2048  sum   64  64  32 128   8   4   1   1   0     9.0
 2048  2048  sum  128  64  32 128   8   4   1   1   0     7.7
 2048  6144  sum   64  64  32 128   8   4   2   1   0    10.8
 2048  8192  sum    8   8  64 128   8   4   4   0   0    10.3
 2048  8192  sum   16  16  64 128   8   4   4   0   0    10.8
 2048  8192  sum   32  32  64 128   8   4   4   0   0    11.0
 2048  8192  sum   64  64  32 128   8   4   2   1   0    12.9
 2048  8192  sum  128  64  32 128   8   4   1   1   0    15.8
 2560  4096  sum   64  64  32 128   8   4   1   1   0    12.0
 2560  4096  sum  128  64  64 128   7   4   1   0   0    14.2
 2560  9728  sum   64  64  32 128   8   4   1   1   0    19.0
 2560  9728  sum  128  64  64 128   7   4   1   1   0    22.0
 3072  2048 head    8   8  64 128   6   4   4   0   0     3.8
 3072  2048 head   16  16  64 128   5   4   4   0   0     4.1
 3072  2048 head   32  32  64 128   4   4   2   0   0     6.3
 3072  2048 head   64  64  32 128   8   4   1   1   0     5.6
 3072  2048 head  128  64  64 128   7   4   1   1   0     6.4
 3072  3072  sum   64  64  32 128   8   4   1   1   0    10.6
 3072  3072  sum  128  64  64 128   7   4   1   0   0    12.6
 3072  8192  sum   64  64  32 128   8   4   1   1   0    18.2
 3072  8192  sum  128  64  64 128   7   4   1   0   0    21.8
 3584  3584  sum  128  64  64 128   7   4   1   0   0    11.3
 3584  4096  one   64  64  32 128   8   4   1   1   0    12.0
 3584  4096  one  128  64  64 128   7   4   1   1   0    14.6
 3584 14336  one   64  64  32 128   8   4   1   1   0    29.4
 3584 14336  one  128 128  64  64   8   8   2   1   0    33.9
 3584 18944  sum  128 128  64  64   8   4   2   1   0    45.0
 4096  2048  one   64  64  32 128   8   4   1   1   0     5.3
 4096  4096  sum    8   8  64 128   6   4   4   0   0    15.9
 4096  4096  sum   16  16  64 128   8   4   2   0   0    15.4
 4096  4096  sum   32  32  64 128   8   4   2   0   0    15.3
 4096  4096  sum   64  64  32 128   8   4   1   1   0    14.3
 4096  4096  sum  128  64  64 128   7   4   1   0   0    16.8
 4096 11008  sum   64  64  32 128   8   4   1   1   0    26.8
 4096 12288  sum    8   8  64 128   6   4   4   0   0    24.5
 4096 12288  sum   16  16  64 128   8   4   2   0   0    25.4
 4096 12288  sum   32  32  64 128   8   4   2   0   0    26.3
 4096 12288  sum   64  64  32 128   8   4   1   1   0    28.3
 4096 12288  sum  128 128  64  64   8   4   2   1   0    35.0
 4096 14336  sum    8   8  64 128   6   4   4   0   0    28.0
 4096 14336  sum   16  16  64 128   8   4   2   0   0    28.9
 4096 14336  sum   32  32  64 128   8   4   2   0   0    29.9
 4096 14336  sum   64  64  32 128   8   4   1   1   0    33.0
 4096 14336  sum  128 128  64  64   8   4   2   1   0    39.1
 4608  3584 head  128 128  64 128   4   4   1   0   0    16.2
 5120  3072 head   64  64  64 128   7   4   1   1   0    10.5
 5120  3072 head  128 128  64 128   4   8   1   1   0    14.0
 5120  4096  sum   16  16  64 128   5   4   1   0   0    18.6
 5120  4096  sum   64  64  64 128   7   4   1   1   0    18.2
 5120  4096  one  128 128  64  64   8   4   1   1   0    19.7
 5120  4096  sum  128  64 128 128   4   8   1   0   0    20.4
 5120  5120  sum   16  16  64 128   8   4   1   0   0    21.0
 5120  5120  sum   64  64  64 128   7   4   1   1   0    20.1
 5120  5120  one  128 128  64  64   8   4   1   0   0    21.7
 5120  5120  sum  128  64 128  64   8   4   1   1   0    22.3
 5120 14336  sum   16  16  64 128   5   4   4   0   0    38.9
 5120 14336  sum   64  64  64 128   7   4   2   1   0    47.9
 5120 14336  one  128 128  64  64   8   4   1   0   0    49.9
 5120 14336  sum  128 128 128  64   7   8   3   1   0    50.1
 5120 17408  sum   16  16  64 128   8   4   1   0   0    47.7
 5120 17408  sum   64  64  64 128   7   4   1   1   0    48.4
 5120 17408  one  128 128  64  64   8   4   1   0   0    58.2
 5120 17408  sum  128 128 128  64   7   8   3   0   0    57.2
 5120 32768  sum   16  16  64 128   8   4   4   0   0    84.3
 5120 32768  one  128 128 128  64   7   8   3   1   0   103.3
 6144  2048 pair   64  64  64  64   8   4   1   1   0    14.6
 6144  2560  one   64  64  64 128   7   4   1   0   0     8.8
 6144  2560  one  128 128  64  64   8   4   1   1   0    11.9
 6144  4096 head    8   8  64  64   8   4   4   0   0    10.1
 6144  4096 head   16  16  64 128   8   4   1   0   0    12.7
 6144  4096 head   32  32  64 128   8   4   1   0   0    13.0
 6144  4096 head   64  64  64 128   7   4   1   1   0    14.4
 6144  4096 head  128 128  64 128   4   4   1   0   0    19.5
 6144  5120 head   16  16  64 128   8   4   1   0   0    15.2
 6144  5120 head   64  64  64 128   7   4   1   1   0    17.0
 6144  5120 head  128 128  64 128   4   4   1   0   0    23.8
 7168  5120  one   16  16  64 128   8   4   1   0   0    17.1
 7168  5120  one   64  64  64  64   8   4   1   0   0    21.0
 7168  5120  one  128 128  64 128   4   8   1   1   0    25.5
 8192  2048 pair    8   8  64 128   6   4   1   0   0    14.6
 8192  2048 pair   16  16  64 128   6   4   1   0   0    14.9
 8192  2048 pair   32  32  64 128   5   4   1   0   0    16.3
 8192  2048 pair   64  64  64 128   4   4   1   1   0    17.4
 8192  2048 pair  128 128  64  64   7   4   1   0   0    21.6
 8192  3072 pair   64  64  32  64   6   4   1   1   0    26.3
 8192  3072 pair  128 128  64  64   7   4   1   0   0    28.2
 8192  3584 head   64  64  64 128   7   4   1   0   0    14.8
 8192  3584 head  128 128  64 128   4   8   1   1   0    19.4
 9728  2560 pair   64  64  64  64   4   4   1   1   0    28.1
 9728  2560 pair  128 128 128  64   4   8   1   0   0    33.2
11008  4096 pair   64  64  64  64   4   4   1   0   0    46.9
12288  4096 head   64  64  64 128   7   4   1   1   0    28.0
12288  4096 pair    8   8  64 128   3   4   1   0   0    50.5
12288  4096 pair   16  16  64 128   3   4   1   0   0    48.6
12288  4096 pair   32  32  64  64   5   4   1   0   0    50.4
12288  4096 pair   64  64  64  64   4   4   1   1   0    52.6
12288  4096 pair  128 128 128  64   4   8   1   1   0    58.2
14336  3584 pair   64  64  64  64   4   4   1   1   0    52.6
14336  3584 pair  128 128 128  64   4   8   1   1   0    59.5
14336  4096 pair    8   8  64 128   3   4   1   0   0    54.4
14336  4096 pair   16  16  64 128   3   4   1   0   0    54.1
14336  4096 pair   32  32  64 128   2   4   1   0   0    58.2
14336  4096 pair   64  64  64 128   2   4   1   1   0    60.1
14336  4096 pair  128 128 128  64   4   8   1   1   0    65.2
14336  5120 pair   16  16  64 128   3   4   1   0   0    68.8
14336  5120 pair   64  64  64 128   4   4   1   0   0    75.0
14336  5120 pair  128 128  64  64   3   4   1   0   0    80.4
17408  5120 pair   16  16  64 128   6   4   1   0   0    83.6
17408  5120 pair   64  64  32 128   7   4   1   1   0    95.1
17408  5120 pair  128 128  64  64   7   4   1   0   0   112.0
18944  3584 pair  128 128  64  64   7   4   1   0   0    85.9
32768  5120 pair   16  16  64 128   6   4   1   0   0   152.0
32768  5120 pair  128 128  64  64   3   4   1   0   0   176.3
""",
            "added to a piece, NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-26",
        ),
        measured(
            Config,
            """
    N     K kind    m   bm  bn  bk  st  wp  sk  tf  ex      us
 2048  2048  sum  144  64  64  64   8   4   2   0  16     9.5
 2048  2048  sum  160  64  64  64   8   4   2   0  16     9.8
 2048  2048  sum  192  64  64  64   8   4   1   0  32    10.8
 2048  8192  sum  144  64  64  64   8   4   2   0  16    17.8
 2048  8192  sum  160  64  64  64   8   4   2   0  16    18.0
 2048  8192  sum  192  64  64  64   8   4   2   0  32    18.9
 3072  2048 head  144  64  64  64   8   4   1   0  16     9.0
 3072  2048 head  160  64  64  64   8   4   1   0  16     9.2
 3072  2048 head  192  64  64  64   8   4   1   0  32    10.0
 4096  4096  sum   96  64  64  64   8   4   2   0  32    14.8
 4096  4096  sum  144  64  64  64   8   4   1   0  16    17.3
 4096  4096  sum  160  64  64  64   8   4   1   0  16    18.1
 4096  4096  sum  192  64  64  64   8   4   1   0  32    19.3
 4096 12288  sum  144 128  64  64   8   4   2   0  16    34.4
 4096 12288  sum  160 128  64  64   8   4   2   0  32    36.2
 4096 14336  sum   96  64  64  64   8   4   2   0  32    34.8
 4096 14336  sum  144 128  64  64   8   4   2   0  16    39.3
 4096 14336  sum  160 128  64  64   8   4   2   0  32    40.8
 4096 14336  sum  192 128  64  64   7   4   2   0  64    45.8
 6144  4096 head   96  64  64  64   8   4   1   0  32    18.2
 6144  4096 head  144 128  64  64   8   4   1   0  16    20.2
 6144  4096 head  160 128  64  64   8   4   1   0  32    21.2
 6144  4096 head  192  64 128  64   8   4   1   0  32    23.6
 8192  2048 pair  144 128  64  64   6   8   1   0  16    20.4
 8192  2048 pair  160 128  64  64   6   8   1   0  32    21.1
 8192  2048 pair  192 128  64  64   5   8   1   0  64    22.3
12288  4096 pair  144 128  64  64   3   4   1   0  16    61.1
12288  4096 pair  160 128  64  64   3   4   1   0  32    62.9
14336  4096 pair   96  64  64  64   3   8   1   0  32    62.6
14336  4096 pair  144 128 128  64   4   8   1   0  16    67.2
14336  4096 pair  160 128 128  64   4   8   1   0  32    69.7
14336  4096 pair  192 128  64  64   5   8   1   0  64    82.3
""",
            "added to a piece, NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-27",
        ),
        measured(
            Config,
            """
    N     K kind    m   bm  bn  bk  st  wp  sk  tf  ex      us
 2048  8192  one  320 128  64  64   8   4   2   0  32    21.5
 4096  4096  one  144 128  64  64   8   4   2   0  16    13.8
 4096  4096  one  160  64  64  64   8   4   1   0  16    14.4
 4096 12288  one  144 128  64  64   8   4   2   0  16    33.0
 4096 12288  one  160 128  64  64   8   4   2   0  32    34.5
 4096 12288  one  192 128  64  64   7   4   2   0  64    35.8
 6144  4096  one  144 128  64  64   8   4   1   0  16    18.0
 6144  4096  one  160 128  64  64   8   4   1   0  32    18.6
 6144  4096  one  192 128  64  64   7   4   1   0  64    19.6
""",
            "alone, NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-27",
        ),
    ),
    "h100": measured(
        Config,
        """
    N     K kind    m   bm  bn  bk  st  wp  sk  tf  ex      us
 2048  2048  one    8    8  64 128   8   4   2   0   0     6.0
 2048  2048  one   16   16  64 128   8   4   2   0   0     7.2
 2048  2048  one   32   32  64 128   8   4   2   0   0     7.2
 2048  2048  one   64   64  32 128   8   4   1   1   0     5.6
 2048  2048  one  128   64  64 128   7   4   1   0   0     7.2
 2048  8192  one    8    8  64 128   8   4   4   0   0    12.9
 2048  8192  one   16   16  64 128   8   4   4   0   0    12.8
 2048  8192  one   32   32  64 128   8   4   4   0   0    13.5
 2048  8192  one   64   64  32 128   8   4   2   1   0    14.4
 2048  8192  one  128   64  32 128   8   4   1   1   0    18.1
 3072  2048  one    8    8  64 128   6   4   4   0   0     3.7
 3072  2048  one   16   16  64 128   5   4   2   0   0     5.5
 3072  2048  one   32   32  64 128   4   4   2   0   0     6.9
 3072  2048  one   64   64  32 128   8   4   1   1   0     5.3
 3072  2048  one  128   64  64 128   7   4   1   0   0     6.4
 3072  2048 head   32   64  32 128   8   4   1   1   0     6.9
 4096  4096  one    8    8  64 128   6   4   4   0   0    12.4
 4096  4096  one   16   16  64 128   8   4   2   0   0    20.8
 4096  4096  one   32   32  64 128   8   4   2   0   0    19.7
 4096  4096  one   64   64  32 128   8   4   1   1   0    15.6
 4096  4096  one  128  128  64  64   8   4   1   0   0    16.9
 4096  4096  sum  128   64  64 128   7   4   1   0   0    21.2
 4096 12288  one    8    8  64 128   6   4   4   0   0    34.0
 4096 12288  one   16   16  64 128   8   4   2   0   0    34.6
 4096 12288  one   32   32  64 128   8   4   2   0   0    35.2
 4096 12288  one   64   64  32 128   8   4   1   1   0    38.2
 4096 12288  one  128   64  64  64   8   4   1   0   0    44.7
 4096 12288  sum  128   64  64 128   7   4   1   1   0    41.7
 4096 14336  one    8    8  64 128   6   4   4   0   0    36.8
 4096 14336  one   16   16  64 128   8   4   2   0   0    40.0
 4096 14336  one   32   32  64 128   8   4   2   0   0    41.0
 4096 14336  one   64   64  32 128   8   4   1   1   0    42.3
 4096 14336  one  128  128  32 128   5   4   1   1   0    50.1
 4096 14336  sum  128   64  64  64   8   4   1   1   0    48.1
 6144  4096  one    8    8  64 128   8   4   1   0   0    18.6
 6144  4096  one   16   16  64 128   8   4   1   0   0    18.1
 6144  4096  one   32   32  64 128   8   4   1   0   0    18.0
 6144  4096  one   64   64  32 128   4   4   1   1   0    19.1
 6144  4096  one  128  128  64 128   4   4   1   0   0    20.9
 6144  4096 head  128  128  64  64   8   8   1   1   0    21.9
 6144  4096 norm    8    8 128 128   3   4   4   0   0    17.2
 6144  4096 norm   16   16 128 128   6   4   2   0   0    16.7
 6144  4096 norm   32   32 128 128   5   4   2   0   0    19.7
 8192  2048 pair    8    8  64 128   6   4   1   0   0    18.9
 8192  2048 pair   16   16  64 128   6   4   1   0   0    20.5
 8192  2048 pair   32   32  64 128   5   4   1   0   0    21.9
 8192  2048 pair   64   64  32 128   3   4   1   1   0    23.7
 8192  2048 pair  128  128  64 128   3   4   1   0   0    27.9
12288  4096 pair    8    8  64 128   3   4   1   0   0    70.9
12288  4096 pair   16   16  64 128   3   4   1   0   0    68.1
12288  4096 pair   32   32  64 128   2   4   1   0   0    71.7
12288  4096 pair   64   64  32 128   7   4   1   1   0    70.0
12288  4096 pair  128  128  64  64   7   4   1   0   0    77.6
14336  4096 pair    8    8  64 128   3   4   1   0   0    76.3
14336  4096 pair   16   16  64 128   3   4   1   0   0    78.4
14336  4096 pair   32   32  64 128   2   4   1   0   0    81.5
14336  4096 pair   64   64  32 128   3   4   1   1   0    80.6
14336  4096 pair  128  128  64 128   3   4   1   0   0    85.0
""",
        "added to a piece, NVIDIA H100 80GB, torch 2.11, triton 3.6, bf16, 2026-11-25 and 26",
    ),
}


def measurement(problem: GemmProblem, target: Target) -> Measured | None:
    """Return what was measured for the problem's N and K in the bucket that holds its m: on this device, or else on the
    one with the nearest bandwidth, the time by the ratio of the two."""
    # What more tokens cost depends on more than bandwidth.
    tables = _tables(target) if problem.m <= MOST_TOKENS else _tables(target)[:1]
    return next((hit for table in tables if (hit := _in_row(table, problem)) is not None), None)


def known(problem: GemmProblem) -> bool:
    """Whether the problem was measured on any device."""
    return any(_in_row(table, problem) is not None for table in CONFIGS.values())


def _in_row(table: Table, problem: GemmProblem) -> Measured | None:
    row = row_of(table, problem)
    return in_bucket(row, tuple(m for m in BUCKETS if m in row or m not in BETWEEN), problem.m)


@cache
def few_tokens(n: int, k: int, target: Target) -> int:
    """Up to so many tokens a 16-bit product streams and takes what follows it into its epilogue, where W is stored as
    [N, K]: `MOST_TOKENS`, or more where it was measured so on the device.

    Args:
        n, k: columns of W, those of both halves of a pair, and depth.
        target: the device.
    """
    table = _tables(target)[0]
    keys = [(n // 2 if kind == "pair" else n, k, kind) for kind in FUSED]
    return max((MOST_TOKENS, *(m for key in keys for m in table.get(key, ()))))


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


def smem_bytes(problem: GemmProblem, config: Config) -> int:
    """Shared memory of the ring: every stage holds one x tile and one W tile per accumulator; 1 KB of barriers."""
    rows = config.tokens + problem.accumulators * config.block_n
    return config.stages * rows * config.block_k * problem.dtype.itemsize + 1024
