"""Scalar expressions: what one element of a value is, as a function of its index.

An `Expr` is an immutable DAG. Leaves are loads (a value and the offset read, in elements from its first one),
constants, indices, and, once fused, the accumulators of a GEMM and the results of a row reduction in the same kernel.
Every expression has the torch dtype that the source graph gives it; arithmetic on half precision is carried out in fp32
and rounded where an explicit `cast` says so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from .affine import Affine, Atom, Indirect
from .size import Size, Undecided


@dataclass(frozen=True, eq=False)
class Expr:
    """Base: a dtype, a structural hash and structural equality, both cheap on shared DAGs."""

    dtype: torch.dtype
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def parts(self) -> tuple[object, ...]:
        """What distinguishes this node from others of its class."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((type(self).__name__, self.dtype, self.parts())))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            type(self) is type(other)
            and self._hash == other._hash  # type: ignore[attr-defined]
            and self.dtype == other.dtype  # type: ignore[attr-defined]
            and self.parts() == other.parts()  # type: ignore[attr-defined]
        )


@dataclass(frozen=True, eq=False)
class Load(Expr):
    """The element of `value` that lies `offset` elements after its first one."""

    value: str = ""
    offset: Affine = field(default_factory=Affine)

    def parts(self) -> tuple[object, ...]:
        return self.value, self.offset


@dataclass(frozen=True, eq=False)
class Const(Expr):
    """A Python number; floats compare by their text, so that NaN and −0 keep their identity."""

    value: int | float | bool = 0

    def parts(self) -> tuple[object, ...]:
        if isinstance(self.value, Size):
            raise Undecided(f"{self.value} would be a number in a kernel's body")
        return (repr(self.value),)


@dataclass(frozen=True, eq=False)
class Index(Expr):
    """An index itself as a number (`arange`, the operand of a comparison in a cat)."""

    offset: Affine = field(default_factory=Affine)

    def parts(self) -> tuple[object, ...]:
        return (self.offset,)


@dataclass(frozen=True, eq=False)
class Apply(Expr):
    """`fn(*args)`; the functions are the rows of the tables in `functions.py`."""

    fn: str = ""
    args: tuple[Expr, ...] = ()

    def parts(self) -> tuple[object, ...]:
        return self.fn, self.args


@dataclass(frozen=True, eq=False)
class Masked(Expr):
    """`body` where `cond` holds; elsewhere anything, and no memory is read (as what is stored: or written)."""

    cond: Expr = field(default=None)  # type: ignore[assignment]
    body: Expr = field(default=None)  # type: ignore[assignment]

    def parts(self) -> tuple[object, ...]:
        return self.cond, self.body


@dataclass(frozen=True, eq=False)
class RowScalar(Expr):
    """The result for this row (a running reduction's: for this element) of the reduction `value` of the same
    kernel."""

    value: str = ""

    def parts(self) -> tuple[object, ...]:
        return (self.value,)


@dataclass(frozen=True, eq=False)
class Acc(Expr):
    """Accumulator 0 or 1 of the GEMM `value` whose epilogue this is, fp32."""

    value: str = ""
    which: int = 0

    def parts(self) -> tuple[object, ...]:
        return self.value, self.which


def load(value: str, offset: Affine, dtype: torch.dtype) -> Load:
    return Load(dtype, value=value, offset=offset)


def const(value: int | float | bool, dtype: torch.dtype) -> Const:
    return Const(dtype, value=value)


def index(offset: Affine, dtype: torch.dtype = torch.int64) -> Expr:
    if not offset.terms:
        return Const(dtype, value=offset.const)
    return Index(dtype, offset=offset)


def apply(fn: str, *args: Expr, dtype: torch.dtype) -> Expr:
    """`fn(*args)`; of numbers alone, the number it is; a comparison that an index's range decides, what it decides."""
    if all(isinstance(a, Const) for a in args):
        return _folded(fn, args, dtype)  # type: ignore[arg-type]
    if fn in BOUNDS and (held := _decided(fn, *args)) is not None:
        return const(held, torch.bool)
    if fn == "where" and isinstance(args[0], Const):
        chosen = args[1] if args[0].value else args[2]
        return chosen if chosen.dtype == dtype else cast(chosen, dtype)
    return Apply(dtype, fn=fn, args=args)


