"""What every GEMM family shares: the problem, the alignment rule of TMA, measured tables, device functions.

    y[M, N] = epilogue(x[M, K] @ W)        W stored [N, K] ("nk", as nn.Linear keeps it) or [K, N] ("kn")

A paired problem has two accumulators from one x tile: columns `n` and `n + pair_offset` of W (gate and up of a GLU).
A problem with `halves` has heads of 2 * halves columns, whose halves belong together (a rotation): it is computed as
one product, and the epilogue gets the halves as its two accumulators, element beside element. Where it sums columns (a
norm of each head, parts of a row's sum), tiles hold `summed` of them at least.
Sums are fp32; fp32 operands are multiplied in IEEE precision unless the problem allows TF32.
The tokens `m` are a run-time argument of every kernel: `GemmProblem.m` only chooses the config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from math import ceil, isnan, log, nan
from typing import Any

import torch
import triton
import triton.language as tl

from ..lowering.errors import InternalError
from .target import Target
from .tma import TMA_ALIGNMENT_BYTES

KINDS = ("one", "pair", "head", "norm", "sum")
# Operands, by Triton's names.
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv"}


@dataclass(frozen=True)
class GemmProblem:
    """One matrix product, as the selector sees it.

    Args:
        m: tokens the config is chosen for; kernels take the real number at run time.
        n: output columns of one accumulator.
        k: length of the sums.
        dtype: of both operands: float32, float16, bfloat16 or float8_e4m3fn.
        layout: "nk" (W is [N, K]) or "kn" (W is [K, N]).
        paired: two accumulators, columns `n` and `n + pair_offset` of W.
        pair_offset: distance of the second accumulator's columns, in columns of W.
        halves: columns of half a head: a power of two; 0 where columns do not come in heads. The epilogue's `n` then
            counts first halves: columns `n + n // halves * halves` and that plus `halves` of the product.
        batch: independent products (bmm); the epilogue's `m` then counts rows of all batches, `b * M + m`.
        x_strides: (batch, m, k) in elements; None means dense.
        w_strides: (batch, n, k) in elements whatever the layout; None means dense.
        aligned: both base pointers are multiples of 16 bytes.
        allow_tf32: fp32 operands may be rounded to TF32.
        epilogue_itemsize: bytes of the widest element that the epilogue reads or stores per column; 0: as the operands.
        plain: the epilogue stores the product as it is, dense and in the operands' dtype.
        rounds: the sums may be rounded to the operands' dtype before the epilogue, as eager rounds them there.
        w_given: W is an argument of the piece, so there before its first kernel; no kernel of the piece writes it.
        w_steady: and a parameter of which the caller promises that it is there before any plan runs (`Options.steady`).
        summed: columns whose sums the epilogue leaves (`functions.store_sums`) or uses (`sum_of_heads`), and that every
            tile therefore has to hold; 0: none.
        scaled: the epilogue scales rows by sums that an earlier kernel left in parts (`functions.load_parts`).
        bare: cuBLAS was chosen for it together with what follows, which is a kernel of its own.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    layout: str = "nk"
    paired: bool = False
    pair_offset: int = 0
    halves: int = 0
    batch: int = 1
    x_strides: tuple[int, int, int] | None = None
    w_strides: tuple[int, int, int] | None = None
    aligned: bool = True
    allow_tf32: bool = False
    epilogue_itemsize: int = 0
    plain: bool = False
    rounds: bool = False
    w_given: bool = False
    w_steady: bool = False
    summed: int = 0
    scaled: bool = False
    bare: bool = False

    @property
    def w_columns(self) -> int:
        """Output columns W has to hold."""
        return self.n + self.pair_offset if self.paired else self.n

    @property
    def w_shape(self) -> tuple[int, int]:
        """Shape of W in its layout, without the batch."""
        return (self.w_columns, self.k) if self.layout == "nk" else (self.k, self.w_columns)

    @property
    def x_stride(self) -> tuple[int, int, int]:
        return self.x_strides or (self.m * self.k, self.k, 1)

    @property
    def w_stride(self) -> tuple[int, int, int]:
        size = self.w_columns * self.k
        dense = (size, self.k, 1) if self.layout == "nk" else (size, 1, self.w_columns)
        return self.w_strides or dense

    @property
    def kind(self) -> str:
        """How tables name it: "one" accumulator, a "pair" of them, a "head", whose halves come together, a "norm" of
        such heads, or a "sum": one of which sums over columns are left."""
        if self.paired:
            return "pair"
        if self.halves:
            return "norm" if self.summed else "head"
        return "sum" if self.summed else "one"

    @property
    def leaves_parts(self) -> bool:
        """Whether the epilogue leaves sums over columns for another product that scales its rows."""
        return self.summed > 0 and not self.halves

    @property
    def accumulators(self) -> int:
        return 2 if self.paired else 1

    @property
    def weight_bytes(self) -> int:
        return self.accumulators * self.n * self.k * self.dtype.itemsize * self.batch

    @property
    def bytes_moved(self) -> int:
        """Fewest bytes through device memory: each operand once, the result once in the operands' dtype, that of
        eight-bit floats in two bytes."""
        itemsize = self.dtype.itemsize
        return self.weight_bytes + self.batch * self.m * (self.k * itemsize + self.n * max(itemsize, 2))

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k * self.accumulators

    @property
    def precision(self) -> str:
        """`input_precision` of the dots; it only matters for fp32."""
        return "tf32" if self.allow_tf32 else "ieee"


