"""Pointwise: every element of the output is a function of elements at positions computed from its own.

    out[row, col] = body(row, col)

Schedule: `segments.tiles` with tiles that are as square to the problem as its rows allow: a flat problem (rows = (1,),
cols = numel) gets 1 x block, a narrow one (three columns, a million rows) gets many rows of four columns.
Bytes: what the body reads and writes, once. FLOPs: the body's.
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

# Elements of a tile, warps, and tiles per multiprocessor from which the entry is taken: 8 elements per thread, one
# 16-byte load of bf16. Measured: SiLU·mul over 14336 columns, bf16, NVIDIA H200, torch 2.11, triton 3.6, 2026-11-24, in
# a chain of launches (with PDL), by rows:
#       1 row: 1.42 (0.96) us; 256 elements of 1 warp 1.41 (0.93), 1024 of 4 warps 1.40 (0.95)
#      16: 1.67 (1.26); 1024 of 4 warps 1.67 (1.34)
#      64: 2.14 (2.02); 512 of 2 warps 2.40 (2.57), 2048 of 4 warps 2.36 (1.95)
#    2048: 42.5 (42.0), floor 41.0; 2048 of 4 warps 42.8 (42.2), 512 of 2 warps 42.5 (69.7): see segments.pdl_pays
#    8192: 162.2 (161.4), floor 163.8 (at the 4.3 TB/s of a copy)
CONFIGS: tuple[tuple[int, int, int], ...] = ((512, 2, 0), (1024, 4, 4), (2048, 8, 32))

# Share of a tile that may lie outside the problem before a narrower tile is taken.
_WASTE = 0.25


def supports(problem: Problem) -> str | None:
    """Return why this family cannot do the problem, or None."""
    return obstacle(problem)


def choose(problem: Problem, target: Target) -> tuple[Config, str]:
    """Return the tile for the problem and why: as many elements as still give each multiprocessor several programs."""
    elements, warps, per_sm = next(
        entry for entry in reversed(CONFIGS) if problem.elements >= entry[0] * entry[2] * target.sm_count
    )
    block_c = min(elements, power_of_two(problem.cols))
    # 1025 columns in tiles of 1024 would leave half of the programs idle.
    while block_c > 32 and -(-problem.cols // block_c) * block_c > (1 + _WASTE) * problem.cols:
        block_c //= 2
    block_r = min(elements // block_c, power_of_two(max(problem.rows, default=1)))
    return Config(block_r, block_c, warps), f"{elements} elements a tile: at least {per_sm} tiles per multiprocessor"


def reference(*inputs: torch.Tensor) -> torch.Tensor:
    """The sample body in torch: the sum of its inputs, in fp32, rounded once."""
    return torch.stack([x.float() for x in inputs]).sum(0).to(inputs[0].dtype)


@triton.jit
def sample(SEGMENT: tl.constexpr, row, col, mask, t):
    """t[2] = t[0] + t[1] for dense tensors of one row: the smallest body; compile jobs are built with it."""
    x = tl.load(t[0] + col, mask=mask)
    y = tl.load(t[1] + col, mask=mask)
    tl.store(t[2] + col, (x.to(tl.float32) + y.to(tl.float32)).to(t[2].dtype.element_ty), mask=mask)


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
    return tile_jobs(
        "pointwise", sample, ("*bf16",) * 3, [Config(1, elements, warps) for elements, warps, _ in CONFIGS], whole=False
    )
