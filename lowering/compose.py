"""What may share a kernel: values composed over a two-dimensional domain of rows and columns.

`compose` is the whole legality of fusion. Given the values that shall share a kernel and those of them that others
need, it finds a domain (a GEMM's tile space, a reduction's rows, or the elements of what is stored), writes every
stored value as one expression over it, and refuses, with the reason, when there is none. Reading another value inside
the kernel is always correct algebra, at any index: its expression is inlined with the index substituted. Only two
things cannot be inlined and must match the domain: the result of a reduction (it belongs to this row) and a GEMM's
accumulator (it belongs to this tile).

A GEMM's tile may hold two columns of the product for each of its own: a fixed distance apart (gate and up of a GLU), or
the halves of a head (a rotation). Then values that are computed from different heads share the kernel as well, each
written for its own columns only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .affine import Affine, Bounded, Var, contiguous_strides, delinearize, linear, substitution
from .define import at_flat
from .elements import Elements
from .expr import (
    Acc,
    Apply,
    Const,
    Expr,
    Load,
    RowScalar,
    all_of,
    apply,
    const,
    index,
    only,
    rewrite,
    walk,
)
from .group import BODY_LIMIT, COL, EXPENSIVE, FEW_TOKENS, ROW, Group, Reduction, Store, too_long
from .size import alike, typical
from .values import Contract, Extern, Item, Layout, Map, Reduce, Values


class Refused(Exception):
    """Why these values do not share a kernel."""


def compose(
    members: Collection[str],
    needed: Collection[str],
    values: Values,
    inlined: Collection[str],
    cols: int = 0,
    elements: Elements | None = None,
    returned: Collection[str] = (),
) -> Group:
    """One kernel for these values.

    Args:
        members: names of the values to compute here.
        needed: those of them that must be in memory afterwards.
        values: all definitions.
        inlined: values that every reader computes for itself.
        cols: for a pointwise group, how its elements are cut into columns; 0 for one long row.
        returned: those of `needed` that only the caller of the piece reads.
        elements: kept for further compositions of the piece; the group's `names` are then not complete.

    Raises:
        Refused: they do not fit one kernel.
    """
    order = [n for n in values.definitions if n in members]
    made = [values.definitions[n] for n in order]
    if len(made) == 1 and not isinstance(made[0], (Map, Reduce, Contract)):
        return _alone(order, made[0])
    if any(isinstance(v, (Extern, Item)) for v in made):
        raise Refused("an op that runs as itself shares no kernel")
    composer = _Composer(
        order, tuple(n for n in order if n in needed), values, frozenset(inlined), elements, frozenset(returned)
    )
    products = [v for v in made if isinstance(v, Contract)]
    reductions = [v for v in made if isinstance(v, Reduce)]
    if len(products) > 1:
        raise Refused("two matrix products need two kernels")
    if products and reductions:
        raise Refused("a reduction needs the whole row, a GEMM tile holds only some of its columns")
    if products:
        return _product(composer, products[0])
    return composer.row(reductions) if reductions else composer.pointwise(cols)


def _alone(order: list[str], made: object) -> Group:
    if isinstance(made, Extern):
        return Group("extern", tuple(order), 0, 0, foreign=made)
    return Group("item" if isinstance(made, Item) else "empty", tuple(order), 0, 0)


# Halves of heads that a tile may bring together.
HALVES = (128, 64, 32, 16)


def _product(composer: _Composer, product: Contract) -> Group:
    """A product and what follows it: column by column, pairs of columns a fixed distance apart, or halves of heads."""
    try:
        return composer.gemm(product)
    except Refused as reason:
        results = [composer.layout(n).shape for n in composer.needed if n != product.name]
        widths = {shape[-1] for shape in results if shape}
        for half in HALVES if len(composer.order) > 1 and product.m <= FEW_TOKENS else ():
            if product.n % (2 * half) == 0 and 2 * half in widths:
                try:
                    return replace(composer).halves(product, half)
                except Refused:
                    continue
        raise reason from None


@dataclass
class _Composer:
    order: list[str]
    needed: tuple[str, ...]
    values: Values
    inlined: frozenset[str]
    elements: Elements | None = None
    returned: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.mask = self.elements.mask(self.order) if self.elements is not None else 0
        self.rows = self.cols = 0
        self.memo: dict[tuple[str, tuple[Affine, ...], int], Expr] = {}
        self.reductions: dict[str, Reduction] = {}
        self.natural: Affine = Affine()
        self.product: Contract | None = None
        self.accumulators: set[int] = set()
        # Where halves of heads are brought together: their width, and of the columns that are being written the first
        # and the head, counted from there.
        self.half, self.first, self.head = 0, 0, Affine()

    def domain(self, rows: int, cols: int) -> tuple[Affine, Affine]:
        self.rows, self.cols = rows, cols
        return Affine.of(Var(ROW, rows)), Affine.of(Var(COL, cols))

    # The three kinds of kernel.

    def pointwise(self, cols: int) -> Group:
        sizes = {self.layout(n).numel for n in self.needed}
        if len(sizes) > 1:
            raise Refused(f"results of {' and '.join(map(str, sorted(sizes)))} elements are not one loop")
        numel = sizes.pop() if sizes else self.layout(self.order[-1]).numel
        cols = cols if cols and numel % cols == 0 else max(numel, 1)
        row, col = self.domain(numel // cols if cols else 0, cols)
        self.natural = row * cols + col
        stores = tuple(self._store(n, self.natural, per_row=False) for n in self.needed)
        return self._group("pointwise", stores)

    def row(self, reductions: Sequence[Reduce]) -> Group:
        first = reductions[0]
        row, col = self.domain(first.rows, first.cols)
        kept = [i for i in range(len(first.domain)) if i not in first.reduced]
        place: list[Affine] = [Affine()] * len(first.domain)
        for dims, position in ((kept, row), (list(first.reduced), col)):
            for dim, at in zip(dims, at_flat(position, [first.domain[i] for i in dims]), strict=True):
                place[dim] = at
        self.natural = linear(place, contiguous_strides(first.domain))
        for reduction in reductions:
            self._reduction(reduction, row)
        stores = []
        for name in self.needed:
            numel = self.layout(name).numel
            made = self.values.definitions[name]
            running = isinstance(made, Reduce) and made.running
            if not running and (name in self.reductions or alike(numel, self.rows)):
                stores.append(self._store(name, row, per_row=True))
            elif alike(numel, self.rows * self.cols):
                stores.append(self._store(name, self.natural, per_row=False))
            else:
                raise Refused(f"%{name} has {numel} elements, the rows hold {self.rows} × {self.cols}")
        return self._group("row", tuple(stores))

    def gemm(self, product: Contract) -> Group:
        if {product.a.base, product.b.base} & set(self.order):
            raise Refused(f"the operands of %{product.name} are read from memory")
        self.product = product
        results = [n for n in self.needed if n != product.name]
        sizes = {self.layout(n).numel for n in results} or {product.m * product.n}
        if product.name in self.needed:
            sizes.add(product.m * product.n)
        if len(sizes) > 1:
            raise Refused(f"results of {sorted(sizes)} elements do not share the tiles of %{product.name}")
        numel = sizes.pop()
        if numel % product.m or numel == 0:
            raise Refused(f"{numel} elements do not divide into the {product.m} rows of %{product.name}")
        row, col = self.domain(product.m, numel // product.m)
        self.natural = row * self.cols + col
        stores = tuple(self._store(n, self.natural, per_row=False) for n in self.needed)
        distances = sorted(self.accumulators)
        if not distances or distances[0] != 0 or len(distances) > 2:
            raise Refused(f"columns {distances or 'none'} of %{product.name} apart: at most two tiles are paired")
        pair = distances[1] if len(distances) == 2 else None
        if (pair or 0) + self.cols > product.n or (pair is not None and pair < self.cols):
            raise Refused(f"paired columns overlap in %{product.name}")
        stores = tuple(replace(s, expr=_numbered(s.expr, pair)) for s in stores)
        group = self._group("gemm", stores)
        names = {_numbered(expr, pair): name for expr, name in group.names.items()}
        return replace(group, contract=product, pair=pair, names=names)

    def halves(self, product: Contract, half: int) -> Group:
        if {product.a.base, product.b.base} & set(self.order):
            raise Refused(f"the operands of %{product.name} are read from memory")
        self.product, self.half = product, half
        row, col = self.domain(product.m, product.n // 2)
        self.natural = row * self.cols + col
        stores: list[Store] = []
        spans = [self._columns(name, product, half) for name in self.needed]
        for name, (first, width) in zip(self.needed, spans, strict=True):
            bounds = (("ge", first // 2), ("lt", (first + width) // 2))
            checks = [apply(fn, index(col), const(x, torch.int64), dtype=torch.bool) for fn, x in bounds]
            inside = all_of(check for check in checks if not isinstance(check, Const))
            head = col.floordiv(half) - first // (2 * half)
            self.first, self.head = first, Affine.of(Bounded(head, width // (2 * half)))
            place = row * product.n + first if name == product.name else row * width
            for second in (0, half):
                made = self._store(name, place + self._column() + second, per_row=False)
                stores.append(made if inside is None else replace(made, expr=only(inside, made.expr)))
        if not self.accumulators <= {0, half}:
            # The second half of what looked like a head is computed from another head.
            raise Refused(f"columns {sorted(self.accumulators)} of %{product.name} apart are no halves of one head")
        return replace(self._group("gemm", tuple(stores)), contract=product, half=half)

    def _column(self) -> Affine:
        """Column of the value that is written, in the first half of its head."""
        return self.head * (2 * self.half) + Affine.of(Var(COL, self.cols)).mod(self.half)

    def _columns(self, name: str, product: Contract, half: int) -> tuple[int, int]:
        """First and number of the product's columns that a value is computed from, each element from its own and the
        one half a head away."""
        if name == product.name:
            return self._read(product) if name in self.returned else (0, product.n)
        known, used = ({}, 0) if self.elements is None else (self.elements.columns, self.elements.above[name])
        key = name, product.name, half, self.mask & used
        if key not in known:
            known[key] = self._probed(name, product, half)
        if isinstance(found := known[key], str):
            raise Refused(found)
        return found

    def _probed(self, name: str, product: Contract, half: int) -> tuple[int, int] | str:
        """The same for another value than the product; or why there are none."""
        numel = self.layout(name).numel
        width = numel // product.m
        if numel % product.m or not width or width % (2 * half):
            return f"%{name} does not consist of heads of {2 * half} columns"
        probe = replace(self)
        probe.product, probe.half = product, half
        row, col = probe.domain(product.m, width // 2)
        probe.head = col.floordiv(half)
        try:
            probe._store(name, row * width + probe._column(), per_row=False)
        except Refused as reason:
            return str(reason)
        first = min(probe.accumulators, default=0)
        if not probe.accumulators <= {first, first + half} or first % (2 * half) or first + width > product.n:
            return f"%{name} reads columns {sorted(probe.accumulators)} of %{product.name} apart"
        return first, width

    def _read(self, product: Contract) -> tuple[int, int]:
        """First and number of a returned product's columns that hold all the caller sees, in whole heads."""
        seen = []
        for output in self.values.outputs:
            if output.kind == "value" and self.values.base(output.ref) == product.name:
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

    def _group(self, kind: str, stores: tuple[Store, ...]) -> Group:
        names = {expr: name for (name, *_), expr in self.memo.items()}
        group = Group(
            kind, tuple(self.order), self.rows, self.cols, tuple(self.reductions.values()), stores, names=names
        )
        if len(self.order) > 1 and too_long([*(r.expr for r in group.reductions), *(s.expr for s in stores)]):
            raise Refused(f"a body of more than {BODY_LIMIT} operations")
        return group

    # Expressions.

    def layout(self, name: str) -> Layout:
        return self.values.layouts[name]

    def _store(self, name: str, flat: Affine, per_row: bool) -> Store:
        layout = self.layout(name)
        place = at_flat(flat, layout.shape)
        return Store(name, linear(place, layout.stride), self._element(name, place), per_row)

    def _element(self, name: str, place: tuple[Affine, ...]) -> Expr:
        """The element of a member at this index, everything of this kernel inlined."""
        made = self.values.definitions[name]
        layout = self.layout(name)
        if isinstance(made, Reduce):
            return self._row_scalar(made, place)
        if isinstance(made, Contract):
            return self._accumulator(made, place)
        key = name, place, self.first
        if key not in self.memo:
            assert isinstance(made, Map)
            self.memo[key] = self._mapped(made, place)
        return self.memo[key] if layout.numel else const(0, layout.dtype)

    def _mapped(self, made: Map, place: tuple[Affine, ...]) -> Expr:
        """A map's element, as an earlier composition has it where that is the same."""
        if self.elements is None or (used := self.mask & self.elements.above[made.name]) & self.elements.tied:
            return self._computed(made, place)
        known, key = self.elements.known, (made.name, place, used, self.rows, self.cols)
        if key not in known:
            known[key] = self._computed(made, place)
        return known[key]

    def _computed(self, made: Map, place: tuple[Affine, ...]) -> Expr:
        self._check_repeated(made, place)
        return self._inline(made.expr, dict(enumerate(place)))

    def _inline(self, expr: Expr, place: Mapping[int, Affine]) -> Expr:
        def leaf(node: Expr) -> Expr | None:
            if not isinstance(node, Load) or (node.value not in self.order and node.value not in self.inlined):
                return None
            layout = self.layout(node.value)
            return self._element(node.value, delinearize(node.offset, layout.shape, layout.stride))

        if self.half:
            # First the indices alone: what they rule out (the other half's branch of a cat) is not read anywhere.
            return rewrite(rewrite(expr, substitution(place)), new_leaf=leaf)
        return rewrite(expr, substitution(place), leaf)

    def _reduction(self, reduction: Reduce, row: Affine) -> None:
        if not (alike(reduction.rows, self.rows) and alike(reduction.cols, self.cols)):
            raise Refused(
                f"%{reduction.name} reduces {reduction.rows} × {reduction.cols}, "
                f"the rows hold {self.rows} × {self.cols}"
            )
        place = at_flat(self.natural, reduction.domain)
        kept = [i for i in range(len(reduction.domain)) if i not in reduction.reduced]
        shape = [reduction.domain[i] for i in kept]
        if linear([place[i] for i in kept], contiguous_strides(shape)) != row:
            raise Refused(f"%{reduction.name} reduces other dimensions")
        expr = self._inline(reduction.expr, dict(enumerate(place)))
        self.reductions[reduction.name] = Reduction(reduction.name, reduction.kind, expr)

    def _row_scalar(self, reduction: Reduce, place: tuple[Affine, ...]) -> Expr:
        position = linear(place, contiguous_strides(reduction.layout.shape))
        if position != (self.natural if reduction.running else Affine.of(Var(ROW, self.rows))):
            raise Refused(f"%{reduction.name} is read for another row than the one in registers")
        if reduction.name not in self.reductions:
            raise Refused(f"%{reduction.name} is read before it is complete")
        return RowScalar(reduction.layout.dtype, value=reduction.name)

    def _accumulator(self, product: Contract, place: tuple[Affine, ...]) -> Expr:
        if self.half:
            return self._half(product, place)
        distance = place[1] - Affine.of(Var(COL, self.cols))
        if place[0] != Affine.of(Var(ROW, self.rows)) or distance.terms:
            raise Refused(f"%{product.name} is read away from the tile that holds it")
        self.accumulators.add(distance.const)
        return Acc(product.layout.dtype, value=product.name, which=distance.const)

    def _half(self, product: Contract, place: tuple[Affine, ...]) -> Expr:
        """The accumulator that holds this element of a product whose heads' halves are brought together."""
        own = self._column() + self.first
        atoms = {atom for atom, _ in self.head.terms if isinstance(atom, Bounded)}
        apart = (place[1] - own).substitute(lambda atom: atom.base if atom in atoms else None)
        if place[0] != Affine.of(Var(ROW, self.rows)) or apart.terms:
            raise Refused(f"%{product.name} is read away from the tile that holds it")
        self.accumulators.add(apart.const)
        return Acc(product.layout.dtype, value=product.name, which=int(apart.const == self.half))

    def _check_repeated(self, made: Map, place: tuple[Affine, ...]) -> None:
        """Expensive work on a small value is not repeated for every element of a large domain."""
        variables = {a.dim for i in place for a in i.atoms() if isinstance(a, Var)}
        domain, own = typical(self.rows) * typical(self.cols), max(typical(made.layout.numel), 1)
        if variables != {ROW, COL} or domain <= 4 * own:
            return
        if any(isinstance(n, Apply) and n.fn in EXPENSIVE for n in walk(made.expr)):
            raise Refused(f"%{made.name} would be computed {domain // own} times")


def _numbered(expr: Expr, pair: int | None) -> Expr:
    """Accumulators by number instead of by column distance."""
    return rewrite(
        expr,
        new_leaf=lambda leaf: (
            Acc(leaf.dtype, value=leaf.value, which=int(leaf.which == pair)) if isinstance(leaf, Acc) else None
        ),
    )
