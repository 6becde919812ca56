"""Integer index arithmetic over concrete sizes: the offsets at which tensors are read and written.

An `Affine` is `const + Σ coefficient · atom`. Atoms know the range they lie in, so that divisions and remainders that a
view introduces fold away exactly when the numbers allow it: reading `[m, h, d]` of a `[16, 32, 128]` view at
`4096·m + 128·h + d` and asking for the row of the `[16, 4096]` base gives `m`, without a division at run time.

Only what index arithmetic of strided tensors needs is here; shapes with symbols are sympy's business (`specialize.py`).
In a plan for a range of sizes some of the integers are `Size`s, which answer for all of them or refuse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from .size import Size, common_divisor

if TYPE_CHECKING:
    from .expr import Expr


@dataclass(frozen=True)
class Var:
    """Dimension `dim` of a value's domain: an integer in [0, size)."""

    dim: int
    size: int

    @property
    def range(self) -> tuple[int, int]:
        return 0, self.size - 1


@dataclass(frozen=True)
class Div:
    """`base // divisor` of a base that is never negative, where Triton's `//`, which rounds towards zero, agrees; built
    by `Affine.floordiv` only."""

    base: Affine
    divisor: int

    @property
    def range(self) -> tuple[int, int]:
        lo, hi = self.base.range
        return lo // self.divisor, hi // self.divisor


@dataclass(frozen=True)
class Mod:
    """`base mod divisor`, in [0, divisor), of a base that is never negative; built by `Affine.mod` only."""

    base: Affine
    divisor: int

    @property
    def range(self) -> tuple[int, int]:
        return 0, self.divisor - 1


@dataclass(frozen=True)
class Bounded:
    """`base`, known to lie in [0, size) wherever it is used (the branch of a cat that is taken, a masked slice)."""

    base: Affine
    size: int

    @property
    def range(self) -> tuple[int, int]:
        return 0, self.size - 1


@dataclass(frozen=True)
class Indirect:
    """An index read from memory or computed from values: an integer expression in [0, size)."""

    value: Expr
    size: int

    @property
    def range(self) -> tuple[int, int]:
        return 0, self.size - 1


Atom: TypeAlias = "Var | Div | Mod | Bounded | Indirect"


