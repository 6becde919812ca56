"""What the families without a dot share: the problem, the kernel that hands tiles to a body, and its launch.

A launch covers up to four *segments*: independent sets of rows with the same number of columns (the q and the k heads
under RoPE). Segment s is a grid of tiles BLOCK_R x BLOCK_C over rows[s] x cols; the 1-D grid runs through the tiles of
all segments. The body is specialised per segment and gets the indices of its tile and their mask. `row` is always a
valid row (lanes beyond the last repeat it, masked), so a load of one value per row is [R, 1] and needs no mask.

pointwise, norm, rope and gather differ in how they cut the tile; rows adds a schedule of its own for the widest rows.

Two facts decide the parameters:
- Ints are never specialised on, so one binary serves every number of tokens. But a mask `col < cols` only lets Triton
  use 16-byte accesses if it knows that cols is a multiple of the vector: cols therefore arrives as `units` of UNIT
  columns, UNIT being 16 or 1, and each prepared launch has at most two binaries for that.
- Row and column are int32, or int64 (WIDE) from 2**28 elements on: a factor of 8 below the overflow at 2**31, because a
  body multiplies rows by the strides of views. Views with more than 8 times the columns between rows ask for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .jobs import CompileJob
from .launch import INTERPRETED, Kernel
from .target import Target

MAX_SEGMENTS = 4
WIDE_FROM = 1 << 28
ROW_SIZES = ("rows0", "rows1", "rows2", "rows3")


@dataclass(frozen=True)
class Problem:
    """One launch over row segments, as the selector sees it.

    Args:
        rows: rows of each segment.
        cols: columns, the same for all segments.
        dtype: the widest dtype the body loads or stores at full size.
        bytes_per_element: bytes read and written for each (row, column) together; 0 when unknown.
    """

    rows: tuple[int, ...]
    cols: int
    dtype: torch.dtype
    bytes_per_element: int = 0

    @property
    def elements(self) -> int:
        return sum(self.rows) * self.cols

    @property
    def bytes_moved(self) -> int:
        """Fewest bytes through device memory; unknown counts as one read and one write."""
        return self.elements * (self.bytes_per_element or 2 * self.dtype.itemsize)


@dataclass(frozen=True)
class Tile:
    """How a program's tile is cut: the `Config` of the families that run `tiles`.

    Args:
        block_r, block_c: rows and columns of a tile, powers of two.
        warps: 1 to 32.
    """

    block_r: int
    block_c: int
    warps: int

    def __str__(self) -> str:
        return f"{self.block_r}x{self.block_c} warps {self.warps}"


def obstacle(problem: Problem) -> str | None:
    """Return why no family here can do the problem, or None."""
    if not 1 <= len(problem.rows) <= MAX_SEGMENTS:
        return f"{len(problem.rows)} segments; a launch has 1 to {MAX_SEGMENTS}"
    if problem.cols < 1:
        return f"{problem.cols} columns"
    return None


@triton.jit
def tile_of(start_r, start_c, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Indices and mask of the tile at (start_r, start_c); lanes beyond the last row repeat it, masked."""
    row = start_r + tl.arange(0, BLOCK_R)[:, None]
    col = start_c + tl.arange(0, BLOCK_C)[None, :]
    mask = (row < rows) & (col < cols)
    if BLOCK_R > 1:
        row = tl.minimum(row, rows - 1)
    # row [R, 1], col [1, C], mask [R, C]
    return row, col, mask