# What makes a comparison of a smallest and a largest value with a number hold, and what makes it fail.
BOUNDS: dict[str, tuple[Callable[[int, int, int], bool], Callable[[int, int, int], bool]]] = {
    "lt": (lambda lo, hi, x: hi < x, lambda lo, hi, x: lo >= x),
    "le": (lambda lo, hi, x: hi <= x, lambda lo, hi, x: lo > x),
    "gt": (lambda lo, hi, x: lo > x, lambda lo, hi, x: hi <= x),
    "ge": (lambda lo, hi, x: lo >= x, lambda lo, hi, x: hi < x),
}


def _decided(fn: str, left: Expr, right: Expr) -> bool | None:
    """What a comparison of an index with a number comes to at every index; None where that differs."""
    if not isinstance(left, Index) or not isinstance(right, Const) or type(right.value) is not int:
        return None
    low, high = left.offset.range
    if type(low) is not int or type(high) is not int:
        return None
    always, never = BOUNDS[fn]
    if always(low, high, right.value):
        return True
    return False if never(low, high, right.value) else None


def only(cond: Expr, body: Expr) -> Expr:
    """`body` where `cond` holds; where that is everywhere, `body`."""
    if isinstance(cond, Const) and cond.value:
        return body
    return Masked(body.dtype, cond=cond, body=body)


def all_of(checks: Iterable[Expr | None]) -> Expr | None:
    """That every check holds; None, which always holds, stands for no check."""
    held: Expr | None = None
    for check in checks:
        if check is not None:
            held = check if held is None else apply("bitwise_and", held, check, dtype=torch.bool)
    return held


def only_where(held: Expr | None, inside: Expr, outside: Expr) -> Expr:
    """`inside`, read only where `held`, elsewhere `outside`; `inside` everywhere when `held` is None."""
    if held is None:
        return inside
    return apply("where", held, Masked(inside.dtype, cond=held, body=inside), outside, dtype=inside.dtype)


# Functions whose name in torch is another.
TORCH_NAMES: dict[str, Callable[..., Any]] = {
    "silu": torch.nn.functional.silu,
    "shift_left": torch.bitwise_left_shift,
    "shift_right": torch.bitwise_right_shift,
    "div_floor": functools.partial(torch.div, rounding_mode="floor"),
    "div_trunc": functools.partial(torch.div, rounding_mode="trunc"),
}


def _folded(fn: str, args: tuple[Const, ...], dtype: torch.dtype) -> Const:
    """A function of numbers, computed by torch in fp64 (integers in their own dtype)."""
    wide = [torch.float64 if a.dtype.is_floating_point else a.dtype for a in args]
    numbers = [torch.tensor(a.value).to(w) for a, w in zip(args, wide, strict=True)]
    value = (TORCH_NAMES.get(fn) or getattr(torch, fn))(*numbers).item()
    return Const(dtype, value=float(value) if dtype.is_floating_point else value)


def cast(value: Expr, dtype: torch.dtype) -> Expr:
    """`value` converted to `dtype` (rounded, when it narrows)."""
    if value.dtype == dtype:
        return value
    if isinstance(value, Apply) and value.fn == "keep" and value.args[0].dtype == dtype:
        return value.args[0]
    if isinstance(value, Const):
        number = value.value
        if dtype == torch.bool:
            return Const(dtype, value=bool(number))
        if dtype.is_floating_point:
            return Const(dtype, value=float(number))
        if math.isfinite(number):
            return Const(dtype, value=_wrapped(int(number), dtype))
    return Apply(dtype, fn="cast", args=(value,))


