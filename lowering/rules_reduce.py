"""Lowering rules: reductions over dimensions, and the statistics made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .affine import Affine, variables
from .define import Definer, rule
from .expr import Expr, apply, cast, const
from .functions import register
from .ir import Node, Ref
from .rules_pointwise import truth
from .values import Layout

aten = torch.ops.aten


def _axes(node: Node, position: int, rank: int) -> tuple[int, ...]:
    """Reduced dimensions; none given means all."""
    given: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    if given is None or given == () or given == []:
        return tuple(range(rank))
    given = (given,) if isinstance(given, int) else given
    return tuple(sorted({a % max(rank, 1) for a in given})) if rank else ()


def _source(d: Definer, node: Node) -> tuple[Layout, Expr]:
    layout = d.layout(node.args[0])
    return layout, d.read(node.args[0], variables(layout.shape))


def _kept(layout: Layout, axes: tuple[int, ...], dtype: torch.dtype) -> Layout:
    shape = tuple(s for i, s in enumerate(layout.shape) if i not in axes)
    return Layout.contiguous(shape, dtype, layout.device)


def _at_kept(axes: tuple[int, ...], index: tuple[Affine, ...]) -> tuple[Affine, ...]:
    return tuple(v for i, v in enumerate(index) if i not in axes)


# What a reduction over nothing is.
OVER_NOTHING = {"sum": 0, "prod": 1, "any": False, "all": True}


def reduce_to(d: Definer, node: Node, name: str, kind: str, expr: Expr, layout: Layout, axes: tuple[int, ...]) -> Ref:
    """A reduction whose result, without the reduced dimensions, is the value `name`."""
    made = _kept(layout, axes, expr.dtype if kind not in ("argmax", "argmin") else torch.int64)
    if layout.numel == 0:
        d.map(node, const(OVER_NOTHING.get(kind, 0), made.dtype), name=name, layout=made)
    else:
        d.reduce(name, node, kind, expr, layout.shape, axes, made)
    return Ref(name)


def _finish(
    d: Definer, node: Node, reduced: Ref, scale: Callable[[Expr], Expr] | None = None, part: int | None = None
) -> None:
    """The node's own value (or its result number `part`) from a reduction: shape, dtype and scale."""
    spec = node.spec if part is None else node.spec[part]  # type: ignore[index]
    made = Layout.of(spec)  # type: ignore[arg-type]
    kept = d.layout(reduced)
    big = [i for i, s in zip(variables(made.shape), made.shape, strict=True) if s != 1]
    index, own = [], iter(big)
    for size in kept.shape:
        index.append(next(own) if size != 1 else Affine())
    value = d.read(reduced, index)
    if scale is not None:
        value = scale(value)
    d.map(node, value, name=node.name if part is None else f"{node.name}#{part}", layout=made)


def _mean(total: Expr, count: int) -> Expr:
    """A sum of so many as their mean. By their number's inverse only where that is exact: one instruction would
    multiply with it and subtract without rounding in between, and a row of equal numbers be away from its mean."""
    if count & (count - 1) == 0:
        return _times(total, 1.0 / count if count else math.nan)
    return apply("div", total, const(float(count), total.dtype), dtype=total.dtype)


def _times(value: Expr, number: float) -> Expr:
    return apply("mul", value, const(number, value.dtype), dtype=value.dtype)


@rule(aten.sum, aten.mean)
def total(d: Definer, node: Node) -> None:
    layout, value = _source(d, node)
    axes = (
        _axes(node, 1, len(layout.shape))
        if node.op not in (aten.sum.default, aten.mean.default)
        else tuple(range(len(layout.shape)))
    )
    dtype = register(node.spec.dtype)  # type: ignore[union-attr]
    reduced = reduce_to(d, node, f"{node.name}_total", "sum", cast(value, dtype), layout, axes)
    count = 1
    for axis in axes:
        count *= layout.shape[axis]
    means = node.op.overloadpacket is aten.mean
    asked = node.kwargs.get("dtype") or layout.dtype

    def result(value: Expr) -> Expr:
        value = _mean(value, count) if means else value
        # Asked for in fewer bits, that is where the source casts.
        return cast(value, asked) if asked.itemsize < layout.dtype.itemsize else value

    _finish(d, node, reduced, result)


