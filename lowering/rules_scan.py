"""Lowering rules: running sums and products along one dimension, and what counts with them."""

from __future__ import annotations

import torch

from ..kernels.rows import LOOP_FROM
from .affine import Affine, Indirect, contiguous_strides, linear, variables
from .define import Definer, at_flat, rule
from .errors import Unsupported
from .expr import Expr, apply, cast, const
from .functions import register
from .ir import Node, Ref
from .rules_pointwise import truth
from .values import Layout

aten = torch.ops.aten

KINDS = {aten.cumsum: "running_sum", aten.cumprod: "running_prod"}


@rule(aten.cumsum.default, aten.cumprod.default)
def running(d: Definer, node: Node) -> None:
    layout, source = Layout.of(node.spec), d.layout(node.args[0])  # type: ignore[arg-type]
    index = variables(source.shape)
    dtype = register(layout.dtype)
    value = cast(cast(d.read(node.args[0], index), layout.dtype), dtype)
    if not source.shape:
        d.map(node, value)
        return
    axis = node.args[1] % len(source.shape)
    made = _scan(d, node, KINDS[node.op.overloadpacket], value, source.shape, axis)
    d.map(node, d.read(made, index))


def _scan(d: Definer, node: Node, kind: str, value: Expr, shape: tuple[int, ...], axis: int) -> Ref:
    """A running reduction; a row is scanned whole, in registers, fp32 in as many as fp64."""
    most = LOOP_FROM // 2 if value.dtype == torch.float32 else LOOP_FROM
    if shape[axis] > most:
        raise Unsupported(node.name, f"a scan of more than {most} elements fits no registers", stage="define")
    made = Layout.contiguous(shape, value.dtype, Layout.of(node.spec).device)  # type: ignore[arg-type]
    d.reduce(f"{node.name}_running", node, kind, value, shape, (axis,), made)
    return Ref(f"{node.name}_running")


@rule(aten.masked_scatter.default)
def masked_scatter(d: Definer, node: Node) -> None:
    """Where the mask holds for the n-th time stands the source's n-th element."""
    target, mask, source = node.args
    layout, given = Layout.of(node.spec), d.layout(source)  # type: ignore[arg-type]
    at = variables(layout.shape)
    if given.numel == 0 or layout.numel == 0:
        d.map(node, d.read_broadcast(target, at))
        return
    places = variables((layout.numel,))
    held = truth(d.read_broadcast(mask, at_flat(places[0], layout.shape)))
    counted = _scan(d, node, "running_sum", cast(held, torch.int64), (layout.numel,), 0)
    nth = d.read(counted, [linear(at, contiguous_strides(layout.shape))])
    nth = apply(
        "maximum", apply("sub", nth, const(1, torch.int64), dtype=torch.int64), const(0, torch.int64), dtype=torch.int64
    )
    taken = d.read(source, at_flat(Affine.of(Indirect(nth, given.numel)), given.shape))
    here = truth(d.read_broadcast(mask, at))
    d.map(node, apply("where", here, cast(taken, layout.dtype), d.read_broadcast(target, at), dtype=layout.dtype))
