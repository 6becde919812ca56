"""Lowering rules: pooling. A window is a few more dimensions to reduce over, its places outside the input masked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .affine import Affine, bounded, variables
from .define import Definer, rule
from .errors import Unsupported
from .expr import Expr, all_of, apply, cast, const, index, only_where
from .functions import register
from .ir import Node, Ref
from .rules_reduce import reduce_to
from .rules_shape import in_range
from .values import Layout

aten = torch.ops.aten

WORD = torch.int64
FAR = 2**62


@dataclass(frozen=True)
class Windows:
    """What each element of a result sees of a source, over the result's dimensions and then the windows'.

    Args:
        domain: sizes of both.
        place: of the source's element.
        held: when it is inside, None if always.
    """

    domain: tuple[int, ...]
    place: tuple[Affine, ...]
    held: Expr | None

    def read(self, d: Definer, value: Any, dtype: torch.dtype, outside: Expr) -> Expr:
        """The source's element, `outside` where there is none."""
        return self.choose(cast(d.read(value, self.place), dtype), outside)

    def choose(self, inside: Expr, outside: Expr) -> Expr:
        """`inside` where there is an element of the source."""
        return only_where(self.held, inside, outside)


def _numbers(given: Any, rank: int, usual: Sequence[int] | int) -> list[int]:
    """A window's parameter per dimension."""
    if given is None or given == () or given == []:
        given = usual
    given = (given,) if isinstance(given, int) else given
    return [given[0]] * rank if len(given) == 1 else list(given)


def _given(node: Node, *names: str) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _within(at: Affine, size: int) -> tuple[Affine, Expr | None]:
    return bounded(at, size), in_range(at, 0, size)


