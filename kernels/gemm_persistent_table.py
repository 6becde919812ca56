"""Configs of the persistent GEMM as they were measured, each with cuBLAS beside it in the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import ceil

from .gemm import GemmProblem, Measured, Table, joined, measured, nearest, row_of
from .target import Target

# The m of CONFIGS' rows.
BUCKETS = (128, 136, 160, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 2048, 3072, 8192)


@dataclass(frozen=True)
class Config:
    """Tile sizes and pipeline of one launch.

    Args:
        block_m, block_n, block_k: output tile and depth per pipeline step.
        stages: tiles in flight.
        warps: 4 or 8.
        group_m: rows of tiles walked together.
        programs_per_sm: resident programs per multiprocessor.
        flatten: one pipeline over tiles and depth.
        parts: runs of columns that the epilogue takes one after the other; 1, 2 or 4.
        extra_n: columns of a second accumulator beside the first, so that a tile may be 128 + 64 wide; unpaired only.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    group_m: int = 8
    programs_per_sm: int = 1
    flatten: bool = False
    parts: int = 1
    extra_n: int = 0

    @property
    def width(self) -> int:
        """Columns of one tile."""
        return self.block_n + self.extra_n

    def __str__(self) -> str:
        how = f"{' flatten' if self.flatten else ''}{f' in {self.parts} parts' if self.parts > 1 else ''}"
        tile = f"{self.block_m}x{self.width}x{self.block_k}"
        return f"{tile} stages {self.stages} warps {self.warps} group {self.group_m} x{self.programs_per_sm}{how}"


EVIDENCE = "NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-24"

