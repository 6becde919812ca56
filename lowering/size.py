"""A number of tokens that stands for a whole range: an integer that refuses to say what it is.

A `Size` is `factor · size + const` for every integer `size` of a `Span`. Planning on it instead of on an integer gives
one plan for all sizes of the span, and the plan is right for each of them by construction:

- Arithmetic is exact. What is not affine in the size (a product of two, a quotient that is not the same number, or
  the same affine one, everywhere) is refused.
- A comparison is answered when the answer is one and the same over the whole span; an affine difference that has one
  sign at both ends has it between them. Otherwise it is refused, with the size at which the answer changes, and the
  planner cuts the span there.
- It never becomes a plain integer or float: `int()`, `range()`, an index, a division by it, all refuse. So no number in
  a plan can have come from one size of the span unnoticed.

The other ways, and why not: planning at several sizes and comparing shows that those agree, not that those between do
(a gcd, a padding, a power of two may differ anywhere); sympy decides the same comparisons a thousand times slower, and
answers what it cannot decide with an expression that is true.

Costs alone look at one size: `typical` gives the one that configs are chosen for. Whatever it decides, the plan is
right.
A set or dict takes two sizes that are not the same expression for different, though they may meet at one size: what is
keyed by sizes must be right when equals are kept apart. `alike` asks the same openly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
from torch.utils._sympy.printers import PythonPrinter

# What a plan's text calls the number of tokens; no value has that name.
NAME = "size"


class Undecided(Exception):
    """What was asked has no single answer over the span.

    Args:
        fact: what was asked.
        cut: the first size of the upper part with an answer of its own; None where no cut helps.
    """

    def __init__(self, fact: str, cut: int | None = None) -> None:
        super().__init__(fact)
        self.fact, self.cut = fact, cut


@dataclass(frozen=True)
class Span:
    """The sizes `lo` to `hi`, both included; costs are those of `typical`."""

    lo: int
    hi: int
    typical: int

    def size(self) -> Any:
        """The number of tokens itself: an integer where the span holds only one."""
        return _made(1, 0, self)


@dataclass(frozen=True, eq=False)
class Size:
    """`factor · size + const`; made by arithmetic on `Span.size()`, with a factor that is not 0."""

    factor: int
    const: int
    span: Span

    def at(self, size: int) -> int:
        """The number at one size."""
        return self.factor * size + self.const

    @property
    def ends(self) -> tuple[int, int]:
        """Least and greatest value over the span."""
        a, b = self.at(self.span.lo), self.at(self.span.hi)
        return min(a, b), max(a, b)

    def __str__(self) -> str:
        product = NAME if self.factor == 1 else f"{NAME} * {self.factor}"
        return product if not self.const else f"({product} {'+' if self.const > 0 else '-'} {abs(self.const)})"

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    # Exact arithmetic.

    def __add__(self, other: Any) -> Any:
        factor, const = self._parts(other)
        return _made(self.factor + factor, self.const + const, self.span)

    __radd__ = __add__

    def __neg__(self) -> Any:
        return _made(-self.factor, -self.const, self.span)

    def __sub__(self, other: Any) -> Any:
        factor, const = self._parts(other)
        return _made(self.factor - factor, self.const - const, self.span)

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __mul__(self, other: Any) -> Any:
        factor, const = self._parts(other)
        if factor:
            raise Undecided(f"the product of {self} and {other} is not linear in the size")
        return _made(self.factor * const, self.const * const, self.span)

    __rmul__ = __mul__

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return divided(self, other)

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:
        return divided(other, self)

    def __floordiv__(self, other: Any) -> Any:
        return divided(self, other)[0]

    def __rfloordiv__(self, other: Any) -> Any:
        return divided(other, self)[0]

    def __mod__(self, other: Any) -> Any:
        return divided(self, other)[1]

    def __rmod__(self, other: Any) -> Any:
        return divided(other, self)[1]

    def __abs__(self) -> Any:
        return -self if self < 0 else self

    # Comparisons with one answer.

    def __hash__(self) -> int:
        # What is remembered for one span must not answer for another.
        return hash((self.factor, self.const, self.span))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (int, Size)) or (isinstance(other, Size) and other.span != self.span):
            return False
        factor, const = self._parts(other)
        factor, const = self.factor - factor, self.const - const
        if not factor:
            return not const
        root, rest = divmod(-const, factor)
        if rest or not self.span.lo <= root <= self.span.hi:
            return False
        raise Undecided(f"{self} is {other} at {root} only", root if root > self.span.lo else root + 1)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: Any) -> bool:
        return _negative(self - other, f"{self} < {other}")

    def __gt__(self, other: Any) -> bool:
        return _negative(other - self, f"{self} > {other}")

    def __le__(self, other: Any) -> bool:
        return not self > other

    def __ge__(self, other: Any) -> bool:
        return not self < other

    def __bool__(self) -> bool:
        return self != 0

    # Never a plain number.

    def _parts(self, other: Any) -> tuple[int, int]:
        if isinstance(other, Size):
            if other.span != self.span:
                raise TypeError(f"sizes of {self.span} and of {other.span} meet")
            return other.factor, other.const
        if isinstance(other, int):
            return 0, int(other)
        raise Undecided(f"{self} meets {other!r}, which is no integer")

    def _refuse(self, *_: Any) -> Any:
        raise Undecided(f"{self} is needed as a number")

    __int__ = __index__ = __float__ = __complex__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _refuse
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __invert__ = _refuse
    __round__ = __trunc__ = __floor__ = __ceil__ = _refuse
    bit_length = _refuse


Whole: TypeAlias = "int | Size"


def _made(factor: int, const: int, span: Span) -> Any:
    """The number, an integer where it is one."""
    if not factor or span.lo == span.hi:
        return factor * span.lo + const
    return Size(factor, const, span)


def _negative(difference: Any, asked: str) -> bool:
    if not isinstance(difference, Size):
        return bool(difference < 0)
    lo, hi = difference.span.lo, difference.span.hi
    first, last = difference.at(lo) < 0, difference.at(hi) < 0
    if first == last:
        return first
    # The least size at which a rising difference is no longer negative, or a falling one has become so.
    factor, const = difference.factor, difference.const
    cut = -(const // factor) if factor > 0 else const // -factor + 1
    raise Undecided(f"{asked} changes at {cut}", cut)


def divided(x: Any, by: Any) -> tuple[Any, Any]:
    """Quotient and remainder where both are linear in the size.

    Either the divisor divides the factor, or the quotient is one and the same number everywhere.
    """
    span = x.span if isinstance(x, Size) else by.span
    if by == 0:
        raise Undecided(f"{x} is divided by nothing")
    if isinstance(x, Size) and isinstance(by, int) and x.factor % by == 0:
        return _made(x.factor // by, x.const // by, span), x.const % by
    quotient = _at(x, span.typical) // _at(by, span.typical)
    rest = x - by * quotient
    low, high = (rest, by) if _at(by, span.lo) > 0 else (-rest, -by)
    if all(0 <= _at(low, end) < _at(high, end) for end in (span.lo, span.hi)):
        return quotient, rest
    raise Undecided(f"{x} divided by {by} depends on the size")


def _at(x: Any, size: int) -> int:
    return x.at(size) if isinstance(x, Size) else x


def typical(x: Any) -> Any:
    """What a cost counts for a number that may be a `Size`."""
    return x.at(x.span.typical) if isinstance(x, Size) else x


def integer(x: Any) -> Any:
    """A concrete geometry's number: an integer, or a size."""
    return x if isinstance(x, Size) else int(x)


