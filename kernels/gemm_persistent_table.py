"""Configs of the persistent GEMM as they were measured, each with cuBLAS beside it in the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import ceil

from .gemm import GemmProblem, Measured, Table, joined, measured, nearest, row_of
from .gemm_persistent_rows import AGAIN_H100, AGAIN_H200, BETWEEN_H100, BETWEEN_H200, POWERS
from .target import Target

# The m that CONFIGS' rows share, on one device or another; some have rows at others as well.
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
        runs: runs of columns that the epilogue takes one after the other; 1, 2 or 4.
        extra_n: columns beside those, of accumulators of their own, so that a tile may be 128 + 64 wide.
        tail_n: columns of the tiles into which those beyond whole waves are cut, where each program gets one at most;
            0 cuts none. Divides block_n.
        held: the epilogue runs while the next tile is multiplied (`gemm_held`): by a rule, so that no table says it.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    group_m: int = 8
    programs_per_sm: int = 1
    flatten: bool = False
    runs: int = 1
    extra_n: int = 0
    tail_n: int = 0
    held: bool = field(default=False, kw_only=True)

    @property
    def width(self) -> int:
        """Columns of one tile."""
        return self.block_n + self.extra_n

    @property
    def second_n(self) -> int:
        """Columns of W's second descriptor: beside a tile or of a narrower one."""
        return self.extra_n or self.tail_n or self.block_n

    @property
    def tail_split(self) -> int:
        """Into how many narrower tiles one is cut."""
        return self.block_n // self.tail_n if self.tail_n else 1

    def __str__(self) -> str:
        how = f"{' flatten' if self.flatten else ''}{f' in {self.runs} runs' if self.runs > 1 else ''}"
        how += f" tail {self.tail_n}" if self.tail_n else " held" if self.held else ""
        columns = f"{self.block_n}+{self.extra_n}" if self.extra_n else f"{self.block_n}"
        tile = f"{self.block_m}x{columns}x{self.block_k}"
        return f"{tile} stages {self.stages} warps {self.warps} group {self.group_m} x{self.programs_per_sm}{how}"


EVIDENCE = "NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-24"

_POWERS = measured(Config, POWERS, EVIDENCE)
CONFIGS: dict[str, Table] = {
    "h200": joined(
        _POWERS,
        measured(Config, BETWEEN_H200, "NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-26"),
        measured(Config, AGAIN_H200, "NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-26, again"),
    ),
    "h100": joined(
        _POWERS,
        measured(Config, BETWEEN_H100, "NVIDIA H100 80GB, torch 2.11, triton 3.6, bf16, 2026-11-25"),
        measured(Config, AGAIN_H100, "NVIDIA H100 80GB, torch 2.11, triton 3.6, bf16, 2026-11-26"),
    ),
}


@cache
def table_for(target: Target) -> Table:
    """The table of the device that is nearest."""
    return CONFIGS[nearest(CONFIGS, target)[0]]


def as_many_tiles(row: Mapping[int, Measured], m: int, rows: int) -> int | None:
    """Return the smallest measured m, not below, that fills as many tiles of so many rows; None without one."""
    return min((known for known in row if known >= m and ceil(known / rows) == ceil(m / rows)), default=None)


def vendor_us(problem: GemmProblem, target: Target) -> float | None:
    """Return cuBLAS's time beside the measurements: between their m linear in m, beyond them in proportion.

    Not linear across the end of a tile: at 257 tokens 4096x14336 took it 66 us, at 256 48 and at 320 60.
    """
    table = table_for(target)
    row = row_of(table, problem)
    if not row and not problem.paired and problem.n % 2 == 0:
        # Beside a pair, cuBLAS computed the whole product.
        row = row_of(table, replace(problem, n=problem.n // 2, paired=True, summed=0))
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
