"""Lowering rules: matrix products. Bias, scale and addition become elementwise values, which fusion may put into the
epilogue."""

from __future__ import annotations

import torch

from .affine import variables
from .define import Definer, rule
from .errors import Unsupported
from .expr import apply, cast
from .ir import Node, Ref
from .rules_pointwise import arithmetic
from .values import Contract, Layout

aten = torch.ops.aten

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _product(d: Definer, node: Node, name: str, a: Ref, b: Ref, layout: Layout) -> None:
    x, w = d.view(a), d.view(b)
    if x.layout.dtype not in FLOATS or x.layout.dtype != w.layout.dtype:
        raise Unsupported(node.name, f"a product of {x.layout.dtype} and {w.layout.dtype}", stage="define")
    batched = len(x.layout.shape) == 3
    m, k = x.layout.shape[-2:]
    n = w.layout.shape[-1]
    if batched:
        raise Unsupported(node.name, "batched products run as the vendor's kernel", stage="define")
    if k == 0:
        raise Unsupported(node.name, "a product over nothing", stage="define")
    d.put(Contract(name, layout, x, w, m, n, k, node.source))


@rule(aten.mm.default, aten.bmm.default)
def mm(d: Definer, node: Node) -> None:
    _product(d, node, node.name, node.args[0], node.args[1], Layout.of(node.spec))  # type: ignore[arg-type]


@rule(aten.addmm.default, aten.baddbmm.default)
def addmm(d: Definer, node: Node) -> None:
    layout = Layout.of(node.spec)  # type: ignore[arg-type]
    product = Layout.contiguous(layout.shape, layout.dtype, layout.device)
    name = f"{node.name}_product"
    _product(d, node, name, node.args[1], node.args[2], product)
    dtype = arithmetic(layout.dtype)
    index = variables(layout.shape)
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    value = cast(d.read(Ref(name), index), dtype)
    if alpha != 1:
        value = apply("mul", value, cast(d.number(alpha), dtype), dtype=dtype)
    if beta != 0:
        added = cast(d.read_broadcast(node.args[0], index), dtype)
        if beta != 1:
            added = apply("mul", added, cast(d.number(beta), dtype), dtype=dtype)
        value = apply("add", value, added, dtype=dtype)
    d.map(node, value)
