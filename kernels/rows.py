"""Rows: reductions along the last axis and whatever is computed from them, softmax, mean, argmax, top-1, log-sum-exp.

    out[row, col] = body(row, col, reductions of the row)

Two schedules:
- Whole rows (`segments.tiles`, WHOLE): a program holds BLOCK_R complete rows; the body reduces with `tl.sum(…, axis=1)`
  over masked loads of its choice. One read, one write.
- Looped: a program walks its rows BLOCK_C columns at a time, once per pass and once more to store. A `Looped` body
  says what a pass accumulates. Each pass reads the row again (rows beyond the L2's share: from memory).
Why its own family: any reduction, any width. norm has the shapes of a transformer's hidden state in its table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .jobs import CompileJob
from .segments import ROW_SIZES, Problem, Segmented, Tile, obstacle, power_of_two, prepare_tiles, tile_jobs, tile_of
from .target import Target

__all__ = ["CONFIGS", "Config", "Looped", "choose", "compile_jobs", "prepare", "reference", "supports"]

Config = Tile

# Columns up to which a program may hold a row: beyond, even packed bf16 exceeds the 256 KB of an SM's registers.
MAX_WHOLE = 131072
# From here on a looped body is the better one: 1024 threads have 64 registers each, a row of fp32 then takes half.
LOOP_FROM = 32768

# BLOCK_C of whole rows -> rows per program when there are many, warps. A warp reduces up to 256 columns alone; beyond,
# 8 to 16 columns per thread keep 16-byte loads. Derived from norm's measurements; not measured with other bodies.
CONFIGS: dict[int, tuple[int, int]] = {
    64: (16, 4),
    128: (8, 4),
    256: (4, 4),
    512: (2, 4),
    1024: (1, 4),
    2048: (1, 8),
    4096: (1, 8),
    8192: (1, 16),
    16384: (1, 32),
    MAX_WHOLE: (1, 32),
}
# Tile of the looped schedule: 8 columns per thread and pass step. Derived, not yet measured.
LOOPED = Config(1, 8192, 32)


@dataclass(frozen=True)
class Looped:
    """A body for rows too wide to hold: `passes` reductions one after the other, then the store.

    All four are `@triton.jit` functions. R and C are the tile's sizes; `acc` is a tensor [R, C] or a tuple of them;
    `scalars` is a tuple with what `finish` returned for each pass so far.

    Args:
        passes: how many reductions; 0 only stores.
        init: `(PASS: tl.constexpr, R: tl.constexpr, C: tl.constexpr) -> acc`, the accumulator's start.
        partial: `(PASS, SEGMENT, row, col, mask, t, acc, scalars) -> acc`, one step, elementwise; types stay.
        finish: `(PASS, acc) -> scalar`, [R, 1] or a tuple of them.
        store: `(SEGMENT, row, col, mask, t, scalars)`. For every column tile; what has one value per row is stored
            under `mask & (col == 0)`.
    """

    passes: int
    init: Any
    partial: Any
    finish: Any
    store: Any


def supports(problem: Problem) -> str | None:
    """Return why this family cannot do the problem, or None."""
    return obstacle(problem)


def choose(problem: Problem, target: Target, *, looped: bool = False) -> tuple[Config, str]:
    """Return the tile for the problem and why; `looped` (always beyond MAX_WHOLE columns): for a `Looped` body."""
    width = power_of_two(problem.cols)
    if looped or width > MAX_WHOLE:
        return Config(LOOPED.block_r, min(LOOPED.block_c, width), LOOPED.warps), f"looped over {problem.cols} columns"
    many, warps = next(entry for bound, entry in CONFIGS.items() if width <= bound)
    if width < min(CONFIGS):
        many *= min(CONFIGS) // width
    # Fewer rows per program rather than idle multiprocessors.
    spread = power_of_two(max(1, sum(problem.rows) // (2 * target.sm_count)))
    block_r = min(many, spread)
    warps = max(1, min(warps, block_r * width // 256))
    return Config(block_r, width, warps), f"whole rows, {block_r} per program of {warps} warps"


def reference(x: torch.Tensor) -> torch.Tensor:
    """The sample body in torch: softmax over the last axis, in fp32, rounded once."""
    return torch.softmax(x.float(), -1).to(x.dtype)


@triton.jit
def sample(SEGMENT: tl.constexpr, row, col, mask, t):
    """t[1] = softmax(t[0]) for dense rows of 4096: the smallest real body; compile jobs are built with it."""
    x = tl.load(t[0] + row * 4096 + col, mask=mask, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
    y = e / tl.sum(e, axis=1, keep_dims=True)
    tl.store(t[1] + row * 4096 + col, y.to(t[1].dtype.element_ty), mask=mask)


@triton.jit
def _walk(
    SEGMENT: tl.constexpr,
    start_r,
    rows,
    cols,
    t,
    PASSES: tl.constexpr,
    INIT: tl.constexpr,
    PARTIAL: tl.constexpr,
    FINISH: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    scalars = ()
    for PASS in tl.static_range(PASSES):
        acc = INIT(PASS, BLOCK_R, BLOCK_C)
        for start_c in range(0, cols, BLOCK_C):
            row, col, mask = tile_of(start_r, start_c, rows, cols, BLOCK_R, BLOCK_C)
            acc = PARTIAL(PASS, SEGMENT, row, col, mask, t, acc, scalars)
        scalars = scalars + (FINISH(PASS, acc),)  # type: ignore[assignment]
    for start_c in range(0, cols, BLOCK_C):
        row, col, mask = tile_of(start_r, start_c, rows, cols, BLOCK_R, BLOCK_C)
        STORE(SEGMENT, row, col, mask, t, scalars)


@triton.jit(do_not_specialize=["rows0", "rows1", "rows2", "rows3", "units"])
def looped(
    t,
    rows0,
    rows1,
    rows2,
    rows3,
    units,
    SEGMENTS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
    LEADS: tl.constexpr,
    PASSES: tl.constexpr,
    INIT: tl.constexpr,
    PARTIAL: tl.constexpr,
    FINISH: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_R rows per program, BLOCK_C columns at a time."""
    if PDL:
        # A GEMM after this one asks for its weights while this one still waits.
        if not LEADS:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if LEADS:
            tl.extra.cuda.gdc_launch_dependents()
    index = tl.int64 if WIDE else tl.int32
    cols = units.to(index) * UNIT
    rows = (rows0, rows1, rows2, rows3)
    local = tl.program_id(0)
    for SEGMENT in tl.static_range(SEGMENTS):
        count = tl.cdiv(rows[SEGMENT], BLOCK_R)
        if SEGMENTS == 1 or (local >= 0) & (local < count):
            start_r = local.to(index) * BLOCK_R
            _walk(
                SEGMENT, start_r, rows[SEGMENT], cols, t, PASSES, INIT, PARTIAL, FINISH, STORE, BLOCK_R, BLOCK_C
            )  # fmt: skip
        local -= count