def alike(a: Any, b: Any) -> bool:
    """Whether two numbers are equal at every size; False where they are only at some. For whoever may treat equals as
    different."""
    if not isinstance(a, Size) or not isinstance(b, Size):
        return a is b or (not isinstance(a, Size) and not isinstance(b, Size) and a == b)
    return (a.factor, a.const, a.span) == (b.factor, b.const, b.span)


def common_divisor(*numbers: Any) -> int:
    """A number that divides all of them at every size; among plain integers the greatest."""
    parts = [part for n in numbers for part in ((n.factor, n.const) if isinstance(n, Size) else (n,))]
    return math.gcd(*parts)


def evaluated(expr: sympy.Basic, binding: Mapping[sympy.Symbol, Any]) -> Any:
    """A trace's expression with sizes for its symbols, as an integer, a `Size` or a bool."""
    names = {symbol: f"s{number}" for number, symbol in enumerate(sorted(binding, key=str))}
    scope = {"math": math, "__builtins__": {"max": max, "min": min, "abs": abs}}
    try:
        # The printer asserts that powers are whole.
        text = PythonPrinter().doprint(expr.xreplace({s: sympy.Symbol(n, integer=True) for s, n in names.items()}))
        return eval(text, scope | {names[s]: value for s, value in binding.items()})
    except (TypeError, NameError, ValueError, SyntaxError, ArithmeticError, AssertionError) as cause:
        raise Undecided(f"{expr} is not linear in the size") from cause
