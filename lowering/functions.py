"""Expressions' functions as Triton source: which text a function is, for floats, integers and fp64, and its operands'
casts."""

from __future__ import annotations

import math
import re

import torch

from .errors import InternalError
from .expr import Apply, Const

TYPES = {
    torch.float32: "tl.float32", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16", torch.float64:
    "tl.float64", torch.int64: "tl.int64", torch.int32: "tl.int32", torch.int16: "tl.int16", torch.int8: "tl.int8",
    torch.uint8: "tl.uint8", torch.bool: "tl.int1", torch.float8_e4m3fn: "tl.float8e4nv",
}  # fmt: skip

# What fp32 stands for in registers.
SMALL = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)

# Float functions; {0}, {1}, … are the operands. Those without `tl.` or `libdevice.` are from kernels/functions.py.
FUNCTIONS = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "tl.div_rn({0}, {1})", "neg": "-{0}",
    "exp": "libdevice.exp({0})", "exp2": "tl.exp2({0})", "log": "tl.log({0})", "log2": "tl.log2({0})",
    "sqrt": "tl.sqrt_rn({0})", "rsqrt": "tl.rsqrt({0})", "sin": "libdevice.sin({0})", "cos": "libdevice.cos({0})",
    "abs": "tl.abs({0})", "floor": "tl.floor({0})", "ceil": "tl.ceil({0})", "erf": "tl.erf({0})",
    "reciprocal": "tl.div_rn(1.0, {0})", "sigmoid": "sigmoid({0})", "silu": "silu({0})", "tanh": "tanh({0})",
    "relu": "relu({0})", "sign": "sign({0})", "maximum": "maximum({0}, {1})", "minimum": "minimum({0}, {1})",
    "div_floor": "div_floor({0}, {1})", "div_trunc": "div_trunc({0}, {1})", "remainder": "remainder({0}, {1})",
    "where": "tl.where({0}, {1}, {2})", "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}",
    "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}", "isnan": "{0} != {0}",
    "isinf": "tl.abs({0}) == float('inf')", "fmax": "tl.maximum({0}, {1})", "fmin": "tl.minimum({0}, {1})",
    "round": "libdevice.nearbyint({0})",
}  # fmt: skip

LIBDEVICE = {
    "expm1", "log10", "log1p", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erfc",
    "erfinv", "lgamma", "trunc", "pow", "fmod", "atan2", "hypot", "copysign",
}  # fmt: skip

# Where integers differ from floats.
INTEGERS = {
    "div_floor": "div_floor_int({0}, {1})", "div_trunc": "div_trunc_int({0}, {1})", "fmod": "fmod_int({0}, {1})",
    "remainder": "remainder_int({0}, {1})", "pow": "pow_int({0}, {1})",
    "maximum": "tl.maximum({0}, {1})", "minimum": "tl.minimum({0}, {1})",
    "bitwise_and": "{0} & {1}", "bitwise_or": "{0} | {1}", "bitwise_xor": "{0} ^ {1}", "bitwise_not": "~{0}",
    "shift_left": "shift_left({0}, {1})", "shift_right": "shift_right({0}, {1})",
}  # fmt: skip

# Where fp64 differs: its division and root are exact anyway.
DOUBLES = {"div": "{0} / {1}", "sqrt": "tl.sqrt({0})", "reciprocal": "1.0 / {0}"}

HELPER_NAMES = (
    "maximum", "minimum", "relu", "silu", "sigmoid", "tanh", "sign", "div_floor", "div_floor_int", "div_trunc",
    "div_trunc_int", "fmod_int", "remainder", "remainder_int", "row_sum", "row_max", "row_min", "row_prod",
    "row_any", "row_all", "row_argmax", "row_argmin", "row_running_sum", "row_running_prod", "shift_left",
    "shift_right", "pow_int", "load_parts", "store_sums", "sum_of_heads",
)  # fmt: skip
HELPERS = re.compile(rf"\b({'|'.join(HELPER_NAMES)})\(")

COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}


def register(dtype: torch.dtype) -> torch.dtype:
    """The dtype a value of this dtype has while it is in registers."""
    return torch.float32 if dtype in SMALL else dtype


def constant(expr: Const) -> str:
    """A number as source."""
    value = expr.value
    if expr.dtype == torch.bool:
        return str(bool(value))
    if expr.dtype.is_floating_point:
        number = float(value)
        if number == 0 and math.copysign(1, number) < 0:
            # Triton makes every constant that equals 0 a positive one.
            return f"(tl.cast(-1.0, {TYPES[register(expr.dtype)]}) * 0.0)"
        return f'float("{number}")' if not math.isfinite(number) else repr(number)
    return str(int(value))


def apply_text(expr: Apply, parts: list[str]) -> str:
    """A function call as source, its operands given as text."""
    if expr.fn in ("cast", "keep"):
        return cast_text(expr, parts[0])
    wrapped = [p if atomic(p) else f"({p})" for p in parts]
    of = expr.args[-1].dtype
    if expr.fn == "where":
        return tl_where(expr, parts)
    if not of.is_floating_point and expr.fn in INTEGERS:
        template = INTEGERS[expr.fn]
        if "(" not in template:
            # An operator gives a number the type of its other operand; a function takes it for one of 32 bits.
            return template.format(*wrapped)
        typed = zip(parts, expr.args, strict=True)
        return template.format(*(f"tl.cast({p}, {TYPES[of]})" if isinstance(a, Const) else p for p, a in typed))
    if of == torch.float64 and expr.fn in DOUBLES:
        return DOUBLES[expr.fn].format(*wrapped)
    if expr.fn in FUNCTIONS:
        template = FUNCTIONS[expr.fn]
        return template.format(*(parts if "(" in template else wrapped))
    if expr.fn in LIBDEVICE:
        return f"libdevice.{expr.fn}({', '.join(parts)})"
    raise InternalError(expr.fn, "no Triton source for this function", stage="emit")


def tl_where(expr: Apply, parts: list[str]) -> str:
    """Select; constants take the dtype of the other branch."""
    a, b = parts[1:]
    if isinstance(expr.args[1], Const) and isinstance(expr.args[2], Const) and not a.startswith("("):
        kind = register(expr.dtype)
        # A cast starts from fp32, which is not exact enough for fp64.
        a = f"tl.full([1, 1], {a}, tl.float64)" if kind == torch.float64 else f"tl.cast({a}, {TYPES[kind]})"
    return f"tl.where({parts[0]}, {a}, {b})"


def cast_text(expr: Apply, part: str) -> str:
    source, dtype = expr.args[0].dtype, expr.dtype
    inner = part if atomic(part) else f"({part})"
    if expr.fn == "keep" or (source in SMALL and dtype == torch.float32):
        return part
    if isinstance(expr.args[0], Const):
        return part if dtype != torch.bool else str(bool(expr.args[0].value))
    if dtype == torch.bool:
        return f"{inner} != 0"
    if register(dtype) != dtype:
        if dtype.itemsize == 1 and register(source) != torch.float32:
            # Nothing but fp32 is rounded to eight bits at once, by eager neither.
            inner = f"{inner}.to(tl.float32)"
        return f"{inner}.to({TYPES[dtype]}).to(tl.float32)"
    if register(source) == dtype:
        return part
    return f"{inner}.to({TYPES[dtype]})"


def atomic(text: str) -> bool:
    """Whether a text can be an operand without parentheses."""
    if re.fullmatch(r"[\w.]+|[\d.]+e-\d+|float\(\"-?\w+\"\)", text):
        return True
    if not re.match(r"[\w.]+\(", text) and not text.startswith("("):
        return False
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and c == ")" and i < len(text) - 1:
            return bool(re.fullmatch(r"(\.to\([\w.]+\))+", text[i + 1 :]))
    return True