# Each row is the best at exactly that m of what `tools/tune_gemm.py` tried; between them `choose` weighs the rows of an
# N and K by the waves that their configs need.
POWERS = """
    N     K kind    m   bm  bn  bk  st  wp  gm  ps  fl  pt  ex      us  cuBLAS
 2048  2048  one  128   64  64 128   6   4   8   1   0   1   0     6.0     6.8
 2048  2048  one  256   64  64 128   6   4   8   1   0   1   0     6.2     6.3
 2048  2048  one  512   64 128 128   4   4   8   1   0   1   0     8.5     8.7
 2048  2048  one 1024   64 256  64   5   4   8   1   0   1   0    13.1    12.9
 2048  2048  one 2048  128 256  64   3   8  16   1   1   1   0    23.1    23.1
 2048  2048  one 8192  128 256  64   4   8   8   1   1   2   0   104.7   106.1
 2048  8192  one  128   64  64 128   6   4   8   1   0   1   0    16.8    16.4
 2048  8192  one  256   64  64 128   6   4   8   1   0   1   0    17.6    21.2
 2048  8192  one  512   64 128  64   8   4   8   1   0   1   0    27.5    30.3
 2048  8192  one 1024  128 128  64   6   8   8   1   0   1   0    47.4    46.1
 2048  8192  one 2048  128 256  64   3   8   8   1   1   1   0    87.6    87.0
 2048  8192  one 8192  128 256  64   3   8   8   1   0   1   0   389.9   402.1
 3072  2048  one  128   64  64 128   6   4   8   1   0   1   0     6.7     7.0
 3072  2048  one  256   64 128 128   4   4   8   1   0   1   0     8.4     7.5
 3072  2048  one  512   64 128  64   6   4   8   1   0   1  64    12.0    10.5
 3072  2048  one 1024  128 128  64   4   8   8   1   0   1  64    19.9    18.5
 3072  2048  one 2048  128 128  64   5   8   8   1   1   1   0    43.7    41.1
 3072  2048  one 8192  128 256  64   3   8   8   1   1   1   0   154.7   154.4
 4096  4096  one  128   64  64 128   6   4   8   1   0   1   0    11.6    13.3
 4096  4096  one  256   64 128  64   8   4   8   1   0   1   0    15.0    16.5
 4096  4096  one  512  128 128  64   6   8   8   1   0   1   0    26.2    26.0
 4096  4096  one 1024  128 256  64   4   8   8   1   1   1   0    49.6    49.7
 4096  4096  one 2048  128 256  64   4   8   8   1   1   1   0   102.6   103.2
 4096  4096  one 8192  128 256  64   4   8   8   1   1   1   0   398.2   396.6
 4096 12288  one  128   64  64 128   6   4   8   1   0   1   0    30.9    33.0
 4096 12288  one  256   64 128  64   8   4   8   1   0   1   0    42.0    42.0
 4096 12288  one  512  128 128  64   6   8   8   1   0   1   0    70.0    68.2
 4096 12288  one 1024  128 256  64   4   8   8   1   1   1   0   134.8   134.8
 4096 12288  one 2048  128 256  64   4   8   8   1   1   1   0   270.6   270.4
 4096 12288  one 8192  128 256  64   3   8   8   1   0   1   0  1051.3  1097.3
 4096 14336  one  128   64  64 128   6   4   8   1   0   1   0    34.7    36.9
 4096 14336  one  256   64 128  64   8   4   8   1   0   1   0    47.5    47.7
 4096 14336  one  512  128 128  64   6   8   8   1   0   1   0    85.2    85.1
 4096 14336  one 1024  128 256  64   4   8   8   1   1   1   0   147.3   147.6
 4096 14336  one 2048  128 256  64   4   8   8   1   1   1   0   320.5   320.3
 4096 14336  one 8192  128 256  64   3   8  16   1   1   1   0  1338.8  1343.0
 6144  4096  one  128   64 128  64   8   4   8   1   0   1   0    17.1    16.4
 6144  4096  one  256   64 128  64   6   4   8   1   0   1  64    22.9    21.0
 6144  4096  one  512  128 128  64   4   8   8   1   0   1  64    38.4    35.8
 6144  4096  one 1024  128 128  64   6   8   8   1   0   1   0    73.8    69.6
 6144  4096  one 2048  128 256  64   4   8   8   1   1   1   0   135.2   136.2
 6144  4096  one 8192  128 256  64   4   8   8   1   1   1   0   597.8   593.6
 8192  2048 pair  128   64  64  64   4   4   8   2   0   1   0    20.5    20.9
 8192  2048 pair  256  128 128  64   4   8   8   1   1   2   0    26.1    26.0
 8192  2048 pair  512  128 128  64   4   8   8   1   1   2   0    50.3    49.1
 8192  2048 pair 1024  128 128  64   4   8   8   1   1   2   0   108.6   107.6
 8192  2048 pair 2048  128 128  64   4   8   8   1   1   2   0   190.2   185.2
 8192  2048 pair 8192  128 128  64   4   8   8   1   1   2   0   830.9   821.0
12288  4096 pair  128   64  64 128   4   4   8   1   0   1   0    65.1    54.7
12288  4096 pair  256  128  64  64   5   8   8   1   1   1   0    86.4    75.1
12288  4096 pair  512  128 128  64   4   8   8   1   1   2   0   136.3   136.5
12288  4096 pair 1024  128 128  64   3   8   8   1   1   2   0   265.8   265.6
12288  4096 pair 2048  128 128  64   4   8   8   1   1   2   0   563.6   553.1
12288  4096 pair 8192  128 128  64   3   8   8   1   1   1   0  2701.5  2678.5
14336  4096 pair  128  128  64  64   4   4   8   2   0   1   0    71.5    66.8
14336  4096 pair  256  128 128  64   4   8   8   1   1   2   0    93.8    96.5
14336  4096 pair  512   64 128  64   5   4   8   1   0   1   0   175.9   158.1
14336  4096 pair 1024  128 128  64   3   8   8   1   1   2   0   305.5   304.9
14336  4096 pair 2048  128 128  64   4   8   8   1   1   2   0   699.4   680.0
14336  4096 pair 8192  128 128  64   3   8   8   1   1   2   0  2837.0  2818.5
"""
# Sizes between, where cuBLAS takes now one, now another kernel, at times for the same problem, and loses up to a factor
# of two by it. On the H100 what it needed in a quarter of the turns stands here: from 1464 timings by `--families
# gemm_persistent,gemm_vendor --m 192,256,320,384,448,512,640,768`, and 490 by the same with `--m 136,160`. On the H200
# the median, and the best of the configs that stood here for N and K: 630 timings by `--known --m 136,160,192,320,384,
# 448,640,768,3072`.
BETWEEN_H100 = """
    N     K kind    m   bm  bn  bk  st  wp  gm  ps  fl  pt  ex      us  cuBLAS
 2048  2048  one  136   64  64 128   6   4   8   1   0   1   0     8.5     7.1
 2048  2048  one  160   64  64 128   6   4   8   1   0   1   0     7.6     7.1
 2048  8192  one  136   64 128  64   8   4   8   1   0   1   0    24.6    19.5
 2048  8192  one  160   64  64 128   6   4   8   1   0   1   0    22.6    20.6
 2048  8192  one  192   64  64 128   6   4   8   1   0   1   0    20.0    18.2
 2048  8192  one  320   64 128  64   8   4   8   1   0   1   0    25.7    30.6
 2048  8192  one  384   64 128  64   8   4   8   1   0   1   0    26.3    30.3
 2048  8192  one  448   64 128  64   8   4   8   1   0   1   0    27.4    27.1
 2048  8192  one  640   64 128  64   6   4   8   1   0   1  64    39.8    34.2
 2048  8192  one  768   64 128  64   6   4   8   1   0   1  64    40.8    45.6
 3072  2048  one  136   64 128  64   8   4   8   1   0   1   0     9.1     7.7
 3072  2048  one  160   64 128  64   8   4   8   1   0   1   0     9.2     7.7
 3072  2048  one  192   64 128 128   4   4   8   1   0   1   0    10.2     8.4
 3072  2048  one  320   64 128  64   8   4   8   1   0   1   0     9.4    11.7
 3072  2048  one  384   64 128  64   6   4   8   1   0   1  64    12.1    10.2
 3072  2048  one  448   64 128  64   6   4   8   1   0   1  64    12.2    10.5
 3072  2048  one  640  128 128  64   5   8   8   1   1   1   0    13.8    13.1
 3072  2048  one  768  128 128  64   4   8   8   1   0   1  64    19.6    14.8
 4096  4096  one  136   64 128 128   4   4   8   1   0   1   0    18.6    15.7
 4096  4096  one  160   64 128  64   8   4   8   1   0   1   0    17.1    15.1
 4096  4096  one  192   64 128  64   8   4   8   1   0   1   0    17.5    15.7
 4096  4096  one  320   64 128  64   6   4   8   1   0   1  64    21.9    18.7
 4096  4096  one  384   64 128  64   6   4   8   1   0   1  64    22.8    20.1
 4096  4096  one  448  128 128  64   6   8   8   1   0   1   0    24.9    28.1
 4096  4096  one  640  128 128  64   4   8   8   1   0   1  64    38.5    29.5
 4096  4096  one  768  128 128  64   4   8   8   1   0   1  64    41.2    36.0
 4096 12288  one  136   64 128 128   4   4   8   1   0   1   0    50.7    46.7
 4096 12288  one  160   64 128 128   4   4   8   1   0   1   0    48.9    47.5
 4096 14336  one  136   64 128  64   6   4   8   1   0   1  64    62.3    51.4
 4096 14336  one  160   64 128 128   4   4   8   1   0   1   0    57.1    52.6
 4096 14336  one  192   64 128  64   8   4   8   1   0   1   0    52.2    48.5
 4096 14336  one  320   64 128  64   6   4   8   1   0   1  64    69.6    60.1
 4096 14336  one  384  128 128  64   6   8   8   1   0   1   0    74.3    80.8
 4096 14336  one  448  128 128  64   6   8   8   1   0   1   0    79.4    77.3
 4096 14336  one  640  128 128  64   4   8   8   1   0   1  64   132.1    96.9
 4096 14336  one  768  128 128  64   5   8   8   1   0   1  64   133.7   117.7
 6144  4096  one  136   64 128  64   6   4   8   1   0   1  64    24.6    22.0
 6144  4096  one  160   64 128  64   6   4   8   1   0   1  64    24.9    22.5
 6144  4096  one  192   64 128  64   6   4   8   1   0   1  64    25.3    22.7
 6144  4096  one  320   64 256  64   5   4   8   1   0   1   0    28.5    32.9
 6144  4096  one  384  128 128  64   5   8   8   1   0   1  64    36.5    28.1
 6144  4096  one  448  128 128  64   5   8   8   1   0   1  64    38.0    35.0
 6144  4096  one  640  128 256  64   4   8   8   1   1   2   0    45.5    45.4
 6144  4096  one  768   64 128  64   6   4   8   1   0   1  64    67.0    50.2
 8192  2048 pair  136  128 128  64   4   8   8   1   1   2   0    34.1    28.6
 8192  2048 pair  160   64  64 128   4   4   8   1   0   1   0    33.2    29.6
 8192  2048 pair  192  128 128  64   4   8   8   1   1   2   0    32.6    30.1
 8192  2048 pair  320   64 128  64   5   4   8   1   0   1   0    45.5    33.7
 8192  2048 pair  384  128  64  64   6   8   8   1   0   1   0    43.8    38.8
 8192  2048 pair  448  128 128  64   3   8   8   1   1   2   0    52.4    48.2
 8192  2048 pair  640  128  64  64   5   8   8   1   1   1   0    71.2    62.2
 8192  2048 pair  768  128 128  64   3   8  16   1   1   1   0    74.5    75.4
12288  4096 pair  136   64 128  64   5   4   8   1   0   1   0    94.5    78.0
12288  4096 pair  160   64 128  64   5   4   8   1   0   1   0    94.9    79.0
12288  4096 pair  192   64  64  64   8   4   8   1   0   1   0    93.5    80.5
12288  4096 pair  320   64 128  64   5   4   8   1   0   1   0   116.4    96.7
12288  4096 pair  384  128  64  64   6   8   8   1   0   1   0   135.0   107.1
12288  4096 pair  448  128 128  64   3   8   8   1   1   2   0   153.9   148.2
12288  4096 pair  640  128 128  64   4   8   8   1   1   1   0   181.6   175.8
12288  4096 pair  768  128  64  64   6   8   8   1   0   1   0   222.3   201.1
14336  4096 pair  136   64 128  64   5   4   8   1   0   1   0    98.5    92.6
14336  4096 pair  160   64 128  64   5   4   8   1   0   1   0    98.9    93.7
14336  4096 pair  192   64 128  64   5   4   8   1   0   1   0    99.3    93.3
14336  4096 pair  320   64 128  64   5   4   8   1   0   1   0   140.4   118.8
14336  4096 pair  384  128 128  64   3   8   8   1   1   2   0   156.5   133.6
14336  4096 pair  448   64 128  64   5   4   8   1   0   1   0   162.0   288.7
14336  4096 pair  640  128 128  64   3   8   8   1   1   1   0   227.7   211.9
14336  4096 pair  768  128 128  64   3   8   8   1   1   1   0   266.4   249.3
"""
BETWEEN_H200 = """
    N     K kind    m   bm  bn  bk  st  wp  gm  ps  fl  pt  ex      us  cuBLAS
 2048  2048  one  136  64  64 128   6   4   8   1   0   1   0     8.1     8.3
 2048  2048  one  160  64  64 128   6   4   8   1   0   1   0     6.8     6.6
 2048  2048  one  192  64  64 128   6   4   8   1   0   1   0     6.8     6.7
 2048  2048  one  320  64 128 128   4   4   8   1   0   1   0     8.7     7.0
 2048  2048  one  384  64 128 128   4   4   8   1   0   1   0     9.2     7.3
 2048  2048  one  448  64 128 128   4   4   8   1   0   1   0     9.1     9.0
 2048  2048  one  640  64 256  64   5   4   8   1   0   1   0    13.1     9.6
 2048  2048  one  768  64 256  64   5   4   8   1   0   1   0    13.2    10.7
 2048  2048  one 3072  64 256  64   5   4   8   1   0   1   0    39.8    36.9
 2048  8192  one  136  64  64 128   6   4   8   1   0   1   0    18.2    18.5
 2048  8192  one  160  64  64 128   6   4   8   1   0   1   0    17.9    16.2
 2048  8192  one  192  64  64 128   6   4   8   1   0   1   0    18.7    22.8
 2048  8192  one  320  64 128  64   8   4   8   1   0   1   0    23.6    23.5
 2048  8192  one  384  64 128  64   8   4   8   1   0   1   0    24.2    28.9
 2048  8192  one  448  64 128  64   8   4   8   1   0   1   0    26.4    26.0
 2048  8192  one  640  64 128  64   6   4   8   1   0   1  64    41.2    30.6
 2048  8192  one  768  64 128  64   6   4   8   1   0   1  64    42.9    39.0
 2048  8192  one 3072 128 128  64   6   8   8   1   0   1   0   155.2   153.2
 3072  2048  one  136  64 128  64   8   4   8   1   0   1   0     8.9     7.2
 3072  2048  one  160  64 128  64   8   4   8   1   0   1   0     8.6     7.2
 3072  2048  one  192  64 128  64   8   4   8   1   0   1   0     8.7     8.1
 3072  2048  one  320  64 128  64   8   4   8   1   0   1   0     8.9    10.8
 3072  2048  one  384  64 128  64   6   4   8   1   0   1  64    12.1    11.1
 3072  2048  one  448  64 128  64   6   4   8   1   0   1  64    12.3    14.0
 3072  2048  one  640 128 128  64   5   8   8   1   1   1   0    13.7    13.3
 3072  2048  one  768 128 128  64   4   8   8   1   0   1  64    19.9    14.6
 3072  2048  one 3072 128 128  64   5   8   8   1   1   1   0    64.2    55.2
 4096  4096  one  136  64 128  64   8   4   8   1   0   1   0    14.6    15.0
 4096  4096  one  160  64 128  64   8   4   8   1   0   1   0    14.7    18.4
 4096  4096  one  192  64 128  64   8   4   8   1   0   1   0    14.8    17.1
 4096  4096  one  320  64 128  64   6   4   8   1   0   1  64    21.2    18.9
 4096  4096  one  384  64 128  64   6   4   8   1   0   1  64    21.7    22.4
 4096  4096  one  448 128 128  64   6   8   8   1   0   1   0    24.4    23.5
 4096  4096  one  640 128 128  64   4   8   8   1   0   1  64    39.3    29.5
 4096  4096  one  768 128 128  64   4   8   8   1   0   1  64    42.0    37.5
 4096  4096  one 3072 128 256  64   4   8   8   1   1   1   0   144.5   143.3
 4096 12288  one  136  64 128  64   8   4   8   1   0   1   0    40.0    35.7
 4096 12288  one  160  64 128  64   8   4   8   1   0   1   0    38.3    36.0
 4096 12288  one  192  64 128  64   8   4   8   1   0   1   0    38.5    51.4
 4096 12288  one  320 128 128  64   6   8   8   1   0   1   0    64.5    46.6
 4096 12288  one  384 128 128  64   6   8   8   1   0   1   0    70.7    56.3
 4096 12288  one  448 128 128  64   6   8   8   1   0   1   0    72.6    72.0
 4096 12288  one  640  64 128  64   8   4   8   1   0   1   0   124.9    93.9
 4096 12288  one  768  64 128  64   8   4   8   1   0   1   0   122.2   110.2
 4096 12288  one 3072 128 256  64   4   8   8   1   1   1   0   445.6   444.4
 4096 14336  one  136  64 128  64   8   4   8   1   0   1   0    43.3    38.7
 4096 14336  one  160  64 128  64   8   4   8   1   0   1   0    44.5    40.1
 4096 14336  one  192  64 128  64   8   4   8   1   0   1   0    45.7    44.9
 4096 14336  one  320  64 128  64   6   4   8   1   0   1  64    66.5    54.2
 4096 14336  one  384  64 128  64   6   4   8   1   0   1  64    70.0    64.0
 4096 14336  one  448 128 128  64   6   8   8   1   0   1   0    87.6    87.1
 4096 14336  one  640  64 128  64   8   4   8   1   0   1   0   150.7   113.3
 4096 14336  one  768  64 128  64   8   4   8   1   0   1   0   153.8   140.1
 4096 14336  one 3072 128 256  64   4   8   8   1   1   1   0   508.0   507.1
 6144  4096  one  136  64 128  64   6   4   8   1   0   1  64    23.4    18.2
 6144  4096  one  160  64 128  64   6   4   8   1   0   1  64    22.1    18.3
 6144  4096  one  192  64 128  64   6   4   8   1   0   1  64    22.4    22.7
 6144  4096  one  320  64 256  64   5   4   8   1   0   1   0    25.8    32.4
 6144  4096  one  384 128 128  64   4   8   8   1   0   1  64    36.6    27.2
 6144  4096  one  448 128 128  64   4   8   8   1   0   1  64    38.5    34.6
 6144  4096  one  640 128 256  64   4   8   8   1   1   2   0    44.4    44.3
 6144  4096  one  768  64 128  64   6   4   8   1   0   1  64    63.0    49.7
 6144  4096  one 3072  64 256  64   5   4   8   1   0   1   0   227.4   212.9
 8192  2048 pair  136 128 128  64   4   8   8   1   1   2   0    26.5    21.5
 8192  2048 pair  160 128 128  64   4   8   8   1   1   2   0    26.5    21.8
 8192  2048 pair  192 128 128  64   4   8   8   1   1   2   0    26.5    23.3
 8192  2048 pair  320 128  64  64   5   8   8   1   1   1   0    43.0    31.8
 8192  2048 pair  384 128  64  64   5   8   8   1   1   1   0    44.4    39.4
 8192  2048 pair  448 128 128  64   4   8   8   1   1   2   0    48.6    44.6
 8192  2048 pair  640 128  64  64   5   8   8   1   1   1   0    71.2    63.6
 8192  2048 pair  768 128 128  64   4   8   8   1   1   2   0    70.9    71.3
 8192  2048 pair 3072 128 128  64   3   8   8   1   1   2   0   301.1   289.5
12288  4096 pair  136  64  64  64   8   4   8   1   0   1   0    78.4    56.8
12288  4096 pair  160  64  64  64   8   4   8   1   0   1   0    84.3    58.6
12288  4096 pair  192 128  64  64   5   8   8   1   1   1   0    88.4    63.9
12288  4096 pair  320  64 128  64   5   4   8   1   0   1   0   109.7    92.6
12288  4096 pair  384 128  64  64   5   8   8   1   1   1   0   139.6   113.7
12288  4096 pair  448 128 128  64   4   8   8   1   1   2   0   153.9   152.6
12288  4096 pair  640 128 128  64   4   8   8   1   1   2   0   185.6   174.9
12288  4096 pair  768 128  64  64   6   8   8   1   0   1   0   224.6   203.3
12288  4096 pair 3072 128 128  64   3   8   8   1   1   2   0   918.5   881.2
14336  4096 pair  136  64 128  64   5   4   8   1   0   1   0    83.1    66.0
14336  4096 pair  160  64 128  64   5   4   8   1   0   1   0    85.2    68.0
14336  4096 pair  192  64 128  64   5   4   8   1   0   1   0    84.9    77.3
14336  4096 pair  320  64 128  64   5   4   8   1   0   1   0   140.2   123.1
14336  4096 pair  384 128 128  64   4   8   8   1   1   2   0   156.8   133.1
14336  4096 pair  448  64 128  64   5   4   8   1   0   1   0   176.8   300.9
14336  4096 pair  640 128 128  64   4   8   8   1   1   2   0   219.1   202.6
14336  4096 pair  768 128 128  64   4   8   8   1   1   2   0   261.5   244.1
14336  4096 pair 3072 128 128  64   4   8   8   1   1   2   0  1044.7  1038.8
"""
_POWERS = measured(Config, POWERS, EVIDENCE)
CONFIGS: dict[str, Table] = {
    "h200": joined(_POWERS, measured(Config, BETWEEN_H200, "NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-26")),
    "h100": joined(
        _POWERS, measured(Config, BETWEEN_H100, "NVIDIA H100 80GB, torch 2.11, triton 3.6, bf16, 2026-11-25")
    ),
}


