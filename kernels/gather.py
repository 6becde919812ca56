"""Gather: whole rows of a table picked by an index tensor: embedding, index_select along the first axis.

    out[row, col] = table[index[row], col]

The body loads its own row's index from `t` (int32 or int64) and widens it: `index * cols` of a vocabulary passes 2**31
soon. An index outside the table is the caller's business: nothing here checks it. Negative indices are not wrapped.
Schedule: `segments.tiles`, one row per program and a tile of its columns. Why its own family: each program starts with
two dependent loads, so a row is cut into tiles over many programs to overlap them, where pointwise would take as few
programs as carry the bytes, and only rows narrower than a warp share a program.
Bytes: one row of the table in and one out, per index. FLOPs: none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl

from .jobs import CompileJob
from .segments import Problem, Segmented, Tile, obstacle, power_of_two, prepare_tiles, tile_jobs
from .target import Target

__all__ = ["CONFIGS", "Config", "choose", "compile_jobs", "prepare", "reference", "supports"]

Config = Tile

# Columns of a tile and warps: while the whole grid fits the device at once, and beyond. Measured: embedding of 4096
# columns, bf16, NVIDIA H200, torch 2.11, triton 3.6, 2026-11-24, in a chain of launches (with PDL):
#      1 row: few 1.36 (0.94) us, many 1.39 (0.94)        64: few 1.62 (1.19), many 1.59 (1.21)
#   8192: few 36.3 (40.4), many 34.3 (33.6), 4096 columns of 8 warps 35.1 (34.3); floor 31.2
CONFIGS: dict[str, tuple[int, int]] = {"few": (1024, 4), "many": (2048, 4)}

# Rows narrower than a warp's 16-byte loads of bf16 share a program until they fill it.
_NARROW = 256


def supports(problem: Problem) -> str | None:
    """Return why this family cannot do the problem, or None."""
    return obstacle(problem)


def choose(problem: Problem, target: Target) -> tuple[Config, str]:
    """Return the tile for the problem and why."""
    few_cols = CONFIGS["few"][0]
    # Eight programs of four warps are half of what a multiprocessor holds.
    regime = "few" if problem.elements <= few_cols * 8 * target.sm_count and not target.interpreted else "many"
    cols, warps = CONFIGS[regime]
    block_c = min(cols, power_of_two(problem.cols))
    block_r = min(max(1, _NARROW // block_c), power_of_two(max(problem.rows, default=1)))
    return Config(block_r, block_c, max(1, warps * block_c // cols)), f"{regime} rows: tiles of {block_c} columns"


def reference(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The sample body in torch.

    Args:
        table: [entries, cols].
        index: [rows], int32 or int64, within the table.
    """
    return table.index_select(0, index)


@triton.jit
def sample(SEGMENT: tl.constexpr, row, col, mask, t):
    """t[2][row] = t[0][t[1][row]] for dense rows of 4096: compile jobs are built with it."""
    # index [R, 1]: `row` is always a valid row, so this needs no mask.
    index = tl.load(t[1] + row).to(tl.int64)
    value = tl.load(t[0] + index * 4096 + col, mask=mask)
    tl.store(t[2] + row * 4096 + col, value, mask=mask)


def prepare(
    body: Any, config: Config, *, pdl: bool = False, leads: bool = False, wide: bool | None = None
) -> Segmented:
    """Return the launch `prepared(t, rows, cols)`.

    Args:
        body: `@triton.jit` function `(SEGMENT: tl.constexpr, row, col, mask, t)`.
        config: the tile.
        pdl, leads: programmatic dependent launch (see launch.py).
        wide: int64 indices; None decides by the sizes of each call (see segments.py).
    """
    return prepare_tiles(body, config, whole=False, pdl=pdl, leads=leads, wide=wide)


def compile_jobs(arch: int) -> Iterable[CompileJob]:
    """One job per entry of CONFIGS; any architecture."""
    configs = [Config(1, cols, warps) for cols, warps in CONFIGS.values()]
    return tile_jobs("gather", sample, ("*bf16", "*i64", "*bf16"), configs, whole=False)
