"""A product whose tile brings together the halves of heads, for what rotates them.

A tile then holds two columns of the product for each of its own, half a head apart: both halves are its two
accumulators, and what needs both (a rotation) is computed where they are. Values that are computed from different heads
share the kernel, each written for its own columns only. A sum over a head (of its norm) is computed there too, where a
tile holds whole heads: of what both halves are, for every head of the tile, whichever of them need it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .affine import Affine, Bounded, Mod, Var, contiguous_strides, linear, substitution
from .composer import Composer, Refused
from .define import at_flat
from .expr import (
    Acc,
    Apply,
    Const,
    Expr,
    Load,
    Masked,
    RowScalar,
    all_of,
    apply,
    const,
    index,
    only,
    rewrite,
    varies,
    walk,
)
from .group import COL, ROW, Group, Reduction, Store
from .values import Contract, Reduce

# Columns of the widest head that is summed: as many as the widest tile for few tokens has.
WIDEST = 128


@dataclass
class Heads(Composer):
    """A composition around a product of heads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Width of half a head, and of the columns that are being written the head, counted from their first.
        self.half, self.head = 0, Affine()
        # Whether this only finds out from which columns a value is computed.
        self.probing = False
        # By name of a sum over heads the first of equal ones, and the first of the columns that it is computed from.
        self.sums: dict[str, tuple[str, int]] = {}

    def halves(self, product: Contract, half: int, sums: Sequence[Reduce] = ()) -> Group:
        """The group around this product.

        Args:
            product: whose columns come in heads.
            half: columns of half a head.
            sums: those of the members that reduce.

        Raises:
            Refused: the members are no values of such heads.
        """
        self.begin(product)
        self.half = half
        row, col = self.domain(product.m, product.n // 2)
        self.natural = row * self.cols + col
        for reduction in sums:
            self._sum(reduction, product)
        stores: list[Store] = []
        spans = [self._columns(name, product, half) for name in self.needed]
        for name, (first, width) in zip(self.needed, spans, strict=True):
            bounds = (("ge", first // 2), ("lt", (first + width) // 2))
            checks = [apply(fn, index(col), const(x, torch.int64), dtype=torch.bool) for fn, x in bounds]
            inside = all_of(check for check in checks if not isinstance(check, Const))
            self._at(first, width)
            place = row * (self.layout(name).numel // product.m) + (first if self._as_wide(name, product) else 0)
            for second in (0, half):
                made = self._store(name, place + self._column() + second, per_row=False)
                stores.append(made if inside is None else replace(made, expr=only(inside, made.expr)))
        if not self.accumulators <= {0, half}:
            # The second half of what looked like a head is computed from another head.
            raise Refused(f"columns {sorted(self.accumulators)} of %{product.name} apart are no halves of one head")
        group = self._group("gemm", tuple(stores))
        stores, names = _with_one_computation(stores, [span for span in spans for _ in (0, half)], group.names)
        return replace(group, stores=tuple(stores), names=names, contract=product, half=half)

    def _at(self, first: int, width: int) -> None:
        """Turns to the heads of so many columns of the product from the first on."""
        head = Affine.of(Var(COL, self.cols)).floordiv(self.half) - first // (2 * self.half)
        self.first, self.head = first, Affine.of(Bounded(head, width // (2 * self.half)))

    def _sum(self, made: Reduce, product: Contract) -> None:
        """A sum over each head, of what its own two accumulators are."""
        head = 2 * self.half
        whole = made.kind == "sum" and made.expr.dtype == torch.float32 and made.domain[-1] == made.cols == head
        if not whole or made.reduced != (len(made.domain) - 1,) or head > WIDEST:
            raise Refused(f"%{made.name} sums no heads of {head} columns, of {WIDEST} at most")
        first, width = self._columns(made.name, product, self.half)
        self._at(first, width)
        flat = Affine.of(Var(ROW, self.rows)) * width + self._column()
        expr = apply("add", *(self._summand(made, flat + second) for second in (0, self.half)), dtype=torch.float32)
        same = next((r.value for r in self.reductions.values() if r.half and r.expr == expr), made.name)
        self.sums[made.name] = same, first
        self.reductions.setdefault(same, Reduction(same, "sum", expr, half=self.half))

    def _summand(self, made: Reduce, flat: Affine) -> Expr:
        """What is summed, at an element of the reduction's domain."""
        expr = self._inline(made.expr, dict(enumerate(at_flat(flat, made.domain))))
        if any(isinstance(node, Load) for node in walk(expr)):
            # The heads of a tile need not be those that the load is for.
            raise Refused(f"%{made.name} sums more than the product")
        return expr

    def _row_scalar(self, reduction: Reduce, place: tuple[Affine, ...]) -> Expr:
        if reduction.name not in self.sums:
            return super()._row_scalar(reduction, place)
        same, first = self.sums[reduction.name]
        heads = reduction.rows // self.rows
        position = linear(place, contiguous_strides(reduction.layout.shape))
        if position != Affine.of(Var(ROW, self.rows)) * heads + self.head or not (self.probing or self.first == first):
            raise Refused(f"%{reduction.name} is read for another head than its own")
        return RowScalar(reduction.layout.dtype, value=same)

    def _column(self) -> Affine:
        """Column of the value that is written, in the first half of its head."""
        return self.head * (2 * self.half) + Affine.of(Var(COL, self.cols)).mod(self.half)

    def _columns(self, name: str, product: Contract, half: int) -> tuple[int, int]:
        """First and number of the product's columns that a value is computed from, each element from its own and the
        one half a head away."""
        if self._as_wide(name, product) and name in self.returned:
            return self._read(name, product)
        if name == product.name:
            return 0, product.n
        known, used = ({}, 0) if self.elements is None else (self.elements.columns, self.elements.above[name])
        key = name, product.name, half, self.mask & used
        if key not in known:
            known[key] = self._probed(name, product, half)
        if isinstance(found := known[key], str):
            raise Refused(found)
        return found

    def _probed(self, name: str, product: Contract, half: int) -> tuple[int, int] | str:
        """The same for another value than the product; or why there are none."""
        made = self.values.definitions[name]
        numel = made.rows * made.cols if isinstance(made, Reduce) else self.layout(name).numel
        width = numel // product.m
        if numel % product.m or not width or width % (2 * half):
            return f"%{name} does not consist of heads of {2 * half} columns"
        probe = replace(self)
        probe.begin(product)
        probe.half, probe.probing = half, True
        # It reads the sums that are known by now, and adds none.
        probe.sums = self.sums
        row, col = probe.domain(product.m, width // 2)
        probe.head = col.floordiv(half)
        flat = row * width + probe._column()
        try:
            if isinstance(made, Reduce):
                probe._summand(made, flat)
            else:
                probe._store(name, flat, per_row=False)
        except Refused as reason:
            return str(reason)
        first = min(probe.accumulators, default=0)
        if not probe.accumulators <= {first, first + half} or first % (2 * half) or first + width > product.n:
            return f"%{name} reads columns {sorted(probe.accumulators)} of %{product.name} apart"
        return first, width

    def _as_wide(self, name: str, product: Contract) -> bool:
        """Whether a value's columns are the product's: itself, or itself scaled."""
        layout = self.layout(name)
        return (layout.shape, layout.stride) == (product.layout.shape, product.layout.stride)

    def _read(self, name: str, product: Contract) -> tuple[int, int]:
        """First and number of a returned value's columns that hold all the caller sees, in whole heads."""
        seen = []
        for output in self.values.outputs:
            if output.kind == "value" and self.values.base(output.ref) == name:
                view = self.values.views.get(output.ref)
                layout = view.layout if view is not None else product.layout
                first, width = view.offset if view is not None else 0, math.prod(layout.shape[1:])
                inner = layout.stride[1:] == contiguous_strides(layout.shape[1:])
                if layout.stride[:1] != (product.n,) or not inner or first + width > product.n:
                    return 0, product.n
                seen.append((first, first + width))
        head = 2 * self.half
        first = min(start for start, _ in seen) // head * head
        return first, -(-max(end for _, end in seen) // head) * head - first

    def _accumulator(self, product: Contract, place: tuple[Affine, ...]) -> Expr:
        """The accumulator that holds this element of a product whose heads' halves are brought together."""
        own = self._column() + self.first
        atoms = {atom for atom, _ in self.head.terms if isinstance(atom, Bounded)}
        apart = (place[1] - own).substitute(lambda atom: atom.base if atom in atoms else None)
        if place[0] != Affine.of(Var(ROW, self.rows)) or apart.terms:
            raise Refused(f"%{product.name} is read away from the tile that holds it")
        self.accumulators.add(apart.const)
        return Acc(product.layout.dtype, value=product.name, which=int(apart.const == self.half))

    def _substituted(self, expr: Expr, place: Mapping[int, Affine], leaf: Callable[[Expr], Expr | None]) -> Expr:
        """First the indices alone: what they rule out (the other half's branch of a cat) is not read anywhere."""
        return rewrite(rewrite(expr, substitution(place)), new_leaf=leaf)


# Reads between which a merged computation chooses, at most: a norm's weight and bias, for either half.
CHOICES = 4


def _with_one_computation(
    stores: list[Store], spans: Sequence[tuple[int, int]], names: Mapping[Expr, str]
) -> tuple[list[Store], Mapping[Expr, str]]:
    """Values of different heads that differ only in what they read by column, as q and k do in the weights of their
    norms: those are chosen by column, and the rest is computed once for both.

    Args:
        stores: as they are computed one by one.
        spans: first and number of the columns of each.
        names: for the reader, which value an expression is.

    Returns:
        the stores and the names.
    """
    merged, known = list(stores), dict(names)
    for i, first in enumerate(stores):
        for j in range(i + 1, len(stores)):
            a, b = first.expr, merged[j].expr
            (start, width), (other, its_width) = spans[i], spans[j]
            if start < other + its_width and other < start + width:
                continue
            if not (isinstance(a, Masked) and isinstance(b, Masked)) or a.body == b.body:
                continue
            choices: dict[tuple[Expr, Expr], Expr | None] = {}
            both = _either(a.cond, a.body, b.body, choices)
            if both is None or sum(isinstance(x, Load) for x, _ in choices) > CHOICES:
                continue
            merged[i], merged[j] = (replace(merged[n], expr=only(e.cond, both)) for n, e in ((i, a), (j, b)))
            known.update((made, known[x]) for (x, _), made in choices.items() if made is not None and x in known)
            break
    return merged, known


def _either(cond: Expr, a: Expr, b: Expr, made: dict[tuple[Expr, Expr], Expr | None]) -> Expr | None:
    """`a` where the condition holds and `b` elsewhere, as one computation on reads of either; None if they are no such
    two. What was made of each pair that differs is kept."""
    if a == b:
        return a
    if (a, b) not in made:
        both: Expr | None = None
        if isinstance(a, Load) and isinstance(b, Load) and a.dtype == b.dtype and _anywhere(a) and _anywhere(b):
            both = apply("where", cond, a, b, dtype=a.dtype)
        elif (
            isinstance(a, Apply)
            and isinstance(b, Apply)
            and (a.fn, a.dtype, len(a.args)) == (b.fn, b.dtype, len(b.args))
        ):
            args = [_either(cond, x, y, made) for x, y in zip(a.args, b.args, strict=True)]
            both = None if None in args else replace(a, args=tuple(arg for arg in args if arg is not None))
        made[a, b] = both
    return made[a, b]


def _anywhere(read: Load) -> bool:
    """Whether a read is in range at every column, and the same for all rows."""
    return not varies(read, ROW) and all(isinstance(atom, (Var, Mod)) for atom in read.offset.atoms())
