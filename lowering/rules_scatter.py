"""Lowering rules: ops that write elements at places known at run time.

A kernel that stored at those places would leave to chance which of two writes to one place is last, and a sum of them
its order. Here every element of the result looks for its writers instead: a reduction over all that might be, the last
of them or their sum in a fixed order. That is a search; where it takes too long, the op runs as itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .affine import Affine, Indirect, bounded, variables
from .define import Definer, at_flat, rule
from .errors import Unsupported
from .expr import Expr, all_of, apply, cast, const, index, only_where
from .functions import register
from .ir import Node, Ref
from .rules_pointwise import operands_as_they_are, promoted
from .rules_reduce import reduce_to
from .rules_shape import in_range, wrapped_value
from .values import Layout

aten = torch.ops.aten

# Comparisons that a search may take: on one H200's 132 multiprocessors some microseconds. Derived, not measured.
SEARCH_LIMIT = 1 << 22

WORD = torch.int64


def _search(d: Definer, node: Node, name: str, kind: str, expr: Expr, shape: Sequence[int], count: int) -> Ref:
    """A reduction over `count` candidates, the last dimension of `expr`'s domain, for each place of `shape`."""
    if math.prod(shape) * count > SEARCH_LIMIT:
        raise Unsupported(
            node.name, f"{math.prod(shape)} places and {count} writers are too many to match", stage="define"
        )
    layout = Layout.contiguous((*shape, count), expr.dtype, Layout.of(node.spec).device)  # type: ignore[arg-type]
    return reduce_to(d, node, f"{node.name}_{name}", kind, expr, layout, (len(shape),))


def _last(d: Definer, node: Node, hit: Expr, at: Affine, shape: Sequence[int], count: int) -> Ref:
    """Number of the last candidate for which `hit` holds, -1 without one."""
    number = apply("where", hit, index(at), const(-1, WORD), dtype=WORD)
    return _search(d, node, "writer", "max", number, shape, count)


def _some(number: Expr, count: int) -> Affine:
    """A candidate's number as an index; the first candidate's where there is none."""
    return Affine.of(Indirect(apply("maximum", number, const(0, WORD), dtype=WORD), count))


class _Scatter:
    """`self` with the elements of `src` put where `index` says along one dimension."""

    def __init__(self, d: Definer, node: Node) -> None:
        self.d, self.node = d, node
        self.target, axis, self.which, self.source = node.args[:4]
        self.layout = Layout.of(node.spec)  # type: ignore[arg-type]
        self.shape = self.layout.shape
        if not self.shape or len(d.layout(self.which).shape) != len(self.shape):
            raise Unsupported(node.name, "a scatter between tensors of different rank", stage="define")
        self.axis = axis % len(self.shape)
        self.given = d.layout(self.which).shape
        self.count = self.given[self.axis]
        # Over the result's elements and, last, the candidates.
        self.at = variables((*self.shape, self.count))

    def _within(self, candidate: Affine) -> tuple[list[Affine], list[Expr | None]]:
        """The index at which a candidate stands in `index` and `src`, and when it is inside."""
        place, checks = [], []
        for dim, at in enumerate(self.at[:-1]):
            if dim == self.axis:
                place.append(candidate)
                continue
            checks.append(in_range(at, 0, self.given[dim]))
            place.append(bounded(at, self.given[dim]))
        return place, checks

    def read(self, place: Sequence[Affine]) -> Expr:
        """The source's element; a number is itself."""
        value = self.d.read(self.source, place) if isinstance(self.source, Ref) else self.d.number(self.source)
        return cast(value, self.layout.dtype)

    def hit(self) -> tuple[Expr, list[Affine]]:
        """Whether the candidate writes here, and where it stands."""
        place, checks = self._within(self.at[-1])
        match = apply("eq", cast(self.d.read(self.which, place), WORD), index(self.at[self.axis]), dtype=torch.bool)
        return only_where(all_of(checks), match, const(False, torch.bool)), place

    def kept(self) -> Expr:
        return self.d.read(self.target, self.at[:-1])

    def overwrite(self) -> None:
        if self.count == 0 or 0 in self.given:
            self.d.map(self.node, self.kept())
            return
        writer = _last(self.d, self.node, self.hit()[0], self.at[-1], self.shape, self.count)
        number = self.d.read(writer, self.at[:-1])
        place, _ = self._within(_some(number, self.count))
        written = apply("ge", number, const(0, WORD), dtype=torch.bool)
        self.d.map(self.node, only_where(written, self.read(place), self.kept()))

    def combine(self, kind: str, include: bool) -> None:
        """`kind` of what is written here and, with `include`, what was here: sum, prod, mean, max, min or any."""
        node, d = self.node, self.d
        kept = self.kept()
        if self.count == 0 or 0 in self.given:
            d.map(node, kept)
            return
        dtype = register(self.layout.dtype)
        hit, place = self.hit()
        neutral = _neutral(kind, dtype)
        value = only_where(hit, cast(self.read(place), dtype), neutral)
        found = _search(d, node, "found", "sum" if kind == "mean" else kind, value, self.shape, self.count)
        total = d.read(found, self.at[:-1])
        writers = None
        if kind == "mean" or not include:
            ones = apply("where", hit, const(1, WORD), const(0, WORD), dtype=WORD)
            counted = _search(d, node, "writers", "sum", ones, self.shape, self.count)
            writers = d.read(counted, self.at[:-1])
        if include:
            total = _joined(kind, cast(kept, dtype), total)
        if kind == "mean":
            assert writers is not None
            some = writers
            if include:
                some = apply("add", some, const(1, WORD), dtype=WORD)
            some = apply("maximum", some, const(1, WORD), dtype=WORD)
            divide = "div" if dtype.is_floating_point else "div_floor"
            total = apply(divide, total, cast(some, dtype), dtype=dtype)
        if not include:
            assert writers is not None
            written = apply("gt", writers, const(0, WORD), dtype=torch.bool)
            total = apply("where", written, total, cast(kept, dtype), dtype=dtype)
        d.map(node, total)