def _sliding(
    result: Sequence[int], source: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Windows:  # fmt: skip
    """Windows of `kernel` places, `stride` apart."""
    rank = len(kernel)
    lead = len(result) - rank
    domain = (*result, *kernel)
    at = variables(domain)
    place, checks = list(at[:lead]), []
    for i in range(rank):
        where = at[lead + i] * stride[i] - padding[i] + at[lead + rank + i] * dilation[i]
        inside, check = _within(where, source[lead + i])
        place.append(inside)
        checks.append(check)
    return Windows(domain, tuple(place), all_of(checks))


def _spread(result: Sequence[int], source: Sequence[int], rank: int) -> tuple[Windows, list[Affine]]:
    """Windows that share a source of any size evenly, and how many places each has per dimension."""
    lead = len(result) - rank
    sizes = list(zip(result[lead:], source[lead:], strict=True))
    widest = [
        max((-(-(o + 1) * size // count) - o * size // count for o in range(count)), default=0) for count, size in sizes
    ]
    domain = (*result, *widest)
    at = variables(domain)
    place, checks, extents = list(at[:lead]), [], []
    for i, (count, size) in enumerate(sizes):
        start = (at[lead + i] * size).floordiv(count)
        end = (at[lead + i] * size + size + count - 1).floordiv(count)
        extents.append(end - start)
        if widest[i] > min((end - start).range[0], widest[i] - 1):
            number = index(at[lead + rank + i])
            checks.append(apply("lt", number, index(end - start), dtype=torch.bool))
        place.append(bounded(start + at[lead + rank + i], size))
    return Windows(domain, tuple(place), all_of(checks)), extents


def _axes(layout: Layout, windows: Windows) -> tuple[int, ...]:
    return tuple(range(len(layout.shape), len(windows.domain)))


def _reduced(d: Definer, node: Node, name: str, kind: str, value: Expr, layout: Layout, windows: Windows) -> Ref:
    domain = Layout.contiguous(windows.domain, value.dtype, layout.device)
    return reduce_to(d, node, f"{node.name}_{name}", kind, value, domain, _axes(layout, windows))


def _product(factors: Sequence[Expr]) -> Expr:
    made = const(1, WORD)
    for factor in factors:
        made = apply("mul", made, factor, dtype=WORD)  # type: ignore[assignment]
    return made


def _divided(total: Expr, count: Expr) -> Expr:
    fn = "div" if total.dtype.is_floating_point else "div_trunc"
    return apply(fn, total, cast(count, total.dtype), dtype=total.dtype)


@dataclass(frozen=True)
class _Average:
    """The arguments of `avg_pool2d`, `avg_pool3d` and of their backwards."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    include_pad: bool
    divisor: int | None

    @staticmethod
    def of(given: dict[str, Any], rank: int) -> _Average:
        kernel = _numbers(given["kernel_size"], rank, 1)
        return _Average(
            kernel,
            _numbers(given.get("stride"), rank, kernel),
            _numbers(given.get("padding"), rank, 0),
            given.get("count_include_pad", True),
            given.get("divisor_override"),
        )

    def count(self, at: Sequence[Affine], source: Sequence[int]) -> Expr:
        """By what the sum of the window at this place is divided."""
        if self.divisor is not None:
            return const(self.divisor, WORD)
        factors = []
        for i, size in enumerate(source):
            start = at[i] * self.stride[i] - self.padding[i]
            end = _lower(start + self.kernel[i], size + self.padding[i])
            first = index(start)
            if not self.include_pad:
                first = first if start.range[0] >= 0 else apply("maximum", first, const(0, WORD), dtype=WORD)
                end = end if (start + self.kernel[i]).range[1] <= size else _lower(start + self.kernel[i], size)
            factors.append(apply("sub", end, first, dtype=WORD))
        return _product(factors)


def _lower(value: Affine, limit: int) -> Expr:
    if value.range[1] <= limit:
        return index(value)
    return apply("minimum", index(value), const(limit, WORD), dtype=WORD)


@rule(aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(d: Definer, node: Node) -> None:
    given = _given(node, "self", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
                   "divisor_override")  # fmt: skip
    layout, source = Layout.of(node.spec), d.layout(given["self"])  # type: ignore[arg-type]
    rank = 2 if node.op is aten.avg_pool2d.default else 3
    pool = _Average.of(given, rank)
    windows = _sliding(layout.shape, source.shape, pool.kernel, pool.stride, pool.padding, [1] * rank)
    dtype = register(layout.dtype)
    total = _reduced(d, node, "total", "sum", windows.read(d, given["self"], dtype, const(0, dtype)), layout, windows)
    at = variables(layout.shape)
    d.map(node, _divided(d.read(total, at), pool.count(at[-rank:], source.shape[-rank:])))


@rule(aten.avg_pool2d_backward.default, aten.avg_pool3d_backward.default)
def avg_pool_backward(d: Definer, node: Node) -> None:
    """Each element of the input gathers from the windows that it is in."""
    given = _given(node, "grad", "self", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
                   "divisor_override")  # fmt: skip
    layout, results = Layout.of(node.spec), d.layout(given["grad"]).shape  # type: ignore[arg-type]
    rank = 2 if node.op is aten.avg_pool2d_backward.default else 3
    pool = _Average.of(given, rank)
    lead = len(layout.shape) - rank
    domain = (*layout.shape, *pool.kernel)
    at = variables(domain)
    place, checks = list(at[:lead]), []
    for i in range(rank):
        distance = at[lead + i] + pool.padding[i] - at[lead + rank + i]
        inside, check = _within(distance.floordiv(pool.stride[i]), results[lead + i])
        place.append(inside)
        checks.append(check)
        if pool.stride[i] > 1:
            checks.append(apply("eq", index(distance.mod(pool.stride[i])), const(0, WORD), dtype=torch.bool))
    windows = Windows(domain, tuple(place), all_of(checks))
    dtype = register(layout.dtype)
    share = _divided(cast(d.read(given["grad"], place), dtype), pool.count(place[lead:], layout.shape[lead:]))
    total = _reduced(d, node, "total", "sum", windows.choose(share, const(0, dtype)), layout, windows)
    d.map(node, d.read(total, variables(layout.shape)))


@rule(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default)
def adaptive_avg_pool(d: Definer, node: Node) -> None:
    layout, source = Layout.of(node.spec), d.layout(node.args[0])  # type: ignore[arg-type]
    rank = 2 if node.op is aten._adaptive_avg_pool2d.default else 3
    if 0 in (*source.shape, *layout.shape):
        raise Unsupported(node.name, "pooling nothing", stage="define")
    windows, extents = _spread(layout.shape, source.shape, rank)
    dtype = register(layout.dtype)
    total = _reduced(d, node, "total", "sum", windows.read(d, node.args[0], dtype, const(0, dtype)), layout, windows)
    d.map(node, _divided(d.read(total, variables(layout.shape)), _product([index(e) for e in extents])))


@rule(aten._adaptive_avg_pool2d_backward.default, aten._adaptive_avg_pool3d_backward.default)
def adaptive_avg_pool_backward(d: Definer, node: Node) -> None:
    """The windows that hold an element of the input are themselves a window over the results."""
    grad = node.args[0]
    layout, results = Layout.of(node.spec), d.layout(grad).shape  # type: ignore[arg-type]
    rank = 2 if node.op is aten._adaptive_avg_pool2d_backward.default else 3
    if 0 in (*results, *layout.shape):
        raise Unsupported(node.name, "pooling nothing", stage="define")
    windows, _ = _spread(layout.shape, results, rank)
    counts = []
    for at, size, count in zip(windows.place[-rank:], layout.shape[-rank:], results[-rank:], strict=True):
        counts.append(index((at * size + size + count - 1).floordiv(count) - (at * size).floordiv(count)))
    dtype = register(layout.dtype)
    share = _divided(cast(d.read(grad, windows.place), dtype), _product(counts))
    total = _reduced(d, node, "total", "sum", windows.choose(share, const(0, dtype)), layout, windows)
    d.map(node, d.read(total, variables(layout.shape)))


@rule(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def max_pool(d: Definer, node: Node) -> None:
    given = _given(node, "self", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    source = d.layout(given["self"])
    layout = Layout.of(node.spec[0])  # type: ignore[index, arg-type]
    rank = 2 if node.op is aten.max_pool2d_with_indices.default else 3
    kernel = _numbers(given["kernel_size"], rank, 1)
    windows = _sliding(
        layout.shape, source.shape, kernel, _numbers(given.get("stride"), rank, kernel),
        _numbers(given.get("padding"), rank, 0), _numbers(given.get("dilation"), rank, 1),
    )  # fmt: skip
    _largest(d, node, given["self"], source, layout, windows, rank)


@rule(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def adaptive_max_pool(d: Definer, node: Node) -> None:
    source = d.layout(node.args[0])
    layout = Layout.of(node.spec[0])  # type: ignore[index, arg-type]
    rank = 2 if node.op is aten.adaptive_max_pool2d.default else 3
    if 0 in (*source.shape, *layout.shape):
        raise Unsupported(node.name, "pooling nothing", stage="define")
    windows, _ = _spread(layout.shape, source.shape, rank)
    _largest(d, node, node.args[0], source, layout, windows, rank)


def _largest(d: Definer, node: Node, value: Any, source: Layout, layout: Layout, windows: Windows, rank: int) -> None:
    """The largest of each window and where in the source it stands: the first of equals, but the last NaN."""
    dtype = register(layout.dtype)
    low = const(-math.inf, dtype) if dtype.is_floating_point else const(torch.iinfo(dtype).min, dtype)
    seen = windows.read(d, value, dtype, low)
    largest = _reduced(d, node, "of", "max", seen, layout, windows)
    at = variables(layout.shape)
    d.map(node, d.read(largest, at), name=f"{node.name}#0", layout=layout)
    flat = Affine()
    for where, size in zip(windows.place[-rank:], source.shape[-rank:], strict=True):
        flat = flat * size + where
    mine = apply("eq", seen, d.read(largest, variables(windows.domain)[: len(at)]), dtype=torch.bool)
    place = windows.choose(apply("where", mine, index(flat), const(FAR, WORD), dtype=WORD), const(FAR, WORD))
    found = d.read(_reduced(d, node, "at", "min", place, layout, windows), at)
    if dtype.is_floating_point:
        lost = apply("isnan", seen, dtype=torch.bool)
        nan = windows.choose(apply("where", lost, index(flat), const(-1, WORD), dtype=WORD), const(-1, WORD))
        last = d.read(_reduced(d, node, "nan", "max", nan, layout, windows), at)
        found = apply("where", apply("ge", last, const(0, WORD), dtype=torch.bool), last, found, dtype=WORD)
    d.map(node, found, name=f"{node.name}#1", layout=Layout.of(node.spec[1]))  # type: ignore[index, arg-type]