@rule(aten.amax, aten.amin, aten.max.default, aten.min.default, aten.prod, aten.any, aten.all)
def extreme(d: Definer, node: Node) -> None:
    layout, value = _source(d, node)
    packet = node.op.overloadpacket
    axes = _axes(node, 1, len(layout.shape))
    kind = {
        aten.amax: "max",
        aten.max: "max",
        aten.amin: "min",
        aten.min: "min",
        aten.prod: "prod",
        aten.any: "any",
        aten.all: "all",
    }[packet]
    if kind in ("any", "all"):
        value = truth(value)
    elif kind == "prod":
        value = cast(value, register(node.spec.dtype))  # type: ignore[union-attr]
    elif value.dtype == torch.bool:
        kind = "any" if kind == "max" else "all"
    _finish(d, node, reduce_to(d, node, f"{node.name}_of", kind, value, layout, axes))


@rule(aten.max.dim, aten.min.dim)
def extreme_with_index(d: Definer, node: Node) -> None:
    layout, value = _source(d, node)
    axes = _axes(node, 1, len(layout.shape))
    if value.dtype == torch.bool:
        value = cast(value, torch.int32)
    kind = "max" if node.op is aten.max.dim else "min"
    _finish(d, node, reduce_to(d, node, f"{node.name}_of", kind, value, layout, axes), part=0)
    _finish(d, node, reduce_to(d, node, f"{node.name}_at", f"arg{kind}", value, layout, axes), part=1)


@rule(aten.argmax, aten.argmin)
def arg_extreme(d: Definer, node: Node) -> None:
    layout, value = _source(d, node)
    axes = _axes(node, 1, len(layout.shape))
    kind = "argmax" if node.op is aten.argmax.default else "argmin"
    _finish(d, node, reduce_to(d, node, f"{node.name}_of", kind, value, layout, axes))


@rule(aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim)
def variance(d: Definer, node: Node) -> None:
    deviation = node.op.overloadpacket is aten.std
    layout, value = _source(d, node)
    axes = _axes(node, 1, len(layout.shape))
    spread, _, count, dtype = _spread(d, node, layout, value, axes)
    freedom = _freedom(node, count)
    made = Layout.of(node.spec)  # type: ignore[arg-type]
    if not deviation:
        _finish(d, node, spread, partial(_times, number=freedom))
        return
    kept = d.layout(spread)
    scaled = _times(d.read(spread, variables(kept.shape)), freedom)
    name = f"{node.name}_root"
    d.map(node, apply("sqrt", scaled, dtype=dtype), name=name, layout=Layout.contiguous(kept.shape, dtype, made.device))
    _finish(d, node, Ref(name))


@rule(aten.var_mean.correction)
def variance_and_mean(d: Definer, node: Node) -> None:
    layout, value = _source(d, node)
    axes = _axes(node, 1, len(layout.shape))
    spread, sums, count, _ = _spread(d, node, layout, value, axes)
    _finish(d, node, spread, partial(_times, number=_freedom(node, count)), part=0)
    _finish(d, node, sums, partial(_mean, count=count), part=1)


def _freedom(node: Node, count: int) -> float:
    """What a sum of squared distances is multiplied with to be a variance; without a degree of freedom it is divided by
    zero, as eager does."""
    if "correction" in node.kwargs:
        correction = node.kwargs["correction"]
    else:
        correction = int(node.args[2]) if len(node.args) > 2 and "dim" in str(node.op) else 1
    freedom = count - (1 if correction is None else correction)
    return 1.0 / freedom if freedom > 0 else math.inf


def _spread(
    d: Definer, node: Node, layout: Layout, value: Expr, axes: tuple[int, ...]
) -> tuple[Ref, Ref, int, torch.dtype]:
    """Sum of squared distances from the mean, in two passes over registers (no cancellation), and the plain sum."""
    dtype = register(layout.dtype)
    value = cast(value, dtype)
    sums = reduce_to(d, node, f"{node.name}_total", "sum", value, layout, axes)
    count = 1
    for axis in axes:
        count *= layout.shape[axis]
    index = variables(layout.shape)
    mean = _mean(d.read(sums, _at_kept(axes, index)), count)
    distance = apply("sub", value, mean, dtype=dtype)
    squared = apply("mul", distance, distance, dtype=dtype)
    return reduce_to(d, node, f"{node.name}_spread", "sum", squared, layout, axes), sums, count, dtype
