"""Norm: RMSNorm and LayerNorm of hidden states, with the residual added before and the weight applied after.

    x' = x + residual;  y = x' * rsqrt(mean(x'^2) + eps) * weight            (the body decides; LayerNorm centres first)

Schedules, both over whole rows:
- Decode (few rows): `segments.tiles`, one row per program. Latency is the cost: enough warps that a thread holds one or
  two 16-byte vectors, and programmatic dependent launch.
- Prefill (thousands of rows): `stream`, persistent: a program walks rows with the stride of the grid, and with
  `stages` > 0 the loop is software-pipelined: loads of the next rows are in flight while this one is reduced.
Why its own family: this second schedule, and a table by (rows, columns) instead of by columns alone.
Bytes: x and y (and the residual, read and written) once; the weight once per program from L2. FLOPs: 5 per element.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .jobs import CompileJob
from .rows import MAX_WHOLE
from .segments import ROW_SIZES, Problem, Segmented, Tile, obstacle, power_of_two, prepare_tiles, tile_jobs, tile_of
from .target import Target

__all__ = ["CONFIGS", "Config", "choose", "compile_jobs", "prepare", "reference", "supports"]


@dataclass(frozen=True)
class Config:
    """Schedule of one launch.

    Args:
        block_r: rows a program holds at a time.
        block_c: power of two at or above the columns.
        warps: 1 to 32.
        programs: size of the persistent grid; 0 gives every tile its own program.
        stages: rows in flight of a persistent program; 1 means no software pipeline.
    """

    block_r: int
    block_c: int
    warps: int
    programs: int = 0
    stages: int = 1

    def __str__(self) -> str:
        shape = f"{self.block_r}x{self.block_c} warps {self.warps}"
        return f"{shape} programs {self.programs} stages {self.stages}" if self.programs else shape


# BLOCK_C -> (warps for up to DECODE_ROWS rows, warps for more). Derived, not yet measured: 8 bf16 per thread at decode,
# 16 at prefill, where more rows per multiprocessor hide the latency.
CONFIGS: dict[int, tuple[int, int]] = {
    256: (1, 1),
    512: (2, 2),
    1024: (4, 2),
    2048: (8, 4),
    4096: (16, 8),
    8192: (32, 16),
    MAX_WHOLE: (32, 32),
}
# Two rows on every multiprocessor of the largest device: up to here all programs run at once.
DECODE_ROWS = 256


def supports(problem: Problem) -> str | None:
    """Return why this family cannot do the problem, or None."""
    if problem.cols > MAX_WHOLE:
        return f"{problem.cols} columns; a program holds at most {MAX_WHOLE}"
    return obstacle(problem)


def choose(problem: Problem, target: Target) -> tuple[Config, str]:
    """Return the schedule for the problem and why."""
    width, rows = power_of_two(problem.cols), sum(problem.rows)
    few, many = next(entry for bound, entry in CONFIGS.items() if width <= bound)
    if rows <= DECODE_ROWS and not target.interpreted:
        return Config(1, width, few), f"{rows} rows run at once: {few} warps each, for latency"
    # Narrow rows share a program: 1024 elements keep four warps busy.
    block_r = min(max(1, 1024 // width), power_of_two(max(rows, 1)))
    return Config(block_r, width, min(32, many * block_r)), f"{rows} rows: bandwidth, {many} warps a row"


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


@triton.jit(do_not_specialize=["rows0", "rows1", "rows2", "rows3", "units"])
def stream(
    t,
    rows0,
    rows1,
    rows2,
    rows3,
    units,
    BODY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Persistent: every program walks the tiles of each segment with the stride of the grid."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.int64 if WIDE else tl.int32
    cols = units.to(index) * UNIT
    rows = (rows0, rows1, rows2, rows3)
    for SEGMENT in tl.static_range(SEGMENTS):
        count = tl.cdiv(rows[SEGMENT], BLOCK_R)
        for tile in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=STAGES):
            start_r = tl.cast(tile, index) * BLOCK_R
            row, col, mask = tile_of(start_r, 0, rows[SEGMENT], cols, BLOCK_R, BLOCK_C)
            BODY(SEGMENT, row, col, mask, t)


def prepare(body: Any, config: Config, *, pdl: bool = False, wide: bool | None = None) -> Segmented:
    """Return the launch `prepared(t, rows, cols)`.

    Args:
        body: `@triton.jit` function `(SEGMENT: tl.constexpr, row, col, mask, t)`.
        config: the schedule; `block_c >= cols`.
        pdl: programmatic dependent launch.
        wide: int64 indices; None decides by the sizes of each call (see segments.py).
    """
    if not config.programs:
        tile = Tile(config.block_r, config.block_c, config.warps)
        return prepare_tiles(body, tile, whole=True, pdl=pdl, wide=wide)
    constexprs = {"BODY": body, "BLOCK_R": config.block_r, "BLOCK_C": config.block_c, "STAGES": config.stages}
    return Segmented(stream, constexprs, config.warps, programs=config.programs, pdl=pdl, wide=wide)


def compile_jobs(arch: int) -> Iterable[CompileJob]:
    """One job per entry of CONFIGS and regime, and the persistent schedule; any architecture."""
    tiles = [Tile(1, width, warps) for width, both in CONFIGS.items() for warps in sorted(set(both)) if width <= 16384]
    yield from tile_jobs("norm", sample, ("*bf16",) * 3, tiles, whole=True)
    for config in (Config(1, 4096, 8, programs=132, stages=stages) for stages in (1, 2, 3)):
        shared = {"BODY": sample, "SEGMENTS": 1, "UNIT": 16, "WIDE": False, "PDL": False, "STAGES": config.stages}
        yield CompileJob(
            family="norm",
            label=str(config),
            fn=stream,
            signature={"t": ("*bf16",) * 3, **dict.fromkeys(ROW_SIZES, "i32"), "units": "i32"},
            constexprs=shared | {"BLOCK_R": config.block_r, "BLOCK_C": config.block_c},
            num_warps=config.warps,
            num_stages=1,
            divisible=("t",),
        )
