"""What one kernel computes: values composed over a two-dimensional domain of rows and columns.

`compose` is the whole legality of fusion. Given the values that shall share a kernel and those of them that others
need, it finds a domain (a GEMM's tile space, a reduction's rows, or the elements of what is stored), writes every
stored value as one expression over it, and refuses, with the reason, when there is none. Reading another value inside
the kernel is always
correct algebra, at any index: its expression is inlined with the index substituted. Only two things cannot be inlined
and must
match the domain: the result of a reduction (it belongs to this row) and a GEMM's accumulator (it belongs to this tile).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from .affine import Affine, Var, contiguous_strides, delinearize, linear, substitution
from .define import at_flat
from .expr import Acc, Apply, Expr, Load, Masked, RowScalar, children, const, loads, rewrite, walk
from .size import alike, typical
from .values import RUNNING, Contract, Definition, Extern, Item, Layout, Map, Reduce, Values

ROW, COL = 0, 1

# Above this many distinct nodes a body no longer reads, or compiles, like something a person would write.
BODY_LIMIT = 600

# Functions that cost more than a handful of instructions: not repeated for every element of a larger domain.
EXPENSIVE = {
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan", "sinh",
    "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "erfinv", "lgamma", "pow", "atan2", "hypot", "silu",
    "sigmoid",
}  # fmt: skip


class Refused(Exception):
    """Why these values do not share a kernel."""


@dataclass(frozen=True)
class Reduction:
    """`kind` of `expr` over the columns of each row."""

    value: str
    kind: str
    expr: Expr

    @property
    def running(self) -> bool:
        """Whether every column has a result of its own."""
        return self.kind.startswith(RUNNING)


@dataclass(frozen=True)
class Store:
    """`expr` written at `offset` of the memory of `value`; once per row when `per_row`."""

    value: str
    offset: Affine
    expr: Expr
    per_row: bool


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
    foreign: Extern | None = None
    names: Mapping[Expr, str] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """The value that names the group: the last it stores."""
        if self.foreign is not None:
            return self.foreign.name
        return self.stores[-1].value if self.stores else self.members[-1]

    @cached_property
    def loads(self) -> list[Load]:
        """Distinct loads, in order of first use."""
        return loads(*(r.expr for r in self.reductions), *(s.expr for s in self.stores))


@dataclass
class Elements:
    """Expressions that many compositions of one piece need alike: of a value at an index, in a domain, out of the
    members that it is computed from. Those with a reduction or a product among them belong to their kernel alone.

    Args:
        bits: a bit for each value.
        above: what each value is computed from, whole way up.
        tied: reductions and products.
        known: what was composed.
    """

    bits: dict[str, int] = field(default_factory=dict)
    above: dict[str, int] = field(default_factory=dict)
    tied: int = 0
    known: dict[tuple[object, ...], Expr] = field(default_factory=dict)

    def add(self, made: Definition, sources: Collection[str]) -> None:
        """The next value, in an order in which its sources come before it."""
        bit = self.bits[made.name] = 1 << len(self.bits)
        self.above[made.name] = bit
        for source in sources:
            self.above[made.name] |= self.above.get(source, 0)
        if isinstance(made, (Reduce, Contract)):
            self.tied |= bit

    def mask(self, names: Collection[str]) -> int:
        """The bits of these values."""
        return sum(self.bits[name] for name in names)


def compose(
    members: Collection[str],
    needed: Collection[str],
    values: Values,
    inlined: Collection[str],
    cols: int = 0,
    elements: Elements | None = None,
) -> Group:
    """One kernel for these values.

    Args:
        members: names of the values to compute here.
        needed: those of them that must be in memory afterwards.
        values: all definitions.
        inlined: values that every reader computes for itself.
        cols: for a pointwise group, how its elements are cut into columns; 0 for one long row.
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
    composer = _Composer(order, tuple(n for n in order if n in needed), values, frozenset(inlined), elements)
    products = [v for v in made if isinstance(v, Contract)]
    reductions = [v for v in made if isinstance(v, Reduce)]
    if len(products) > 1:
        raise Refused("two matrix products need two kernels")
    if products and reductions:
        raise Refused("a reduction needs the whole row, a GEMM tile holds only some of its columns")
    if products:
        return composer.gemm(products[0])
    return composer.row(reductions) if reductions else composer.pointwise(cols)


def _alone(order: list[str], made: object) -> Group:
    if isinstance(made, Extern):
        return Group("extern", tuple(order), 0, 0, foreign=made)
    return Group("item" if isinstance(made, Item) else "empty", tuple(order), 0, 0)


@dataclass
class _Composer:
    order: list[str]
    needed: tuple[str, ...]
    values: Values
    inlined: frozenset[str]
    elements: Elements | None = None

    def __post_init__(self) -> None:
        self.mask = self.elements.mask(self.order) if self.elements is not None else 0
        self.rows = self.cols = 0
        self.memo: dict[tuple[str, tuple[Affine, ...]], Expr] = {}
        self.reductions: dict[str, Reduction] = {}
        self.natural: Affine = Affine()
        self.product: Contract | None = None
        self.accumulators: set[int] = set()

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

    def _group(self, kind: str, stores: tuple[Store, ...]) -> Group:
        names = {expr: name for (name, _), expr in self.memo.items()}
        group = Group(
            kind, tuple(self.order), self.rows, self.cols, tuple(self.reductions.values()), stores, names=names
        )
        if len(self.order) > 1 and _too_long([*(r.expr for r in group.reductions), *(s.expr for s in stores)]):
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
        key = name, place
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


def _too_long(roots: Sequence[Expr]) -> bool:
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


def _numbered(expr: Expr, pair: int | None) -> Expr:
    """Accumulators by number instead of by column distance."""
    return rewrite(
        expr,
        new_leaf=lambda leaf: (
            Acc(leaf.dtype, value=leaf.value, which=int(leaf.which == pair)) if isinstance(leaf, Acc) else None
        ),
    )