@dataclass(frozen=True)
class Measured:
    """A config that won, with its evidence.

    Args:
        config: the family's `Config`.
        us: its time.
        vendor_us: cuBLAS (`F.linear`, without the epilogue) in the same run; NaN where it did not run beside.
        source: on what, and when.
        kind, m: of the product, as the table's row has them.
        elsewhere: on another device; `us` is what this one is then expected to take.
    """

    config: Any
    us: float
    vendor_us: float
    source: str
    kind: str
    m: int
    elsewhere: bool = False

    def why(self, problem: GemmProblem) -> str:
        """What was measured, in words."""
        beside = "" if isnan(self.vendor_us) else f", cuBLAS {self.vendor_us:.1f} us"
        row = f"{problem.n} {problem.k} {self.kind} {self.m}"
        if self.elsewhere:
            return f"{self.us:.1f} us{beside} by what was measured on another device (row {row}; {self.source})"
        other = "" if self.kind == problem.kind else " with another epilogue"
        return f"measured {self.us:.1f} us{other}{beside} (row {row}; {self.source})"


# (n, k, kind) -> largest m of the bucket -> what won there.
Table = Mapping[tuple[int, int, str], Mapping[int, Measured]]


def measured(config: Any, rows: str, source: str) -> Table:
    """Read a table of measurements: a header, then a row of N, K, kind, m, the config's fields, us and, where it
    ran beside, cuBLAS us.

    Args:
        config: the family's `Config`; its fields are ints or bools, in the order of `table_columns`.
        rows: the table as text.
        source: on what the times were taken, and when.
    """
    table: dict[tuple[int, int, str], dict[int, Measured]] = {}
    columns = table_columns(config)
    types: list[Callable[[int], Any]] = [type(getattr(config, name, 0)) for name in columns]
    for row in rows.strip().splitlines()[1:]:
        n, k, kind, m, *values = row.split()
        times = values[len(types) :]
        if len(times) not in (1, 2) or kind not in KINDS:
            fact = f"it is not N K kind m {' '.join(columns)} us [cuBLAS] with a kind of {', '.join(KINDS)}"
            raise InternalError(f"row {row.strip()!r}", fact, stage="kernels.gemm")
        made = config(*(make(int(value)) for make, value in zip(types, values, strict=False)))
        us, vendor_us = (*map(float, times), nan)[:2]
        table.setdefault((int(n), int(k), kind), {})[int(m)] = Measured(made, us, vendor_us, source, kind, int(m))
    return table


def table_columns(config: Any) -> list[str]:
    """Names of a config's fields that a table holds: the others, which a rule sets, can be given by name only."""
    return [field.name for field in fields(config) if not field.kw_only]


def joined(*tables: Table) -> Table:
    """Tables of different sources as one, each row by m."""
    whole: dict[tuple[int, int, str], dict[int, Measured]] = {}
    for key, row in (entry for table in tables for entry in table.items()):
        whole[key] = dict(sorted({**whole.get(key, {}), **row}.items()))
    return whole


def nearest(devices: Iterable[str], target: Target) -> list[str]:
    """Names of devices, that with the target's bandwidth first."""

    def apart(name: str) -> float:
        return abs(log(Target.named(name).bandwidth_bytes_s / target.bandwidth_bytes_s))

    return sorted(devices, key=apart)


def row_of(table: Table, problem: GemmProblem) -> Mapping[int, Measured]:
    """Return what was measured for exactly this N and K, by m: of its kind, or else of another with as many
    accumulators."""
    if problem.dtype not in (torch.float16, torch.bfloat16) or problem.layout != "nk" or problem.batch != 1:
        return {}
    kinds = ("pair",) if problem.paired else ("norm", "sum", "head", "one", problem.kind)
    row: dict[int, Measured] = {}
    for kind in kinds:
        row |= table.get((problem.n, problem.k, kind), {})
    return {m: hit for m, hit in row.items() if hit.config.block_n >= problem.summed} if problem.summed else row


def in_bucket(row: Mapping[int, Measured], buckets: tuple[int, ...], m: int) -> Measured | None:
    """Return a row's entry in the bucket that holds m, if there is one."""
    return next((row.get(bound) for bound in buckets if m <= bound), None)


