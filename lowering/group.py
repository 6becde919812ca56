"""What one kernel computes, in the words that the stages after fusion share: reductions, stores, groups.

A group's expressions are over a two-dimensional domain of rows and columns; `composer.py` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..kernels.gemm_stream_table import MOST_TOKENS
from .affine import Affine
from .expr import Expr, Load, Masked, children, loads
from .values import RUNNING, Contract, Extern

ROW, COL = 0, 1

# Above this many distinct nodes a body no longer reads, or compiles, like something a person would write.
BODY_LIMIT = 600

# Up to so many tokens reading W is what a product costs, and what follows it stands in its epilogue: results wider than
# its own, and values of which each needs two columns of it. Beyond, a wider copy of the result (a sum in fp32) costs
# more than its readers lose by computing it from the product's own: on an H100 at 8192 x 4096 (bf16, torch 2.11, triton
# 3.6, 2026-11-25) a residual added and stored in fp32 made o_proj take 516 us and down 1508 us, where cuBLAS and our
# kernels without it take about 400 and 1340. Of products that were measured so it is more (`Contract.few`).
FEW_TOKENS = MOST_TOKENS
# So many at most where heads are summed as well: a tile then holds a whole head of 128 columns, and those of 6144 are
# 48, in two to four parts of K each. Qwen3-8B's piece took, with norm and rotation in a kernel of their own / in the
# product's epilogue, 138.9 / 138.6 us at 1 token, 141.4 / 138.6 at 16, 145.0 / 147.4 at 64 (H100, torch 2.11, triton
# 3.6, bf16, 2026-11-26).
FEW_TOKENS_OF_NORMS = 32
# From so many on our product is as fast as cuBLAS, which knows no halves of heads, and brings them together itself.
# Pieces took, of their time with rotation (and norm) apart: Llama-3.1-8B and 3.2-1B at 2048 and 8192 tokens 0.984 to
# 1.002 (H200, torch 2.11, triton 3.6, bf16, 2026-11-26), Qwen3-8B at 2048, 3001 and 8192 0.92 to 0.98 (H100, the same
# day); but from 256 to 1000 tokens up to 1.03 (H200), at 1100 to 1536 0.97 to 1.07, at 1792 0.97 to 1.01 (H100).
MANY_TOKENS = 1793

# Functions that cost more than a handful of instructions: not repeated for every element of a larger domain.
EXPENSIVE = {
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "sinh",
    "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "erfinv", "lgamma", "pow", "atan2", "hypot", "silu",
    "sigmoid",
}  # fmt: skip


@dataclass(frozen=True)
class Reduction:
    """`kind` of `expr` over the columns of each row. In a GEMM's epilogue the sum over `parts` elements of memory, of
    which `expr` reads those in the columns; or the sum over a head, whose halves have `half` columns: one for each of
    them."""

    value: str
    kind: str
    expr: Expr
    parts: int = 0
    half: int = 0

    @property
    def running(self) -> bool:
        """Whether every column has a result of its own."""
        return self.kind.startswith(RUNNING)


@dataclass(frozen=True)
class Store:
    """`expr` written at `offset` of the memory of `value`; once per row when `per_row`. A `Masked` one is written only
    where its condition holds. With `summed` its sum over so many columns each."""

    value: str
    offset: Affine
    expr: Expr
    per_row: bool
    summed: int = 0


@dataclass(frozen=True)
class Group:
    """One kernel's work.

    Args:
        kind: 'pointwise', 'row', 'gemm', 'extern', 'item' (one of an extern's results) or 'empty' (memory only).
        members: the values computed here, in order.
        rows, cols: the domain; variables 0 and 1 of every expression.
        reductions: in the order in which they can be computed.
        stores: what is written.
        contract: the GEMM whose epilogue the stores are.
        pair: column distance of the second accumulator, None without one.
        half: columns of half a head where the accumulators are the halves of heads: column `c` of the domain is then
            column `c + c // half * half` of the product in the first, and `half` beyond that in the second.
        foreign: the op that runs as itself.
        names: for the reader, which value an expression is.
    """

    kind: str
    members: tuple[str, ...]
    rows: int
    cols: int
    reductions: tuple[Reduction, ...] = ()
    stores: tuple[Store, ...] = ()
    contract: Contract | None = None
    pair: int | None = None
    half: int = 0
    foreign: Extern | None = None
    names: Mapping[Expr, str] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """The value that names the group: the last it stores."""
        if self.foreign is not None:
            return self.foreign.name
        return self.stores[-1].value if self.stores else self.members[-1]

    @property
    def columns(self) -> int:
        """Columns of the product that a GEMM's group computes."""
        return self.cols * (2 if self.pair is not None or self.half else 1)

    @cached_property
    def loads(self) -> list[Load]:
        """Distinct loads, in order of first use."""
        return loads(*(r.expr for r in self.reductions), *(s.expr for s in self.stores))

    @property
    def summed(self) -> int:
        """Columns of the product that a tile has to hold at least, because it sums them; 0 where it sums none."""
        return max((*(2 * r.half for r in self.reductions), *(s.summed for s in self.stores)), default=0)

    @cached_property
    def parts_read(self) -> list[Load]:
        """Loads of the parts whose sum an epilogue gets."""
        return loads(*(r.expr for r in self.reductions if r.parts))

    @property
    def body_loads(self) -> list[Load]:
        """Loads of the body itself."""
        return [load for load in self.loads if load not in self.parts_read]


def too_long(roots: Sequence[Expr]) -> bool:
    """Whether a body has more than `BODY_LIMIT` operations; one under several conditions is written for each."""
    seen: set[tuple[Expr, object]] = set()
    stack: list[tuple[Expr, object]] = [(root, None) for root in roots]
    while stack and len(seen) <= BODY_LIMIT:
        node, cond = stack.pop()
        if (node, cond) in seen:
            continue
        seen.add((node, cond))
        if isinstance(node, Masked):
            stack += [(node.cond, cond), (node.body, (cond, node.cond))]
        else:
            stack += [(child, cond) for child in children(node)]
    return len(seen) > BODY_LIMIT