def _neutral(kind: str, dtype: torch.dtype) -> Expr:
    if kind in ("sum", "mean", "any"):
        return const(0 if dtype != torch.bool else False, dtype)
    if kind == "prod":
        return const(1, dtype)
    if dtype.is_floating_point:
        return const(-math.inf if kind == "max" else math.inf, dtype)
    info = torch.iinfo(dtype)
    return const(info.min if kind == "max" else info.max, dtype)


def _joined(kind: str, a: Expr, b: Expr) -> Expr:
    fn = {"sum": "add", "mean": "add", "prod": "mul", "max": "maximum", "min": "minimum", "any": "bitwise_or"}[kind]
    return apply(fn, a, b, dtype=a.dtype)


@rule(aten.scatter.src, aten.scatter.value)
def scatter(d: Definer, node: Node) -> None:
    _Scatter(d, node).overwrite()


@rule(aten.scatter_add.default)
def scatter_add(d: Definer, node: Node) -> None:
    made = _Scatter(d, node)
    made.combine("any" if made.layout.dtype == torch.bool else "sum", include=True)


@rule(aten.scatter_reduce.two)
def scatter_reduce(d: Definer, node: Node) -> None:
    made = _Scatter(d, node)
    if made.layout.dtype == torch.bool:
        raise Unsupported(node.name, "sums of bools", stage="define")
    kind = {"sum": "sum", "prod": "prod", "mean": "mean", "amax": "max", "amin": "min"}[node.args[4]]
    made.combine(kind, node.kwargs.get("include_self", True))


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(d: Definer, node: Node) -> None:
    target, given, values, *rest = node.args
    accumulate = rest[0] if rest else node.kwargs.get("accumulate", False)
    layout = Layout.of(node.spec)  # type: ignore[arg-type]
    which = {n: w for n, w in enumerate(given) if w is not None}
    kinds = {d.layout(w).dtype for w in which.values()}
    if kinds & {torch.bool, torch.uint8}:
        _by_mask(d, node, which, accumulate)
        return
    made = _IndexPut(d, node, target, which, values)
    if layout.numel == 0 or made.count == 0:
        d.map(node, d.read(target, variables(layout.shape)))
    elif accumulate:
        made.accumulate()
    else:
        made.overwrite()


def _by_mask(d: Definer, node: Node, which: dict[int, Ref], accumulate: bool) -> None:
    """A single number put where one mask holds."""
    target, _, values, *_ = node.args
    masks = list(which.values())
    lead = d.layout(masks[0]).shape
    shape = d.layout(target).shape
    if len(masks) > 1 or 0 not in which or d.layout(masks[0]).dtype != torch.bool or lead != shape[: len(lead)]:
        raise Unsupported(node.name, "several masks", stage="define")
    if d.layout(values).numel != 1 or accumulate:
        raise Unsupported(node.name, "how many values a mask takes depends on data", stage="define")
    at = variables(shape)
    kept = operands_as_they_are(d, node, [target])[0]
    value = cast(d.read(values, [Affine()] * len(d.layout(values).shape)), kept.dtype)
    d.map(node, apply("where", d.read(masks[0], at[: len(lead)]), value, kept, dtype=kept.dtype))