def prepare(
    body: Any, config: Config, *, pdl: bool = False, leads: bool = False, wide: bool | None = None
) -> Segmented:
    """Return the launch `prepared(t, rows, cols)`.

    Args:
        body: `@triton.jit` function `(SEGMENT: tl.constexpr, row, col, mask, t)`, or a `Looped`.
        config: the tile; a plain body needs `block_c >= cols`.
        pdl, leads: programmatic dependent launch (see launch.py).
        wide: int64 indices; None decides by the sizes of each call (see segments.py).
    """
    if not isinstance(body, Looped):
        return prepare_tiles(body, config, whole=True, pdl=pdl, leads=leads, wide=wide)
    return Segmented(looped, _looped_constexprs(body, config), config.warps, pdl=pdl, leads=leads, wide=wide)


def _looped_constexprs(body: Looped, config: Config) -> dict[str, Any]:
    parts = {"INIT": body.init, "PARTIAL": body.partial, "FINISH": body.finish, "STORE": body.store}
    return parts | {"PASSES": body.passes, "BLOCK_R": config.block_r, "BLOCK_C": config.block_c}


@triton.jit
def sample_init(PASS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The online softmax's start: running maximum and sum."""
    return tl.full((R, C), float("-inf"), tl.float32), tl.zeros((R, C), tl.float32)


@triton.jit
def sample_partial(PASS: tl.constexpr, SEGMENT: tl.constexpr, row, col, mask, t, acc, scalars):
    x = tl.load(t[0] + row * 262144 + col, mask=mask, other=float("-inf")).to(tl.float32)
    top, total = acc
    higher = tl.maximum(top, x)
    # -inf minus -inf is NaN: lanes that have seen nothing yet keep their zero.
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(top - safe) + tl.exp(x - safe)


@triton.jit
def sample_finish(PASS: tl.constexpr, acc):
    top, total = acc
    row_top = tl.max(top, axis=1, keep_dims=True)
    safe = tl.where(row_top == float("-inf"), 0.0, row_top)
    return row_top, tl.sum(total * tl.exp(top - safe), axis=1, keep_dims=True)


@triton.jit
def sample_store(SEGMENT: tl.constexpr, row, col, mask, t, scalars):
    x = tl.load(t[0] + row * 262144 + col, mask=mask, other=float("-inf")).to(tl.float32)
    top, total = scalars[0]
    tl.store(t[1] + row * 262144 + col, (tl.exp(x - top) / total).to(t[1].dtype.element_ty), mask=mask)


# Softmax of dense rows of 262144, online: compile jobs are built with it.
LOOPED_SAMPLE = Looped(1, sample_init, sample_partial, sample_finish, sample_store)


def compile_jobs(arch: int) -> Iterable[CompileJob]:
    """One job per entry of CONFIGS that keeps a row of fp32 in registers, and one looped; any architecture."""
    whole = [Config(r, c, warps) for c, (r, warps) in CONFIGS.items() if c < LOOP_FROM]
    yield from tile_jobs("rows", sample, ("*bf16",) * 2, whole, whole=True)
    shared = {"SEGMENTS": 1, "UNIT": 16, "WIDE": False, "PDL": False, "LEADS": False}
    yield CompileJob(
        family="rows",
        label=f"looped {LOOPED}",
        fn=looped,
        signature={"t": ("*bf16",) * 2, **dict.fromkeys(ROW_SIZES, "i32"), "units": "i32"},
        constexprs=shared | _looped_constexprs(LOOPED_SAMPLE, LOOPED),
        num_warps=LOOPED.warps,
        num_stages=1,
        divisible=("t",),
    )
