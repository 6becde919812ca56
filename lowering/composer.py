"""How one kernel is composed: a domain of rows and columns, and every value of it as an expression over that.

`compose.py` says what may share a kernel and asks for it here: pointwise, rows, a product with what follows it column
by column. Only two things cannot be inlined and must match the domain: the result of a reduction (it belongs to this
row) and a GEMM's accumulator (it belongs to this tile). Whatever does not fit raises `Refused`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from .affine import Affine, Var, contiguous_strides, delinearize, linear, substitution
from .define import at_flat
from .elements import Elements
from .expr import Acc, Apply, Expr, Load, RowScalar, const, rewrite, walk
from .group import BODY_LIMIT, COL, EXPENSIVE, ROW, Group, Reduction, Store, too_long
from .size import alike, typical
from .values import Contract, Layout, Map, Parts, Reduce, SumOfParts, Values


class Refused(Exception):
    """Why these values do not share a kernel."""


@dataclass
class Composer:
    """One composition: domain, expressions, what of the members belongs to this very kernel.

    Args:
        order: the members, in order.
        needed, values, inlined, elements, returned: as for `compose.compose`.
    """

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
        self.accumulators: set[int] = set()
        # Of the columns that are being written the first, where they are not those of the domain (heads.py).
        self.first = 0

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
        self.begin(product)
        summed = {n for n in self.needed if isinstance(self.values.definitions[n], Parts)}
        results = [n for n in self.needed if n != product.name and n not in summed]
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
        stores = tuple(
            self._parts(n, row, col) if n in summed else self._store(n, self.natural, per_row=False)
            for n in self.needed
        )
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

    def begin(self, product: Contract) -> None:
        """Composes around a product: what it reads, and its epilogue's row scalars, are what earlier kernels left."""
        if {product.a.base, product.b.base} & set(self.order):
            raise Refused(f"the operands of %{product.name} are read from memory")
        for name in self.order:
            made = self.values.definitions[name]
            if isinstance(made, SumOfParts):
                if not alike(made.rows, product.m):
                    raise Refused(f"%{name} sums {made.rows} rows, %{product.name} has others")
                if name in self.needed:
                    raise Refused(f"every tile of a row computes %{name}, none stores it")
                self.reductions[name] = Reduction(name, made.kind, made.expr, made.cols)

    def _parts(self, name: str, row: Affine, col: Affine) -> Store:
        """Sums over a tile's columns, for a kernel that then sums whole rows."""
        made = self.values.definitions[name]
        assert isinstance(made, Parts)
        rows, parts, width = made.domain
        if not alike(rows, self.rows) or parts * width != self.cols:
            raise Refused(f"%{name} sums {rows} × {parts} parts of rows that are others")
        place = row, col.floordiv(width), col.mod(width)
        offset = linear(place[:2], made.layout.stride)
        return Store(name, offset, self._inline(made.expr, dict(enumerate(place))), False, width)

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

        return self._substituted(expr, place, leaf)

    def _substituted(self, expr: Expr, place: Mapping[int, Affine], leaf: Callable[[Expr], Expr | None]) -> Expr:
        """The expression at this index, leaves replaced."""
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
        distance = place[1] - Affine.of(Var(COL, self.cols))
        if place[0] != Affine.of(Var(ROW, self.rows)) or distance.terms:
            raise Refused(f"%{product.name} is read away from the tile that holds it")
        self.accumulators.add(distance.const)
        return Acc(product.layout.dtype, value=product.name, which=distance.const)

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