@dataclass(frozen=True, eq=False)
class Affine:
    """`const + Σ coefficient · atom`, with atoms in a fixed order and no zero coefficient."""

    terms: tuple[tuple[Atom, int], ...] = ()
    const: int = 0
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((frozenset(self.terms), self.const)))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Affine) or self._hash != other._hash or self.const != other.const:
            return False
        return self.terms == other.terms or dict(self.terms) == dict(other.terms)

    @staticmethod
    def of(value: int | Atom | Affine) -> Affine:
        """The affine form of an integer or of one atom (an atom that can only be 0 vanishes)."""
        if isinstance(value, Affine):
            return value
        if isinstance(value, (int, Size)):
            return Affine((), value)  # type: ignore[arg-type]
        if isinstance(value, Bounded):
            return bounded(value.base, value.size)
        if value.range == (0, 0) or value.range == (0, -1):
            return Affine((), 0)
        return Affine(((value, 1),), 0)

    @functools.cached_property
    def range(self) -> tuple[int, int]:
        """Smallest and largest value, from the atoms' ranges."""
        lo = hi = self.const
        for atom, coefficient in self.terms:
            a, b = atom.range
            lo, hi = lo + min(a * coefficient, b * coefficient), hi + max(a * coefficient, b * coefficient)
        return lo, hi

    def __add__(self, other: int | Affine) -> Affine:
        other = Affine.of(other)
        if not other.terms:
            return self if _is(other.const, 0) else Affine(self.terms, self.const + other.const)
        if not self.terms:
            return other if _is(self.const, 0) else Affine(other.terms, self.const + other.const)
        terms = dict(self.terms)
        for atom, coefficient in other.terms:
            terms[atom] = terms.get(atom, 0) + coefficient
        total = Affine(tuple((a, c) for a, c in terms.items() if c), self.const + other.const)
        return _rejoin(total)

    def __sub__(self, other: int | Affine) -> Affine:
        return self + Affine.of(other) * -1

    def __mul__(self, factor: int) -> Affine:
        if _is(factor, 1):
            return self
        if factor == 0:
            return Affine()
        return Affine(tuple((a, c * factor) for a, c in self.terms), self.const * factor)

    def _split(self, divisor: int) -> tuple[Affine, Affine]:
        """(quotient, rest) with self = divisor · quotient + rest, divisible terms moved out of the rest."""
        whole = tuple((a, c // divisor) for a, c in self.terms if c % divisor == 0)
        rest = tuple((a, c) for a, c in self.terms if c % divisor)
        return Affine(whole, self.const // divisor), Affine(rest, self.const % divisor)

    def floordiv(self, divisor: int) -> Affine:
        """`self // divisor` for a positive divisor, folded where ranges allow."""
        if divisor == 1:
            return self
        quotient, rest = self._split(divisor)
        lo, hi = rest.range
        if lo // divisor == hi // divisor:
            return quotient + lo // divisor
        common = common_divisor(divisor, *(c for _, c in rest.terms))
        if common > 1:
            rest, divisor = (
                Affine(tuple((a, c // common) for a, c in rest.terms), rest.const // common),
                divisor // common,
            )
            return quotient + rest.floordiv(divisor)
        coarse = _coarse(rest, divisor)
        if coarse is not None:
            step, big, _ = coarse
            return quotient + big.floordiv(divisor // step)
        if len(rest.terms) == 1 and isinstance(rest.terms[0][0], Div) and rest.terms[0][1] == 1 and rest.const == 0:
            inner = rest.terms[0][0]
            return quotient + inner.base.floordiv(inner.divisor * divisor)
        below = min(lo // divisor, 0)
        return quotient + Affine.of(Div(rest - below * divisor, divisor)) + below

    def mod(self, divisor: int) -> Affine:
        """`self mod divisor` (never negative) for a positive divisor, folded where ranges allow."""
        if divisor == 1:
            return Affine()
        rest = self._split(divisor)[1]
        lo, hi = rest.range
        if lo // divisor == hi // divisor:
            return rest - (lo // divisor) * divisor
        common = common_divisor(divisor, rest.const, *(c for _, c in rest.terms))
        if common > 1:
            inner = Affine(tuple((a, c // common) for a, c in rest.terms), rest.const // common)
            return inner.mod(divisor // common) * common
        coarse = _coarse(rest, divisor)
        if coarse is not None:
            step, big, small = coarse
            return big.mod(divisor // step) * step + small
        return Affine.of(Mod(rest - min(lo // divisor, 0) * divisor, divisor))

    def substitute(self, new: Callable[[Atom], Affine | None]) -> Affine:
        """Every atom replaced by `new(atom)`; where that is None, the atom's own parts are substituted."""
        out, changed = Affine((), self.const), False
        for atom, coefficient in self.terms:
            replaced = new(atom)
            if replaced is None:
                replaced = _rebuild(atom, new)
            changed = changed or replaced.terms != ((atom, 1),) or not _is(replaced.const, 0)
            out = out + replaced * coefficient
        return out if changed else self

    @functools.cached_property
    def looked_up(self) -> tuple[Expr, ...]:
        """The expressions inside its indices."""
        return tuple(a.value for a in self.atoms() if isinstance(a, Indirect))

    def varies(self, dim: int) -> bool:
        """Whether it differs along a variable, other than by what an `Indirect` looks up."""
        return any(isinstance(atom, Var) and atom.dim == dim for atom in self.atoms())

    def atoms(self) -> Iterable[Atom]:
        """Every atom, nested ones included (those inside an `Indirect`'s expression are not)."""
        for atom, _ in self.terms:
            yield atom
            if isinstance(atom, (Div, Mod, Bounded)):
                yield from atom.base.atoms()


def _is(number: int, other: int) -> bool:
    """Whether this is that very number; of a size, which stands for many, it is not asked."""
    return type(number) is int and number == other


def _coarse(rest: Affine, divisor: int) -> tuple[int, Affine, Affine] | None:
    """(step, big, small) with rest = step · big + small, step a divisor of `divisor` and small in [0, step), if there
    is one.

    Then small decides neither the quotient nor how far the remainder wraps.
    """
    for bound in sorted({abs(c) for _, c in rest.terms}):
        big = [(a, c) for a, c in rest.terms if abs(c) >= bound]
        step = common_divisor(divisor, *(c for _, c in big))
        if step == 1:
            continue
        small = Affine(tuple((a, c) for a, c in rest.terms if abs(c) < bound), rest.const % step)
        lo, hi = small.range
        if 0 <= lo and hi < step and (small.terms or rest.const % step):
            return step, Affine(tuple((a, c // step) for a, c in big), rest.const // step), small
    return None


def _rejoin(total: Affine) -> Affine:
    """`c·(b // c) + b mod c` written as `b`, at any common factor."""
    if not any(isinstance(atom, Mod) for atom, _ in total.terms):
        return total
    terms = dict(total.terms)
    for atom, factor in total.terms:
        if isinstance(atom, Mod):
            whole = Div(atom.base, atom.divisor)
            if terms.get(whole) == factor * atom.divisor:
                del terms[whole], terms[atom]
                return Affine(tuple(terms.items()), total.const) + atom.base * factor
    return total


def _rebuild(atom: Atom, new: Callable[[Atom], Affine | None]) -> Affine:
    if isinstance(atom, Div):
        return atom.base.substitute(new).floordiv(atom.divisor)
    if isinstance(atom, Mod):
        return atom.base.substitute(new).mod(atom.divisor)
    if isinstance(atom, Bounded):
        return bounded(atom.base.substitute(new), atom.size)
    return Affine.of(atom)


def bounded(base: Affine, size: int) -> Affine:
    """`base` with the promise that it lies in [0, size) where it is used."""
    lo, hi = base.range
    if 0 <= lo and hi < size:
        return base
    if size == 1:
        return Affine()
    return Affine(((Bounded(base, size), 1),), 0)


def variables(sizes: Sequence[int]) -> tuple[Affine, ...]:
    """One variable per dimension; a dimension of size 1 (or 0) is the constant 0."""
    return tuple(Affine.of(Var(i, s)) for i, s in enumerate(sizes))


def linear(index: Sequence[Affine], strides: Sequence[int], offset: int = 0) -> Affine:
    """`offset + Σ index · stride`."""
    out = Affine((), offset)
    for i, s in zip(index, strides, strict=True):
        out = out + i * s
    return out


def contiguous_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def delinearize(offset: Affine, sizes: Sequence[int], strides: Sequence[int]) -> tuple[Affine, ...]:
    """The index at which a dense tensor of these sizes and strides holds its element at `offset`.

    Args:
        offset: elements from the tensor's first one.
        sizes, strides: of a dense tensor, its dimensions in any order of stride; where a stride is 0 all indices mean
            the same element, and 0 is the answer.
    """
    return _delinearized(offset, tuple(sizes), tuple(strides))


# Fusion composes the same values again and again: half its time on a graph of sixty nodes went into these divisions.
# A `Size` is equal to those of its own span only, so what is remembered for one range never answers for another.
@functools.lru_cache(maxsize=1 << 16)
def _delinearized(offset: Affine, sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Affine, ...]:
    index: list[Affine] = [Affine()] * len(sizes)
    rest = offset
    order = sorted((d for d in range(len(sizes)) if sizes[d] > 1 and strides[d]), key=lambda d: -strides[d])
    for d in order:
        index[d] = rest.floordiv(strides[d])
        rest = rest.mod(strides[d])
    return tuple(index)


def substitution(mapping: Mapping[int, Affine]) -> Callable[[Atom], Affine | None]:
    """For `Affine.substitute`: variables replaced by dimension number."""

    def new(atom: Atom) -> Affine | None:
        return mapping[atom.dim] if isinstance(atom, Var) and atom.dim in mapping else None

    return new
