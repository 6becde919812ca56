"""Norm: RMSNorm and LayerNorm of hidden states, with the residual added before and the weight applied after.

    x' = x + residual;  y = x' * rsqrt(mean(x'^2) + eps) * weight            (the body decides; LayerNorm centres first)

Schedule: `segments.tiles` over whole rows, a program per row: 8 columns per thread (one 16-byte load of bf16) up to
2048 columns, 16 from 4096 on, at decode and prefill alike. A persistent grid whose programs walk the rows, with and
without a software pipeline, took 2 to 45 % longer at prefill (2048 and 8192 rows of 2048 and 4096; H200, 2026-11-24):
not here.
Why its own family: this table is measured with the norm's own traffic; rows has to guess for any body of any width.
Bytes: x and y (and the residual, read and written) once; the weight once per program from L2. FLOPs: 5 per element.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl

from .jobs import CompileJob
from .rows import MAX_WHOLE
from .segments import Problem, Segmented, Tile, obstacle, power_of_two, prepare_tiles, tile_jobs
from .target import Target

__all__ = ["CONFIGS", "Config", "choose", "compile_jobs", "prepare", "reference", "supports"]

Config = Tile

# BLOCK_C -> warps of a row. Measured: residual + RMSNorm, bf16, NVIDIA H200, torch 2.11, triton 3.6, 2026-11-24, in a
# chain of launches (with PDL), for 1 / 64 / 2048 / 8192 rows; 8192 rows have a floor of 31.2 and 62.4 us:
#   2048: 8 warps 1.41 (1.16) / 1.69 (1.35) / 10.3 (9.8) / 34.2 (33.5) us; 4 warps 1.60 / 1.70 / 10.5 / 34.4
#   4096: 8 warps 1.72 (1.32) / 1.94 (1.46) / 18.7 (18.1) / 66.6 (66.0) us; 16 warps 1.74 / 1.97 at 1 and 64 rows
# The other widths are derived from these: 8 columns per thread below, 16 above.
CONFIGS: dict[int, int] = {256: 1, 512: 2, 1024: 4, 2048: 8, 4096: 8, 8192: 16, MAX_WHOLE: 32}


def supports(problem: Problem) -> str | None:
    """Return why this family cannot do the problem, or None."""
    if problem.cols > MAX_WHOLE:
        return f"{problem.cols} columns; a program holds at most {MAX_WHOLE}"
    return obstacle(problem)


def choose(problem: Problem, target: Target) -> tuple[Config, str]:
    """Return the tile for the problem and why."""
    width, rows = power_of_two(problem.cols), sum(problem.rows)
    warps = next(warps for bound, warps in CONFIGS.items() if width <= bound)
    # Rows narrower than 1024 share a program of four warps, as long as every multiprocessor has one.
    block_r = min(max(1, 1024 // width), power_of_two(max(1, rows // target.sm_count)))
    return Config(block_r, width, max(1, min(32, warps * block_r))), f"{width} columns: {warps} warps a row"


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    """The sample body in torch: RMSNorm of x (+ residual, rounded to x's dtype), in fp32, rounded once.

    Args:
        x, residual: [rows, cols].
        weight: [cols].
        eps: added to the mean square.
    """
    h = (x if residual is None else x + residual).float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


@triton.jit
def sample(SEGMENT: tl.constexpr, row, col, mask, t):
    """t[2] = rms_norm(t[0]) * t[1] for dense rows of 4096, eps 1e-5: compile jobs are built with it."""
    x = tl.load(t[0] + row * 4096 + col, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(t[1] + col, mask=col < 4096, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / 4096 + 1e-5)
    tl.store(t[2] + row * 4096 + col, (x * scale * weight).to(t[2].dtype.element_ty), mask=mask)


def prepare(
    body: Any, config: Config, *, pdl: bool = False, leads: bool = False, wide: bool | None = None
) -> Segmented:
    """Return the launch `prepared(t, rows, cols)`.

    Args:
        body: `@triton.jit` function `(SEGMENT: tl.constexpr, row, col, mask, t)`.
        config: the tile; `block_c >= cols`.
        pdl, leads: programmatic dependent launch (see launch.py).
        wide: int64 indices; None decides by the sizes of each call (see segments.py).
    """
    return prepare_tiles(body, config, whole=True, pdl=pdl, leads=leads, wide=wide)


def compile_jobs(arch: int) -> Iterable[CompileJob]:
    """One job per entry of CONFIGS that keeps a row of fp32 in registers; any architecture."""
    configs = [Config(1, min(width, 16384), warps) for width, warps in CONFIGS.items()]
    return tile_jobs("norm", sample, ("*bf16",) * 3, configs, whole=True)