@cache
def table_for(target: Target) -> Table:
    """The table of the device that is nearest."""
    return CONFIGS[nearest(CONFIGS, target)[0]]


def row_or_pairs(problem: GemmProblem, target: Target) -> Mapping[int, Measured]:
    """Return what was measured for this N and K, or for the pair that is the same product: cuBLAS computed the whole
    beside it, and a pair's epilogue adds little to ours."""
    table, half = table_for(target), problem.n // 2
    pairs = replace(problem, n=half, paired=True, pair_offset=half, halves=0, part=0)
    return row_of(table, problem) or ({} if problem.paired or problem.n % 2 else row_of(table, pairs))


def as_many_tiles(row: Mapping[int, Measured], m: int, rows: int) -> int | None:
    """Return the smallest measured m, not below, that fills as many tiles of so many rows; None without one."""
    return min((known for known in row if known >= m and ceil(known / rows) == ceil(m / rows)), default=None)


def vendor_us(problem: GemmProblem, target: Target) -> float | None:
    """Return cuBLAS's time beside the measurements: between their m linear in m, beyond them in proportion.

    Not linear across the end of a tile: at 257 tokens 4096x14336 took it 66 us, at 256 48 and at 320 60.
    """
    row = row_or_pairs(problem, target)
    if not row:
        return None
    below = max((m for m in row if m <= problem.m), default=None)
    above = min((m for m in row if m >= problem.m), default=None)
    if below is None or above is None:
        last = row[below or above]  # type: ignore[index]
        return last.vendor_us * (problem.m / below if below else 1.0)
    share = (problem.m - below) / (above - below) if above > below else 0.0
    if as_many_tiles(row, problem.m, 128) == above and ceil(below / 128) < ceil(problem.m / 128):
        share = 1.0
    return row[below].vendor_us * (1 - share) + row[above].vendor_us * share
