"""Lowering rules: ops that move elements, as index arithmetic, and ops that make them from indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .affine import Affine, Indirect, bounded, variables
from .define import Definer, rule
from .errors import Unsupported
from .expr import Expr, Masked, all_of, apply, cast, const, index, only_where
from .ir import Node
from .values import Empty, Layout

aten = torch.ops.aten
prims = torch.ops.prims


def _layout(node: Node) -> Layout:
    return Layout.of(node.spec)  # type: ignore[arg-type]


def in_range(position: Affine, low: int, high: int) -> Expr | None:
    """`low <= position < high` as an expression; None when it always holds."""
    lo, hi = position.range
    checks = []
    if lo < low:
        checks.append(apply("ge", index(position), const(low, torch.int64), dtype=torch.bool))
    if hi >= high:
        checks.append(apply("lt", index(position), const(high, torch.int64), dtype=torch.bool))
    return all_of(checks)


# Every element tries every part of a cat or stack: beyond this many, a copy per part costs less.
PARTS = 64


def _refuse_many(node: Node, parts: Sequence[Any]) -> None:
    if len(parts) > PARTS:
        raise Unsupported(node.name, f"it joins {len(parts)} parts, a kernel does up to {PARTS}", stage="define")


@rule(aten.cat)
def cat(d: Definer, node: Node) -> None:
    _refuse_many(node, node.args[0])
    layout = _layout(node)
    axis = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % max(len(layout.shape), 1)
    parts = [
        p
        for p in node.args[0]
        if not (len(d.layout(p).shape) == 1 and d.layout(p).shape[0] == 0 and len(layout.shape) > 1)
    ]
    spans, start = [], 0
    for part in parts:
        size = d.layout(part).shape[axis]
        if size:
            spans.append((part, start, size))
        start += size
    at = list(variables(layout.shape))
    result: Expr = const(0, layout.dtype)
    for part, start, size in reversed(spans):
        inner = list(at)
        inner[axis] = bounded(at[axis] - start, size)
        value = cast(d.read(part, inner), layout.dtype)
        if start + size == layout.shape[axis] and start == 0:
            result = value
            continue
        mine = in_range(at[axis], start, start + size)
        assert mine is not None, "a part that is not the whole has elements outside"
        if start + size == layout.shape[axis]:
            result = Masked(layout.dtype, cond=mine, body=value)
        else:
            before = apply("lt", index(at[axis]), const(start + size, torch.int64), dtype=torch.bool)
            result = apply("where", before, Masked(layout.dtype, cond=mine, body=value), result, dtype=layout.dtype)
    d.map(node, result)


@rule(aten.stack)
def stack(d: Definer, node: Node) -> None:
    _refuse_many(node, node.args[0])
    layout = _layout(node)
    axis = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(layout.shape)
    at = variables(layout.shape)
    inner = at[:axis] + at[axis + 1 :]
    parts = [cast(d.read(p, inner), layout.dtype) for p in node.args[0]]
    result = parts[-1]
    for position, part in reversed(list(enumerate(parts[:-1]))):
        mine = apply("eq", index(at[axis]), const(position, torch.int64), dtype=torch.bool)
        result = apply("where", mine, part, result, dtype=layout.dtype)
    d.map(node, result)


@rule(aten.constant_pad_nd)
def pad(d: Definer, node: Node) -> None:
    layout, source = _layout(node), d.layout(node.args[0])
    amounts = list(node.args[1])
    value = node.args[2] if len(node.args) > 2 else 0
    at = list(variables(layout.shape))
    checks: list[Expr | None] = []
    rank = len(at)
    for pair in range(len(amounts) // 2):
        dim = rank - 1 - pair
        shifted = at[dim] - amounts[2 * pair]
        checks.append(in_range(shifted, 0, source.shape[dim]))
        at[dim] = bounded(shifted, source.shape[dim])
    if source.numel == 0:
        d.map(node, cast(d.number(value), layout.dtype))
        return
    d.map(node, only_where(all_of(checks), d.read(node.args[0], at), cast(d.number(value), layout.dtype)))


@rule(aten.slice_scatter)
def slice_scatter(d: Definer, node: Node) -> None:
    given = dict(zip(("self", "src", "dim", "start", "end", "step"), node.args, strict=False)) | dict(node.kwargs)
    layout, source = _layout(node), d.layout(given["src"])
    axis = given.get("dim", 0) % len(layout.shape)
    start, step = given.get("start") or 0, given.get("step", 1)
    start = min(max(start + layout.shape[axis] if start < 0 else start, 0), layout.shape[axis])
    size = source.shape[axis]
    at = list(variables(layout.shape))
    shifted = at[axis] - start
    kept = d.read(given["self"], at)
    if size == 0:
        d.map(node, kept)
        return
    check = in_range(shifted, 0, (size - 1) * step + 1)
    checks = [check]
    inner = list(at)
    if step == 1:
        inner[axis] = bounded(shifted, size)
    else:
        inner[axis] = bounded(shifted.floordiv(step), size)
        checks.append(apply("eq", index(shifted.mod(step)), const(0, torch.int64), dtype=torch.bool))
    d.map(node, only_where(all_of(checks), cast(d.read(given["src"], inner), layout.dtype), kept))


@rule(aten.select_scatter)
def select_scatter(d: Definer, node: Node) -> None:
    target, source, axis, position = node.args
    layout = _layout(node)
    axis %= len(layout.shape)
    position %= layout.shape[axis]
    at = variables(layout.shape)
    mine = apply("eq", index(at[axis]), const(position, torch.int64), dtype=torch.bool)
    value = cast(d.read_broadcast(source, at[:axis] + at[axis + 1 :]), layout.dtype)
    d.map(node, apply("where", mine, value, d.read(target, at), dtype=layout.dtype))


@rule(aten.diagonal_scatter)
def diagonal_scatter(d: Definer, node: Node) -> None:
    given = dict(zip(("self", "src", "offset", "dim1", "dim2"), node.args, strict=False)) | dict(node.kwargs)
    layout, source = _layout(node), d.layout(given["src"])
    rank, offset = len(layout.shape), given.get("offset", 0)
    one, two = given.get("dim1", 0) % rank, given.get("dim2", 1) % rank
    at = variables(layout.shape)
    kept = d.read(given["self"], at)
    if source.numel == 0:
        d.map(node, kept)
        return
    mine = apply("eq", index(at[two] - at[one]), const(offset, torch.int64), dtype=torch.bool)
    along = bounded(at[one] + min(offset, 0), source.shape[-1])
    place = [a for n, a in enumerate(at) if n not in (one, two)]
    d.map(node, only_where(mine, cast(d.read(given["src"], [*place, along]), layout.dtype), kept))


@rule(aten.flip)
def flip(d: Definer, node: Node) -> None:
    shape = _layout(node).shape
    axes = {a % max(len(shape), 1) for a in node.args[1]}
    at = [
        Affine((), s - 1) - i if n in axes else i for n, (i, s) in enumerate(zip(variables(shape), shape, strict=True))
    ]
    d.map(node, d.read(node.args[0], at))


@rule(aten.repeat)
def repeat(d: Definer, node: Node) -> None:
    shape, source = _layout(node).shape, d.layout(node.args[0]).shape
    at = variables(shape)[len(shape) - len(source) :]
    d.map(node, d.read(node.args[0], [i.mod(s) if s else i for i, s in zip(at, source, strict=True)]))


@rule(aten.index_select)
def index_select(d: Definer, node: Node) -> None:
    source, axis, which = node.args
    shape = d.layout(source).shape
    if not shape:
        d.map(node, d.read(source, []))
        return
    axis %= len(shape)
    at = list(variables(_layout(node).shape))
    where = d.read(which, [at[axis]] if d.layout(which).shape else [])
    at[axis] = Affine.of(Indirect(where, shape[axis]))
    d.map(node, d.read(source, at))


@rule(aten.embedding)
def embedding(d: Definer, node: Node) -> None:
    table, which = node.args[:2]
    at = variables(_layout(node).shape)
    row = d.read(which, at[:-1])
    d.map(node, d.read(table, [Affine.of(Indirect(row, d.layout(table).shape[0])), at[-1]]))


def wrapped_value(value: Expr, size: int) -> Expr:
    """An index that may be negative, counted from the end as Python does."""
    value = cast(value, torch.int64)
    below = apply("lt", value, const(0, torch.int64), dtype=torch.bool)
    return apply(
        "where", below, apply("add", value, const(size, torch.int64), dtype=torch.int64), value, dtype=torch.int64
    )


def wrapped(value: Expr, size: int) -> Affine:
    """The same as part of an offset."""
    return Affine.of(Indirect(wrapped_value(value, size), size))


@rule(aten.index.Tensor)
def index_tensor(d: Definer, node: Node) -> None:
    source, given = node.args
    which = list(given)
    shape = d.layout(source).shape
    places = [n for n, w in enumerate(which) if w is not None]
    if any(d.layout(which[n]).dtype not in (torch.int64, torch.int32) for n in places):
        raise Unsupported(node.name, "indexing by a mask has a shape that depends on data", stage="define")
    if places != list(range(places[0], places[0] + len(places))):
        raise Unsupported(node.name, "indexed dimensions that are not adjacent", stage="define")
    if 0 in [shape[n] for n in places]:
        raise Unsupported(node.name, "indexing into nothing", stage="define")
    at = variables(_layout(node).shape)
    common = max(len(d.layout(which[n]).shape) for n in places)
    inner = at[places[0] : places[0] + common]
    gathered = [wrapped(d.read_broadcast(which[n], inner), shape[n]) for n in places]
    full = [*at[: places[0]], *gathered, *at[places[0] + common :]]
    d.map(node, d.read(source, full))


@rule(aten.gather)
def gather(d: Definer, node: Node) -> None:
    source, axis, which = node.args[:3]
    shape = d.layout(source).shape
    if not shape:
        d.map(node, d.read(source, []))
        return
    if len(d.layout(which).shape) != len(shape):
        raise Unsupported(node.name, "gather by an index of another rank", stage="define")
    axis %= len(shape)
    at = list(variables(_layout(node).shape))
    at[axis] = Affine.of(Indirect(d.read(which, at), shape[axis]))
    d.map(node, d.read(source, at))


@rule(aten.arange, prims.iota)
def arange(d: Definer, node: Node) -> None:
    layout = _layout(node)
    if node.op is prims.iota.default:
        start, step = node.kwargs["start"], node.kwargs["step"]
    else:
        numbers = [a for a in node.args if not isinstance(a, torch.dtype)]
        start = numbers[0] if len(numbers) > 1 else 0
        step = numbers[2] if len(numbers) > 2 else node.kwargs.get("step", 1)
    place = index(variables(layout.shape)[0])
    if not layout.dtype.is_floating_point:
        start, step = int(start), int(step)
    if layout.dtype.is_floating_point:
        dtype = torch.float32 if layout.dtype != torch.float64 else torch.float64
        scaled = apply("mul", cast(place, dtype), cast(d.number(step), dtype), dtype=dtype)
        d.map(node, apply("add", scaled, cast(d.number(start), dtype), dtype=dtype))
    else:
        d.map(node, index(variables(layout.shape)[0] * step + start))


@rule(aten.triu, aten.tril)
def triangle(d: Definer, node: Node) -> None:
    layout = _layout(node)
    shift = node.args[1] if len(node.args) > 1 else 0
    at = variables(layout.shape)
    difference = at[-1] - at[-2] - shift
    test = "ge" if node.op is aten.triu.default else "le"
    kept = apply(test, index(difference), const(0, torch.int64), dtype=torch.bool)
    d.map(node, apply("where", kept, d.read(node.args[0], at), const(0, layout.dtype), dtype=layout.dtype))


@rule(
    aten.empty.memory_format,
    aten.empty_like,
    aten.empty_strided,
    aten.empty_permuted,
    aten.new_empty,
    aten.new_empty_strided,
)
def empty(d: Definer, node: Node) -> None:
    d.put(Empty(node.name, _layout(node), node.source))
