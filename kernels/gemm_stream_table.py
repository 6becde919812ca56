"""Configs of the streaming GEMM as they were measured, most in the piece that they are for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from .gemm import GemmProblem, Measured, Table, in_bucket, joined, measured, nearest, row_of
from .gemm_stream_rows import ALONE_H200, H100, H200, MORE_H100, MORE_H200
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


CONFIGS: dict[str, Table] = {
    "h200": joined(
        measured(Config, H200, "added to a piece, NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-26"),
        measured(Config, MORE_H200, "added to a piece, NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-27"),
        measured(Config, ALONE_H200, "alone, NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-27"),
    ),
    "h100": joined(
        measured(Config, H100, "added to a piece, NVIDIA H100 80GB, torch 2.11, triton 3.6, bf16, 2026-11-25 and 26"),
        measured(Config, MORE_H100, "added to a piece, NVIDIA H100 80GB, torch 2.11, triton 3.6, bf16, 2026-11-27"),
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
