"""Lowering rules: matrix products. Bias, scale and addition become elementwise values, which fusion may put into the
epilogue. What no GEMM family takes, batches and integers, is a reduction if it is small, else the vendor's."""

from __future__ import annotations

from dataclasses import replace

import torch

from .affine import variables
from .define import Definer, rule
from .errors import Unsupported
from .expr import Expr, apply, cast
from .functions import register
from .ir import Node, Ref
from .rules_reduce import reduce_to
from .values import Contract, Layout, View

aten = torch.ops.aten

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# Multiplications that a sum of products may take where no GEMM does it: one for each of a GPU's lanes a few times over.
SUM_LIMIT = 1 << 20


def _product(d: Definer, node: Node, name: str, a: Ref, b: Ref, layout: Layout) -> None:
    x, w = d.view(a), d.view(b)
    m, k = x.layout.shape[-2:]
    n = w.layout.shape[-1]
    if len(x.layout.shape) == 2 and x.layout.dtype in FLOATS and x.layout.dtype == w.layout.dtype and k:
        d.put(Contract(name, layout, x, w, m, n, k, node.source, rounded=name == node.name))
        return
    if len(x.layout.shape) == 3 and x.layout.shape[0] == 1 and x.layout.dtype in FLOATS and k:
        _single(d, node, name, x, w, layout)
        return
    count = layout.numel * k
    if count > SUM_LIMIT:
        what = f"batches of {x.layout.dtype}" if len(layout.shape) == 3 else f"{x.layout.dtype} and {w.layout.dtype}"
        raise Unsupported(node.name, f"a product of {what} is the vendor's", stage="define")
    d.map(node, _sum_of_products(d, node, a, b, layout, k), name=name, layout=layout)


def _single(d: Definer, node: Node, name: str, x: View, w: View, layout: Layout) -> None:
    """A batch of one product."""
    a, b = (replace(v, layout=replace(v.layout, shape=v.layout.shape[1:], stride=v.layout.stride[1:])) for v in (x, w))
    (m, k), n = a.layout.shape, b.layout.shape[1]
    matrix = Layout.contiguous((m, n), layout.dtype, layout.device)
    d.put(Contract(f"{name}_matrix", matrix, a, b, m, n, k, node.source, rounded=name == node.name))
    value = d.read(Ref(f"{name}_matrix"), variables(layout.shape)[1:])
    d.map(node, value, name=name, layout=layout)


def _sum_of_products(d: Definer, node: Node, a: Ref, b: Ref, layout: Layout, k: int) -> Expr:
    """Each element of the product as a reduction of its own."""
    dtype = register(layout.dtype)
    *lead, m, n, at = variables((*layout.shape, k))
    left, right = d.read(a, [*lead, m, at]), d.read(b, [*lead, at, n])
    value = apply("mul", cast(left, dtype), cast(right, dtype), dtype=dtype)
    domain = Layout.contiguous((*layout.shape, k), dtype, layout.device)
    total = reduce_to(d, node, f"{node.name}_sums", "sum", value, domain, (len(layout.shape),))
    return d.read(total, variables(layout.shape))


@rule(aten.addbmm.default)
def addbmm(d: Definer, node: Node) -> None:
    """The sum of a batch's products."""
    _, a, b = node.args[:3]
    layout, (count, _, k) = Layout.of(node.spec), d.layout(a).shape  # type: ignore[arg-type]
    if layout.numel * count * k > SUM_LIMIT:
        raise Unsupported(node.name, "sums over a batch are the vendor's", stage="define")
    dtype = register(layout.dtype)
    m, n, one, at = variables((*layout.shape, count, k))
    value = apply("mul", cast(d.read(a, [one, m, at]), dtype), cast(d.read(b, [one, at, n]), dtype), dtype=dtype)
    domain = Layout.contiguous((*layout.shape, count, k), dtype, layout.device)
    _added(d, node, reduce_to(d, node, f"{node.name}_sums", "sum", value, domain, (2, 3)), layout)


@rule(aten.mm.default, aten.bmm.default)
def mm(d: Definer, node: Node) -> None:
    _product(d, node, node.name, node.args[0], node.args[1], Layout.of(node.spec))  # type: ignore[arg-type]


@rule(aten.addmm.default, aten.baddbmm.default)
def addmm(d: Definer, node: Node) -> None:
    layout = Layout.of(node.spec)  # type: ignore[arg-type]
    product = Layout.contiguous(layout.shape, layout.dtype, layout.device)
    name = f"{node.name}_product"
    _product(d, node, name, node.args[1], node.args[2], product)
    _added(d, node, Ref(name), layout)


def _added(d: Definer, node: Node, product: Ref, layout: Layout) -> None:
    """`beta` times what is given and `alpha` times the product."""
    dtype = register(layout.dtype)
    index = variables(layout.shape)
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    value = cast(d.read(product, index), dtype)
    if alpha != 1:
        value = apply("mul", value, cast(d.number(alpha), dtype), dtype=dtype)
    if beta != 0:
        added = cast(d.read_broadcast(node.args[0], index), dtype)
        if beta != 1:
            added = apply("mul", added, cast(d.number(beta), dtype), dtype=dtype)
        value = apply("add", value, added, dtype=dtype)
    d.map(node, value)
