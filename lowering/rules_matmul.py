"""Lowering rules: matrix products. Bias, scale and addition become elementwise values, which fusion may put into the
epilogue. What no GEMM family takes, batches and integers, is a reduction if it is small, else the vendor's."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..kernels.gemm_stream_table import few_tokens
from ..kernels.tma import TMA_ALIGNMENT_BYTES
from .affine import variables
from .define import FLOAT8, Definer, at_flat, rule, rule_named
from .errors import Unsupported
from .expr import Expr, apply, cast
from .functions import register
from .group import FEW_TOKENS
from .ir import Node, Ref, Spec
from .rules_reduce import reduce_to
from .size import alike
from .values import Contract, Layout, View
from .writes import writing

aten = torch.ops.aten

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# Multiplications that a sum of products may take where no GEMM does it: one for each of a GPU's lanes a few times over.
SUM_LIMIT = 1 << 20


def _product(d: Definer, node: Node, name: str, a: Ref, b: Ref, layout: Layout) -> None:
    x, w = d.view(a), d.view(b)
    m, k = x.layout.shape[-2:]
    n = w.layout.shape[-1]
    if len(x.layout.shape) == 2 and x.layout.dtype in FLOATS and x.layout.dtype == w.layout.dtype and k:
        d.put(Contract(name, layout, x, w, m, n, k, node.source, rounded=name == node.name, few=_few(d, w)))
        return
    if len(x.layout.shape) == 3 and x.layout.shape[0] == 1 and x.layout.dtype in FLOATS and k:
        _single(d, node, name, x, w, layout)
        return
    count = layout.numel * k
    if count > SUM_LIMIT:
        what = f"batches of {x.layout.dtype}" if len(layout.shape) == 3 else f"{x.layout.dtype} and {w.layout.dtype}"
        raise Unsupported(node.name, f"a product of {what} is the vendor's", stage="define")
    d.map(node, _sum_of_products(d, node, a, b, layout, k), name=name, layout=layout)


def _few(d: Definer, w: View) -> int:
    """Up to so many rows reading W is what a product costs, or it was measured as if."""
    k, n = w.layout.shape
    whole = isinstance(k, int) and isinstance(n, int)
    if not whole or d.arch != 90 or w.layout.dtype.itemsize != 2 or w.layout.stride[0] != 1:
        return FEW_TOKENS
    return few_tokens(n, k, d.target)


def _single(d: Definer, node: Node, name: str, x: View, w: View, layout: Layout) -> None:
    """A batch of one product."""
    a, b = (replace(v, layout=replace(v.layout, shape=v.layout.shape[1:], stride=v.layout.stride[1:])) for v in (x, w))
    (m, k), n = a.layout.shape, b.layout.shape[1]
    matrix = Layout.contiguous((m, n), layout.dtype, layout.device)
    rounded = name == node.name
    d.put(Contract(f"{name}_matrix", matrix, a, b, m, n, k, node.source, rounded=rounded, few=_few(d, b)))
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


# What a product of eight-bit floats is rounded to.
ROUNDED = (torch.float32, torch.float16, torch.bfloat16)


@rule_named("_C::cutlass_scaled_mm")
def cutlass_scaled_mm(d: Definer, node: Node) -> None:
    """vLLM's product of eight-bit floats, which writes its result.

    Source: vLLM 0.22.1, `vllm/_custom_ops.py`.
    """
    call = writing(node)
    assert call is not None
    place, given = call.written.get("out"), call.given
    if not {"a", "b", "a_scales", "b_scales"} <= given.keys():
        raise Unsupported(node.name, f"vLLM's has other arguments than {', '.join(given)}", stage="define")
    position = len(call.op._schema.returns) or 1
    out = node.spec[position] if isinstance(node.spec, tuple) else None
    if place is None or place[1] is not None or not isinstance(out, Spec) or len(call.written) > 1:
        # More than one: an operand is the very tensor that is written.
        raise Unsupported(node.name, "it writes a part of a tensor, or what it reads", stage="define")
    scales = given["a_scales"], given["b_scales"]
    _scaled(d, node, given["a"], given["b"], scales, given.get("bias"), f"{node.name}#{position}", Layout.of(out))


@rule(aten._scaled_mm.default)
def scaled_mm(d: Definer, node: Node) -> None:
    """torch's product of eight-bit floats."""
    names = (argument.name for argument in node.op._schema.arguments)
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if given.get("scale_result") is not None:
        raise Unsupported(node.name, "its result is scaled as well", stage="define")
    if not given.get("use_fast_accum"):
        raise Unsupported(node.name, "without fast accumulation its own kernel sums more exactly", stage="define")
    scales, layout = (given["scale_a"], given["scale_b"]), Layout.of(node.spec)  # type: ignore[arg-type]
    _scaled(d, node, given["self"], given["mat2"], scales, given.get("bias"), node.name, layout)


