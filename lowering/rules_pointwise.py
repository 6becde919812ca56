"""Lowering rules: ops whose element depends on the elements at the same place.

One table for the ops that are one function of their operands, and a few rules for those that need more. The arithmetic
dtype is torch's own: fp32 for half-precision results, the promoted dtype of the operands for comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .affine import variables
from .define import Definer, rule
from .errors import Unsupported
from .expr import Expr, apply, cast, const
from .functions import register
from .ir import Node, Ref
from .values import Layout

aten = torch.ops.aten
prims = torch.ops.prims

UNARY: dict[str, Any] = {
    "exp": aten.exp, "exp2": aten.exp2, "expm1": aten.expm1, "log": aten.log, "log2": aten.log2, "log10": aten.log10,
    "log1p": aten.log1p, "sqrt": aten.sqrt, "rsqrt": aten.rsqrt, "sin": aten.sin, "cos": aten.cos, "tan": aten.tan,
    "asin": aten.asin, "acos": aten.acos, "atan": aten.atan, "sinh": aten.sinh, "cosh": aten.cosh, "tanh": aten.tanh,
    "asinh": aten.asinh, "acosh": aten.acosh, "atanh": aten.atanh, "erf": aten.erf, "erfc": aten.erfc,
    "erfinv": aten.erfinv, "lgamma": aten.lgamma, "sigmoid": aten.sigmoid, "reciprocal": aten.reciprocal,
    "abs": aten.abs, "ceil": aten.ceil, "floor": aten.floor, "round": aten.round.default,
    "trunc": aten.trunc, "relu": aten.relu, "silu": aten.silu,
    "bitwise_not": aten.bitwise_not,
}  # fmt: skip

BINARY: dict[str, Any] = {
    "mul": aten.mul, "pow": aten.pow, "fmod": aten.fmod, "remainder": aten.remainder,
    "maximum": aten.maximum, "minimum": aten.minimum, "fmax": aten.fmax, "fmin": aten.fmin, "atan2": aten.atan2,
    "hypot": aten.hypot, "copysign": aten.copysign, "bitwise_and": aten.bitwise_and, "bitwise_or": aten.bitwise_or,
    "bitwise_xor": aten.bitwise_xor,
}  # fmt: skip

SHIFTS = {"shift_left": ("bitwise_left_shift", "__lshift__"), "shift_right": ("bitwise_right_shift", "__rshift__")}

COMPARE = {"eq": aten.eq, "ne": aten.ne, "lt": aten.lt, "le": aten.le, "gt": aten.gt, "ge": aten.ge}
LOGICAL = {"logical_and": aten.logical_and, "logical_or": aten.logical_or, "logical_xor": aten.logical_xor}
TESTS = {"isnan": aten.isnan, "isinf": aten.isinf}

SIMPLE = {
    aten.sign.default: "sign",
    aten.sgn.default: "sign",
    aten.neg.default: "neg",
    aten._neg_view.default: "neg",
    **{
        getattr(getattr(aten, packet), overload): name
        for name, packets in SHIFTS.items()
        for packet in packets
        for overload in getattr(aten, packet).overloads()
    },
} | {
    overload: name
    for table in (UNARY, BINARY)
    for name, packet in table.items()
    for overload in (
        [packet] if isinstance(packet, torch._ops.OpOverload) else [getattr(packet, n) for n in packet.overloads()]
    )
}
BY_PACKET = {packet: name for table in (COMPARE, LOGICAL, TESTS) for name, packet in table.items()}


def operands(d: Definer, node: Node, args: Sequence[Any], dtype: torch.dtype) -> list[Expr]:
    """The arguments' elements at the result's index, in the dtype given."""
    index = variables(Layout.of(node.spec).shape)  # type: ignore[arg-type]
    return [cast(d.read_broadcast(a, index), dtype) for a in args]


def promoted_operands(
    d: Definer, node: Node, args: Sequence[Any], common: torch.dtype, numbers: bool = False
) -> list[Expr]:
    """The arguments as torch's arithmetic sees them: rounded to the common dtype, then in `register(common)`.

    Args:
        common: the dtype that the operands promote to.
        numbers: whether Python numbers are rounded as well; in sums and products they keep fp32's precision.
    """
    dtype = register(common)
    found = operands_as_they_are(d, node, args)
    return [
        cast(cast(value, common) if numbers or isinstance(arg, Ref) else value, dtype)
        for arg, value in zip(args, found, strict=True)
    ]


def _result(node: Node) -> torch.dtype:
    return node.spec.dtype  # type: ignore[union-attr]


@rule(*SIMPLE)
def simple(d: Definer, node: Node) -> None:
    dtype = register(_result(node))
    if node.kwargs.get("rounding_mode") or len(node.args) > 2 or dtype == torch.bool and SIMPLE[node.op] == "neg":
        raise Unsupported(node.name, f"{node.target} with these arguments", stage="define")
    args = promoted_operands(d, node, node.args, _result(node))
    fn = SIMPLE[node.op]
    if fn == "neg" and dtype.is_floating_point:
        # Triton's minus is 0 - x, which loses the sign of zero.
        d.map(node, apply("mul", args[0], const(-1.0, dtype), dtype=dtype))
    elif fn == "sign" and dtype == torch.bool:
        d.map(node, args[0])
    elif fn == "pow":
        d.map(node, power(args[0], node.args[1], args[1]))
    elif dtype == torch.bool and fn in ("mul", "maximum", "minimum"):
        d.map(node, apply("bitwise_or" if fn == "maximum" else "bitwise_and", *args, dtype=dtype))
    elif not dtype.is_floating_point and fn in ("ceil", "floor", "round", "trunc"):
        d.map(node, args[0])
    else:
        d.map(node, apply(fn, *args, dtype=dtype))


def power(base: Expr, exponent: Any, exponent_expr: Expr) -> Expr:
    """x**n; whole exponents up to 4 as products, halves as roots."""
    dtype = base.dtype
    if exponent == 0 and isinstance(exponent, (int, float)):
        return const(1, dtype)
    if exponent == 2:
        return apply("mul", base, base, dtype=dtype)
    if exponent == 3:
        return apply("mul", apply("mul", base, base, dtype=dtype), base, dtype=dtype)
    if exponent == 1:
        return base
    if dtype.is_floating_point and exponent == 0.5:
        return apply("sqrt", base, dtype=dtype)
    if dtype.is_floating_point and exponent == -0.5:
        return apply("rsqrt", base, dtype=dtype)
    if dtype.is_floating_point and exponent == -1:
        return apply("reciprocal", base, dtype=dtype)
    return apply("pow", base, exponent_expr, dtype=dtype)


@rule(aten.add, aten.sub, aten.rsub)
def additive(d: Definer, node: Node) -> None:
    dtype = register(_result(node))
    a, b = promoted_operands(d, node, node.args[:2], _result(node))
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    if node.op in (aten.rsub.Tensor, aten.rsub.Scalar):
        a, b = b, a
    if alpha != 1:
        b = apply("mul", b, cast(d.number(alpha), dtype), dtype=dtype)
    fn = "add" if node.op in (aten.add.Tensor, aten.add.Scalar) else "sub"
    if dtype == torch.bool:
        fn = "bitwise_or"
    d.map(node, apply(fn, a, b, dtype=dtype))


@rule(aten.div, aten.floor_divide)
def divide(d: Definer, node: Node) -> None:
    dtype = register(_result(node))
    a, b = promoted_operands(d, node, node.args[:2], _result(node))
    mode = node.kwargs.get("rounding_mode", node.args[2] if len(node.args) > 2 else None)
    if node.op in (aten.floor_divide.default, aten.floor_divide.Scalar):
        mode = "floor"
    fn = {None: "div", "floor": "div_floor", "trunc": "div_trunc"}[mode]
    d.map(node, apply(fn, a, b, dtype=dtype))


@rule(*BY_PACKET)
def predicate(d: Definer, node: Node) -> None:
    fn = BY_PACKET[node.op.overloadpacket]
    if fn in LOGICAL:
        args = [truth(a) for a in operands_as_they_are(d, node, node.args)]
        d.map(
            node,
            apply(
                {"logical_and": "bitwise_and", "logical_or": "bitwise_or", "logical_xor": "bitwise_xor"}[fn],
                *args,
                dtype=torch.bool,
            ),
        )
        return
    args = promoted_operands(d, node, node.args, promoted(d, node.args), numbers=True)
    if fn in TESTS and not args[0].dtype.is_floating_point:
        d.map(node, const(False, torch.bool))
    else:
        d.map(node, apply(fn, *args, dtype=torch.bool))


def promoted(d: Definer, args: Sequence[Any]) -> torch.dtype:
    """The dtype torch promotes the operands of a comparison to."""
    samples = [
        torch.empty([1] * len(d.layout(a).shape), dtype=d.layout(a).dtype, device="meta") if isinstance(a, Ref) else a
        for a in args
    ]
    return samples[0].dtype if len(samples) == 1 else torch.result_type(*samples)


def operands_as_they_are(d: Definer, node: Node, args: Sequence[Any]) -> list[Expr]:
    """The arguments' elements at the result's index."""
    index = variables(Layout.of(node.spec).shape)  # type: ignore[arg-type]
    return [d.read_broadcast(a, index) for a in args]


def truth(value: Expr) -> Expr:
    """`value != 0` as bool."""
    return value if value.dtype == torch.bool else apply("ne", value, const(0, value.dtype), dtype=torch.bool)


@rule(aten.logical_not)
def logical_not(d: Definer, node: Node) -> None:
    d.map(node, apply("bitwise_not", truth(operands_as_they_are(d, node, node.args)[0]), dtype=torch.bool))


@rule(aten.signbit)
def signbit(d: Definer, node: Node) -> None:
    value = operands_as_they_are(d, node, node.args)[0]
    if value.dtype.is_floating_point:
        value = cast(value, register(value.dtype))
        value = apply("copysign", const(1.0, value.dtype), value, dtype=value.dtype)
    negative = apply("lt", value, const(0, value.dtype), dtype=torch.bool)
    d.map(node, const(False, torch.bool) if value.dtype in (torch.bool, torch.uint8) else negative)


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(d: Definer, node: Node) -> None:
    cond, a, b = operands_as_they_are(d, node, node.args)
    dtype = _result(node)
    d.map(node, apply("where", truth(cond), cast(a, dtype), cast(b, dtype), dtype=dtype))


@rule(aten.clamp.default, aten.clamp.Tensor, aten.clamp_min, aten.clamp_max)
def clamp(d: Definer, node: Node) -> None:
    dtype = register(_result(node))
    given = [*node.args, None, None]
    low, high = given[1], given[2]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    if node.op in (aten.clamp_max.default, aten.clamp_max.Tensor):
        low, high = None, given[1]
    value = operands(d, node, [given[0]], dtype)[0]
    if low is not None:
        value = apply("maximum", value, operands(d, node, [low], dtype)[0], dtype=dtype)
    if high is not None:
        value = apply("minimum", value, operands(d, node, [high], dtype)[0], dtype=dtype)
    d.map(node, value)


@rule(aten.gelu)
def gelu(d: Definer, node: Node) -> None:
    dtype = register(_result(node))
    value = operands(d, node, node.args[:1], dtype)[0]
    if node.kwargs.get("approximate", "none") == "tanh":
        # (1 + tanh(z)) / 2 is sigmoid(2 z), which costs less, and less of which cancels.
        cube = apply("mul", apply("mul", value, value, dtype=dtype), value, dtype=dtype)
        inner = apply("add", value, apply("mul", cube, const(0.044715, dtype), dtype=dtype), dtype=dtype)
        twice = apply("mul", inner, const(2 * math.sqrt(2 / math.pi), dtype), dtype=dtype)
        gate = apply("sigmoid", twice, dtype=dtype)
    else:
        curve = apply("erf", apply("mul", value, const(math.sqrt(0.5), dtype), dtype=dtype), dtype=dtype)
        gate = apply("mul", const(0.5, dtype), apply("add", curve, const(1.0, dtype), dtype=dtype), dtype=dtype)
    d.map(node, apply("mul", value, gate, dtype=dtype))


@rule(aten._to_copy, prims.convert_element_type)
def convert(d: Definer, node: Node) -> None:
    source, layout = d.layout(node.args[0]), Layout.of(node.spec)  # type: ignore[arg-type]
    if source.device != layout.device:
        raise Unsupported(node.name, f"it moves data from {source.device} to {layout.device}", stage="define")
    d.map(node, cast(d.read(node.args[0], variables(layout.shape)), layout.dtype))


@rule(aten.clone, aten.lift_fresh_copy)
def clone(d: Definer, node: Node) -> None:
    d.map(node, d.read(node.args[0], variables(Layout.of(node.spec).shape)))  # type: ignore[arg-type]


@rule(aten.copy)
def copy(d: Definer, node: Node) -> None:
    d.map(node, operands(d, node, [node.args[1]], _result(node))[0])


@rule(aten.fill, aten.full_like, aten.full, aten.zeros, aten.ones, aten.zeros_like, aten.ones_like, aten.scalar_tensor)
def fill(d: Definer, node: Node) -> None:
    fixed = {aten.zeros: 0, aten.zeros_like: 0, aten.ones: 1, aten.ones_like: 1}
    packet = node.op.overloadpacket
    value = fixed[packet] if packet in fixed else node.args[0] if packet is aten.scalar_tensor else node.args[1]
    dtype = _result(node)
    if isinstance(value, Ref):
        d.map(node, operands(d, node, [value], dtype)[0])
    else:
        d.map(node, cast(d.number(value), dtype))