def tma_obstacle(problem: GemmProblem) -> str | None:
    """Return why TMA cannot read these operands, or None when it can."""
    if problem.batch != 1:
        return f"batch is {problem.batch}, and the descriptors are two-dimensional"
    if problem.dtype not in TYPES:
        return f"dtype {problem.dtype} is not one of {', '.join(TYPES.values())}"
    if not problem.aligned:
        return f"a base pointer is not a multiple of {TMA_ALIGNMENT_BYTES} bytes"
    if problem.layout == "kn" and problem.dtype == torch.float32 and problem.allow_tf32:
        return "tensor cores take tf32 along depth only; W stored the other way is transposed in shared memory first"
    _, x_row, x_col = problem.x_stride
    _, w_n, w_k = problem.w_stride
    w_inner, w_outer = (w_k, w_n) if problem.layout == "nk" else (w_n, w_k)
    for name, inner, outer in (("x", x_col, x_row), ("W", w_inner, w_outer)):
        if inner != 1:
            return f"{name}'s innermost stride is {inner}, not 1"
        if outer * problem.dtype.itemsize % TMA_ALIGNMENT_BYTES:
            return f"{name}'s row stride of {outer * problem.dtype.itemsize} bytes is not a multiple of 16"
    return None


def reference(
    problem: GemmProblem, x: torch.Tensor, w: torch.Tensor, epilogue: Callable[..., torch.Tensor] | None = None
) -> torch.Tensor:
    """Compute the product in x's dtype with torch, for tests and for reading.

    Args:
        x: [M, K] or [batch, M, K].
        w: W in the problem's layout, with a leading batch when x has one.
        epilogue: function of one accumulator (two when paired, or with halves); None stacks two as they are.
    """
    columns = w.transpose(-1, -2) if problem.layout == "nk" else w
    parts = [x @ columns[..., : problem.n]]
    if problem.halves:
        heads = parts[0].unflatten(-1, (-1, 2, problem.halves))
        parts = [heads[..., 0, :].flatten(-2), heads[..., 1, :].flatten(-2)]
    if problem.paired:
        parts.append(x @ columns[..., problem.pair_offset : problem.pair_offset + problem.n])
    if epilogue is not None:
        return epilogue(*parts)
    return torch.stack(parts) if len(parts) == 2 else parts[0]


@triton.jit
def first_row(m0, m_size, BLOCK_M: tl.constexpr):
    """Where the rows of a tile begin: at m0, or so far before it that all of them are rows of x. Those beyond x's last
    one TMA would fill with zeros, for which it takes longer than for reading them."""
    return tl.maximum(tl.minimum(m0, m_size - BLOCK_M), 0)


@triton.jit
def load_tile(desc, outer, k, KN: tl.constexpr):
    """W's tile at columns `outer` and depth `k` as [columns, depth], whichever way W is stored."""
    if KN:
        return desc.load([k, outer]).T
    else:
        return desc.load([outer, k])


@triton.jit
def sum_of_splits(parts, at, SPLIT_K: tl.constexpr, STRIDE: tl.constexpr):
    """The partial sums at `at`, STRIDE elements from split to split, added in their order."""
    # .cg: other SMs wrote these, so L1 must not answer.
    total = tl.load(parts + at, cache_modifier=".cg")
    for i in tl.static_range(1, SPLIT_K):
        total += tl.load(parts + i * STRIDE + at, cache_modifier=".cg")
    return total


@triton.jit
def halves_apart(acc, HALF: tl.constexpr, AXIS: tl.constexpr):
    """First and second halves of the heads that a tile holds, its columns of W along AXIS; the tile is half as wide."""
    rows: tl.constexpr = acc.shape[0]
    cols: tl.constexpr = acc.shape[1]
    if AXIS == 1:
        heads = acc.reshape(rows, cols // (2 * HALF), 2, HALF).permute(0, 1, 3, 2)
        return heads.reshape(rows, cols // 2, 2).split()
    else:
        heads = acc.reshape(rows // (2 * HALF), 2, HALF, cols).permute(0, 2, 3, 1)
        return heads.reshape(rows // 2, cols, 2).split()


# Widths of the parts in which rows' sums are left, and up to how many tokens a row may be any number of them: beyond,
# every tile of the product that sums them holds FEW_PARTS for each of its rows at the most.
PART_WIDTHS = (32, 64, 128)
MANY_PARTS_TOKENS, FEW_PARTS = 64, 64


def part_width(rows: int, cols: int) -> int:
    """Columns of a part: of as narrow a tile as computes what is summed, or of a wider one where parts are few."""
    narrow, *_, wide = PART_WIDTHS
    return narrow if rows <= MANY_PARTS_TOKENS else next((w for w in PART_WIDTHS if cols <= FEW_PARTS * w), wide)


def whole_heads(problem: GemmProblem, columns: int) -> bool:
    """Whether a tile of so many columns holds whole heads, where columns come in heads."""
    return not problem.halves or columns % (2 * problem.halves) == 0


def k_per_split(k: int, block_k: int, split_k: int) -> int:
    """Depth of a split: whole steps; the last split may be shorter, or empty."""
    return ceil(ceil(k / block_k) / split_k) * block_k


def w_block(problem: GemmProblem, block_n: int, block_k: int) -> list[int]:
    """Block shape of W's descriptor in W's own axis order."""
    return [block_n, block_k] if problem.layout == "nk" else [block_k, block_n]


def type_name(dtype: torch.dtype) -> str:
    """Triton's name of an operand's dtype."""
    return TYPES[dtype]