@triton.jit(do_not_specialize=["rows0", "rows1", "rows2", "rows3", "units"])
def tiles(
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
    LEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile per program; with WHOLE, BLOCK_C covers the row."""
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
    col_tiles = 1 if WHOLE else tl.cdiv(cols, BLOCK_C).to(tl.int32)
    # Tile number within the segment; negative once the program's own segment lies behind.
    local = tl.program_id(0)
    for SEGMENT in tl.static_range(SEGMENTS):
        count = tl.cdiv(rows[SEGMENT], BLOCK_R) * col_tiles
        if SEGMENTS == 1 or (local >= 0) & (local < count):
            start_r = (local // col_tiles).to(index) * BLOCK_R
            start_c = 0 if WHOLE else (local % col_tiles).to(index) * BLOCK_C
            row, col, mask = tile_of(start_r, start_c, rows[SEGMENT], cols, BLOCK_R, BLOCK_C)
            BODY(SEGMENT, row, col, mask, t)
        local -= count


class Segmented:
    """A kernel over segments, ready to launch for any sizes: `prepared(t, rows, cols)`.

    Args:
        fn: a kernel with the parameters of `tiles` up to PDL; `constexprs` gives those that follow, and the body.
        constexprs: values of the kernel's own constexprs, among them BLOCK_R.
        block_c: columns of a tile; None when a tile holds whole rows.
        pdl, num_warps: as `Kernel` takes them; the interpreter ignores `pdl`.
        leads: the successor may start only once this kernel has waited (see launch.py).
        wide: int64 indices; None decides by the sizes of each call.
    """

    __slots__ = ("_block_c", "_block_r", "_constexprs", "_fn", "_kernels", "_last", "_leads", "_pdl", "_warps", "_wide")

    def __init__(
        self,
        fn: Any,
        constexprs: dict[str, Any],
        num_warps: int,
        *,
        block_c: int | None = None,
        pdl: bool = False,
        leads: bool = False,
        wide: bool | None = None,
    ) -> None:
        self._fn, self._constexprs, self._warps = fn, constexprs, num_warps
        self._block_r, self._block_c = constexprs["BLOCK_R"], block_c
        self._pdl, self._leads, self._wide = pdl and not INTERPRETED, leads, wide
        self._kernels: dict[tuple[int, int, bool], Kernel] = {}
        self._last: tuple[tuple[int, ...], int, Kernel, tuple[int, int, int], tuple[int, ...]] | None = None

    def __call__(self, t: tuple[Any, ...], rows: tuple[int, ...], cols: int) -> None:
        """Launch over `rows[s]` x `cols` for every segment s; nothing when there is no row or no column.

        Args:
            t: the body's arguments: tensors and None.
            rows: rows of each segment, at most `MAX_SEGMENTS`.
            cols: columns of every segment.
        """
        kernel, grid, args = self._resolve(t, rows, cols)
        kernel(grid, *args)

    def precompile(self, t: tuple[Any, ...], rows: tuple[int, ...], cols: int) -> Any:
        """Compile and load what `__call__` would launch, without launching."""
        kernel, _, args = self._resolve(t, rows, cols)
        return kernel.precompile(*args)

    def _resolve(self, t: tuple, rows: tuple[int, ...], cols: int) -> tuple[Kernel, tuple[int, int, int], tuple]:
        # Calls mostly have the sizes of the one before: a model's layers follow one another.
        last = self._last
        if last is None or last[0] != rows or last[1] != cols:
            last = self._last = rows, cols, *self._sized(rows, cols)
        _, _, kernel, grid, sizes = last
        return kernel, grid, (t, *sizes)

    def _sized(self, rows: tuple[int, ...], cols: int) -> tuple[Kernel, tuple[int, int, int], tuple[int, ...]]:
        """The kernel for these sizes, its grid and its arguments behind the body's."""
        unit = 1 if cols & 15 else 16
        wide = max(rows) * cols >= WIDE_FROM if self._wide is None else self._wide
        key = (len(rows), unit, wide)
        kernel = self._kernels.get(key)
        if kernel is None:
            shared = {"SEGMENTS": len(rows), "UNIT": unit, "WIDE": wide, "PDL": self._pdl, "LEADS": self._leads}
            kernel = Kernel(self._fn, self._constexprs | shared, self._warps, num_stages=1, pdl=self._pdl)
            self._kernels[key] = kernel
        count = sum(-(-r // self._block_r) for r in rows)
        if self._block_c is not None:
            count *= -(-cols // self._block_c)
        if not cols:
            count = 0
        return kernel, (count, 1, 1), (*rows, *(0,) * (MAX_SEGMENTS - len(rows)), cols // unit)


# Programs that start per second, all multiprocessors together, with programmatic dependent launch. Measured with
# SiLU·mul on 458752 programs of 256 elements: 553 us, against 278 us without (NVIDIA H200, triton 3.6, 2026-11-24).
_PDL_STARTS_PER_S = 0.83e9


def pdl_pays(problem: Problem, config: Tile, target: Target) -> bool:
    """Whether programmatic dependent launch saves more (the launch gap) than it costs (programs start half as fast).

    It costs nothing while the bytes take longer than the starts. Measured on an H200: 0.3 to 0.5 us saved at decode,
    0.6 at prefill where this holds; where it does not, up to twice the time.
    """
    programs = sum(-(-r // config.block_r) for r in problem.rows) * -(-problem.cols // config.block_c)
    # A grid that fits the device at once starts in one go.
    if not target.pdl or programs <= 8 * target.sm_count:
        return target.pdl
    return programs / _PDL_STARTS_PER_S <= problem.bytes_moved / target.bandwidth_bytes_s


def prepare_tiles(body: Any, config: Tile, *, whole: bool, pdl: bool, leads: bool, wide: bool | None) -> Segmented:
    """`tiles` with a body and a tile."""
    constexprs = {"BODY": body, "BLOCK_R": config.block_r, "BLOCK_C": config.block_c, "WHOLE": whole}
    block_c = None if whole else config.block_c
    return Segmented(tiles, constexprs, config.warps, block_c=block_c, pdl=pdl, leads=leads, wide=wide)


def tile_jobs(
    family: str, body: Any, types: tuple[str, ...], configs: Iterable[Tile], *, whole: bool, segments: int = 1
) -> list[CompileJob]:
    """One job per config: 16-byte aligned tensors of `types`, narrow indices, columns in units of 16."""
    shared = {
        "BODY": body,
        "SEGMENTS": segments,
        "UNIT": 16,
        "WIDE": False,
        "PDL": False,
        "LEADS": False,
        "WHOLE": whole,
    }
    return [
        CompileJob(
            family=family,
            label=str(config),
            fn=tiles,
            signature={"t": types, **dict.fromkeys(ROW_SIZES, "i32"), "units": "i32"},
            constexprs=shared | {"BLOCK_R": config.block_r, "BLOCK_C": config.block_c},
            num_warps=config.warps,
            num_stages=1,
            divisible=("t",),
        )
        for config in configs
    ]


def power_of_two(n: int) -> int:
    """The next power of two at or above n."""
    return 1 << max(0, n - 1).bit_length()