def _scaled(
    d: Definer, node: Node, x: Ref, w: Ref, scales: tuple[Ref, Ref], bias: Ref | None, name: str, layout: Layout
) -> None:
    """Sums of products of eight-bit floats, which tensor cores add up in less than fp32 (fast accumulation), times a
    scale for each column of the second operand (or one for all) and then one for each row of the first (or one), plus a
    bias for each column, rounded once. For few tokens, where reading W is the cost."""
    a, b = d.view(x), d.view(w)
    if d.arch != 90:
        raise Unsupported(node.name, f"eight-bit products are tuned for sm_90, not sm_{d.arch}", stage="define")
    if a.layout.dtype != FLOAT8 or b.layout.dtype != FLOAT8:
        raise Unsupported(node.name, f"a product of {a.layout.dtype} and {b.layout.dtype}", stage="define")
    (m, k), n = a.layout.shape, b.layout.shape[1]
    if m > FEW_TOKENS:
        raise Unsupported(node.name, f"for more than {FEW_TOKENS} tokens its own kernel is taken", stage="define")
    if layout.dtype not in ROUNDED:
        raise Unsupported(node.name, f"its result is {layout.dtype}", stage="define")
    if a.layout.stride[1] != 1 or b.layout.stride[0] != 1:
        raise Unsupported(node.name, "its operands' rows do not lie along the depth", stage="define")
    begins = a.layout.stride[0], a.offset, b.layout.stride[1], b.offset
    if not k or any(at % TMA_ALIGNMENT_BYTES for at in begins):
        fact = f"its operands' rows do not begin at multiples of {TMA_ALIGNMENT_BYTES} bytes, or are empty"
        raise Unsupported(node.name, fact, stage="define")
    sums = Layout.contiguous((m, n), torch.float32, layout.device)
    d.put(Contract(f"{name}_sums", sums, a, b, m, n, k, node.source, rounded=False, few=FEW_TOKENS))
    row, col = variables(layout.shape)
    value = d.read(Ref(f"{name}_sums"), (row, col))
    # Columns first, as vLLM's own kernel does: what overflows on the way, and how it rounds, is then the same.
    for given, at, count in ((scales[1], col, n), (scales[0], row, m)):
        scale = d.layout(given)
        one = scale.numel == 1
        if scale.dtype != torch.float32 or not (one or (scale.dense and alike(scale.numel, count))):
            fact = f"its scales are {scale.shape} of {scale.dtype}, strides {scale.stride}"
            raise Unsupported(node.name, fact, stage="define")
        element = d.read_broadcast(given, variables(scale.shape) if one else at_flat(at, scale.shape))
        value = apply("mul", value, element, dtype=torch.float32)
    if bias is not None:
        added = d.layout(bias)
        if len(added.shape) != 1 or not alike(added.numel, n) or added.dtype not in ROUNDED:
            raise Unsupported(node.name, f"its bias is {added.shape} of {added.dtype}", stage="define")
        value = apply("add", value, cast(d.read_broadcast(bias, (row, col)), torch.float32), dtype=torch.float32)
    d.map(node, value, name=name, layout=layout)