class _IndexPut:
    """`target[indices] = values`, or `+=`."""

    def __init__(self, d: Definer, node: Node, target: Ref, which: dict[int, Ref], values: Ref) -> None:
        self.d, self.node, self.target, self.which, self.values = d, node, target, which, values
        self.layout = Layout.of(node.spec)  # type: ignore[arg-type]
        self.shape = self.layout.shape
        self.common = torch.broadcast_shapes(*(d.layout(w).shape for w in which.values()))
        self.count = math.prod(self.common)
        self.places = list(which)
        adjacent = self.places == list(range(self.places[0], self.places[0] + len(self.places)))
        # Where the indices' dimensions stand among those of the values.
        self.start = self.places[0] if adjacent else 0

    def hit(self, candidate: Affine, at: Sequence[Affine]) -> Expr:
        """Whether the candidate's indices are the indexed dimensions of this place."""
        inner = at_flat(candidate, self.common)
        checks = []
        for dim, where in zip(self.places, at, strict=True):
            value = wrapped_value(self.d.read_broadcast(self.which[dim], inner), self.shape[dim])
            checks.append(apply("eq", value, index(where), dtype=torch.bool))
        held = all_of(checks)
        assert held is not None
        return held

    def value(self, candidate: Affine, at: Sequence[Affine]) -> Expr:
        """What the candidate writes at this place."""
        others = [a for dim, a in enumerate(at) if dim not in self.places]
        full = [*others[: self.start], *at_flat(candidate, self.common), *others[self.start :]]
        return cast(self.d.read_broadcast(self.values, full), self.layout.dtype)

    def overwrite(self) -> None:
        indexed = tuple(self.shape[dim] for dim in self.places)
        search = variables((*indexed, self.count))
        writer = _last(self.d, self.node, self.hit(search[-1], search[:-1]), search[-1], indexed, self.count)
        at = variables(self.shape)
        number = self.d.read(writer, [at[dim] for dim in self.places])
        written = apply("ge", number, const(0, WORD), dtype=torch.bool)
        value = self.value(_some(number, self.count), at)
        self.d.map(self.node, only_where(written, value, self.d.read(self.target, at)))

    def accumulate(self) -> None:
        dtype = register(self.layout.dtype)
        # A sum of bools is whether any holds.
        kind = "any" if dtype == torch.bool else "sum"
        domain = variables((*self.shape, self.count))
        hit = self.hit(domain[-1], [domain[dim] for dim in self.places])
        value = only_where(hit, cast(self.value(domain[-1], domain[:-1]), dtype), _neutral(kind, dtype))
        found = _search(self.d, self.node, "found", kind, value, self.shape, self.count)
        at = variables(self.shape)
        kept = cast(self.d.read(self.target, at), dtype)
        self.d.map(self.node, _joined(kind, kept, self.d.read(found, at)))


@rule(aten.bucketize.Tensor, aten.bucketize.Scalar, aten.searchsorted.Tensor, aten.searchsorted.Scalar)
def bucketize(d: Definer, node: Node) -> None:
    """How many of the sorted bounds lie before a value: counted, not searched by halves."""
    searched = node.op.overloadpacket is aten.searchsorted
    bounds, values = node.args[:2] if searched else node.args[1::-1]
    if node.kwargs.get("sorter") is not None:
        raise Unsupported(node.name, "bounds sorted by another tensor", stage="define")
    right = node.kwargs.get("right", False) or node.kwargs.get("side") == "right"
    layout = Layout.of(node.spec)  # type: ignore[arg-type]
    *lead, count = d.layout(bounds).shape
    at = variables((*layout.shape, count))
    dtype = promoted(d, [bounds, values])
    bound = cast(d.read(bounds, [*(at[: len(lead)] if lead else ()), at[-1]]), register(dtype))
    value = cast(d.read(values, at[:-1]) if isinstance(values, Ref) else d.number(values), register(dtype))
    # NaN lies behind every bound.
    behind = apply("bitwise_not", apply("gt" if right else "ge", bound, value, dtype=torch.bool), dtype=torch.bool)
    if layout.numel == 0 or count == 0:
        d.map(node, const(0, layout.dtype))
        return
    found = _search(d, node, "count", "sum", cast(behind, WORD), layout.shape, count)
    d.map(node, d.read(found, variables(layout.shape)))