def _wrapped(number: int, dtype: torch.dtype) -> int:
    """An integer as this dtype holds it: modulo its size, as torch converts."""
    info = torch.iinfo(dtype)
    return (number - info.min) % (info.max - info.min + 1) + info.min


def _reapplied(node: Apply, args: tuple[Expr, ...]) -> Expr:
    if node.fn in ("cast", "keep"):
        return cast(args[0], node.dtype) if isinstance(args[0], Const) else Apply(node.dtype, fn=node.fn, args=args)
    return apply(node.fn, *args, dtype=node.dtype)


def keep(value: Expr, dtype: torch.dtype) -> Expr:
    """`value` as the result of an op of this dtype: rounded when it is stored, not while it stays in registers."""
    if value.dtype == torch.float32 and dtype in (torch.float16, torch.bfloat16):
        return Apply(dtype, fn="keep", args=(value,))
    return cast(value, dtype)


def children(expr: Expr) -> tuple[Expr, ...]:
    """Operands of a node, the expressions inside its indices included."""
    if isinstance(expr, Apply):
        return expr.args
    if isinstance(expr, Masked):
        return expr.cond, expr.body
    if isinstance(expr, (Load, Index)):
        return expr.offset.looked_up
    return ()


def walk(*roots: Expr) -> Iterable[Expr]:
    """Every distinct node below the roots, operands before users."""
    if len(roots) != 1:
        return _ordered(roots)
    # Planning asks the same expressions again and again. Without the root, which would then hold itself.
    below = roots[0].__dict__.get("_below")
    if below is None:
        below = tuple(_ordered(roots))[:-1]
        object.__setattr__(roots[0], "_below", below)
    return chain(below, roots)


def _ordered(roots: Sequence[Expr]) -> Iterator[Expr]:
    seen: set[int] = set()
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(roots)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            yield node
            continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        stack.append((node, True))
        stack.extend((c, False) for c in reversed(children(node)))


def loads(*roots: Expr) -> list[Load]:
    """The distinct loads below the roots, in order of first use."""
    return list(dict.fromkeys(n for n in walk(*roots) if isinstance(n, Load)))


def varies(expr: Expr, dim: int) -> bool:
    """Whether an expression differs along a variable, by what it reads or by an index, those of indices included."""
    return any(node.offset.varies(dim) for node in walk(expr) if isinstance(node, (Load, Index)))


def rewrite(
    expr: Expr,
    new_atom: Callable[[Atom], Affine | None] = lambda atom: None,
    new_leaf: Callable[[Expr], Expr | None] = lambda leaf: None,
) -> Expr:
    """The expression with its indices substituted and then its leaves replaced.

    Args:
        expr: the root.
        new_atom: as for `Affine.substitute`; applied to every index.
        new_leaf: called on every leaf after its index was substituted; None keeps it.
    """
    memo: dict[int, Expr] = {}
    indices: dict[Affine, Affine] = {}

    def atom(a: Atom) -> Affine | None:
        if isinstance(a, Indirect):
            value = memo[id(a.value)]
            return Affine.of(int(value.value) if isinstance(value, Const) else Indirect(value, a.size))
        return new_atom(a)

    def shift(offset: Affine) -> Affine:
        if offset not in indices:
            indices[offset] = offset.substitute(atom)
        return indices[offset]

    for node in walk(expr):
        made: Expr = node
        if isinstance(node, Load):
            offset = shift(node.offset)
            if offset is not node.offset:
                made = Load(node.dtype, value=node.value, offset=offset)
        elif isinstance(node, Index):
            made = index(shift(node.offset), node.dtype)
        elif isinstance(node, Apply):
            args = tuple(memo[id(a)] for a in node.args)
            if any(a is not b for a, b in zip(args, node.args, strict=True)):
                made = _reapplied(node, args)
        elif isinstance(node, Masked):
            made = only(memo[id(node.cond)], memo[id(node.body)])
        if isinstance(made, (Load, RowScalar, Acc)):
            made = new_leaf(made) or made
        memo[id(node)] = made
    return memo[id(expr)]
