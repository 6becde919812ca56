"""Elementwise rules against eager: every op, every dtype, promotion, special values, odd shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from .equal import odd, same

SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 0.5, 1.5, -0.5, math.inf, -math.inf, math.nan, 3e38, 1e-45])
INTEGERS = torch.tensor([0, 1, -1, 2, -2, 7, -7, 8, -8])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool]

# Functions of one float tensor; the number is the range their argument is taken from.
FLOAT_UNARY: dict[str, tuple[Callable[..., Any], float, float]] = {
    "exp": (torch.exp, -4, 4),
    "exp2": (torch.exp2, -4, 4),
    "expm1": (torch.expm1, -2, 2),
    "log": (torch.log, 0.1, 9),
    "log2": (torch.log2, 0.1, 9),
    "log10": (torch.log10, 0.1, 9),
    "log1p": (torch.log1p, -0.9, 9),
    "sqrt": (torch.sqrt, 0, 9),
    "rsqrt": (torch.rsqrt, 0.1, 9),
    "sin": (torch.sin, -9, 9),
    "cos": (torch.cos, -9, 9),
    "tan": (torch.tan, -1, 1),
    "asin": (torch.asin, -1, 1),
    "acos": (torch.acos, -1, 1),
    "atan": (torch.atan, -9, 9),
    "sinh": (torch.sinh, -3, 3),
    "cosh": (torch.cosh, -3, 3),
    "tanh": (torch.tanh, -3, 3),
    "asinh": (torch.asinh, -3, 3),
    "acosh": (torch.acosh, 1.1, 9),
    "atanh": (torch.atanh, -0.9, 0.9),
    "erf": (torch.erf, -3, 3),
    "erfc": (torch.erfc, -3, 3),
    "erfinv": (torch.erfinv, -0.9, 0.9),
    "lgamma": (torch.lgamma, 0.1, 9),
    "sigmoid": (torch.sigmoid, -9, 9),
    "reciprocal": (torch.reciprocal, 0.1, 9),
    "silu": (F.silu, -9, 9),
    "gelu": (F.gelu, -3, 3),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), -3, 3),
    "mish": (F.mish, -9, 30),
    "softplus": (F.softplus, -30, 30),
    "softplus_beta": (lambda x: F.softplus(x, beta=2.0, threshold=5.0), -9, 9),
    "logsigmoid": (F.logsigmoid, -30, 30),
    "hardswish": (F.hardswish, -9, 9),
    "hardsigmoid": (F.hardsigmoid, -9, 9),
    "elu": (F.elu, -3, 3),
    "celu": (lambda x: F.celu(x, alpha=0.7), -3, 3),
    "selu": (F.selu, -3, 3),
    "leaky_relu": (F.leaky_relu, -3, 3),
    "hardtanh": (F.hardtanh, -3, 3),
    "relu6": (F.relu6, -9, 9),
    "threshold": (lambda x: F.threshold(x, 0.1, 20.0), -1, 1),
    "softsign": (F.softsign, -9, 9),
    "hardshrink": (F.hardshrink, -2, 2),
    "softshrink": (F.softshrink, -2, 2),
    "tanhshrink": (F.tanhshrink, -2, 2),
    "logit": (torch.logit, 0.1, 0.9),
    "frac": (torch.frac, -9, 9),
    "square": (torch.square, -9, 9),
    "deg2rad": (torch.deg2rad, -90, 90),
    "sinc": (torch.sinc, -3, 3),
    "digamma": (torch.digamma, 0.5, 9),
}
WITHOUT_RULE = {"digamma"}


@pytest.mark.parametrize("name", FLOAT_UNARY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_of_one_float(name: str, dtype: torch.dtype) -> None:
    fn, low, high = FLOAT_UNARY[name]
    same(fn, (torch.rand(67) * (high - low) + low).to(dtype), itself=name in WITHOUT_RULE)


@pytest.mark.parametrize(
    "fn", [torch.sin, torch.sqrt, torch.sigmoid, torch.reciprocal, torch.exp, torch.rsqrt, torch.log1p]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8, torch.float64, torch.float16])
def test_floats_made_of_any_dtype(fn: Callable[..., Any], dtype: torch.dtype) -> None:
    same(fn, odd(13, dtype=dtype).abs() if dtype != torch.bool else odd(13, dtype=dtype))


# These round nothing: bits, NaN and the sign of zero are eager's.
EXACT: dict[str, Callable[..., Any]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "ceil": torch.ceil,
    "floor": torch.floor,
    "round": torch.round,
    "trunc": torch.trunc,
    "relu": torch.relu,
    "sign": torch.sign,
    "sgn": torch.sgn,
    "positive": torch.positive,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "isfinite": torch.isfinite,
    "signbit": torch.signbit,
    "logical_not": torch.logical_not,
    "clamp": lambda x: x.clamp(-1, 2),
    "clamp_min": lambda x: x.clamp(min=0),
    "clamp_max": lambda x: x.clamp(max=0),
    "clamp_crossed": lambda x: x.clamp(2, -1),
    "nan_to_num": torch.nan_to_num,
    "isposinf": torch.isposinf,
    "to_bool": lambda x: x.to(torch.bool),
    "half": lambda x: x.to(torch.float16),
    "bf16": lambda x: x.to(torch.bfloat16),
    "where": lambda x: torch.where(x > 0, x, -1),
    "where_nan": lambda x: torch.where(x > 0, float("nan"), x),
    "heaviside": lambda x: torch.heaviside(x, x),
    "masked_fill": lambda x: x.masked_fill(x > 0, 3),
    "eq": lambda x: x == 1,
    "ne": lambda x: x != x,
    "lt": lambda x: x < 0.5,
    "threshold": lambda x: F.threshold(x, 0.0, 1.0),
}


@pytest.mark.parametrize("name", EXACT)
def test_special_values_keep_their_bits(name: str) -> None:
    same(
        EXACT[name], SPECIAL, exact=True, zeros=name not in {"relu", "clamp", "clamp_min", "clamp_max", "clamp_crossed"}
    )


FLOAT_ONLY = {"ceil", "floor", "round", "trunc", "heaviside", "threshold", "frac"}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("name", [n for n in EXACT if n not in {"heaviside", "threshold"}])
def test_the_same_on_integers(name: str, dtype: torch.dtype) -> None:
    x = odd(11, dtype=dtype)
    try:
        EXACT[name](x)
    except (RuntimeError, NotImplementedError):
        return
    same(EXACT[name], x, exact=True)


BINARY: dict[str, Callable[..., Any]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "fmax": torch.fmax,
    "fmin": torch.fmin,
    "fmod": torch.fmod,
    "remainder": torch.remainder,
    "floor_divide": torch.floor_divide,
    "div_floor": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "div_trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "rsub": torch.rsub,
    "add_alpha": lambda a, b: torch.add(a, b, alpha=2),
    "copysign": torch.copysign,
    "atan2": torch.atan2,
    "hypot": torch.hypot,
    "pow": torch.pow,
    "xlogy": torch.xlogy,
    "logaddexp": torch.logaddexp,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "left": torch.bitwise_left_shift,
    "right": torch.bitwise_right_shift,
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "where": lambda a, b: torch.where(a > b, a, b),
    "isclose": torch.isclose,
    "nextafter": torch.nextafter,
}
ROUNDED = {"atan2", "hypot", "pow", "xlogy", "logaddexp", "isclose"}
# Their quotients overflow, where torch's fmod on a CPU depends on the vector width.
DIVIDING = {"fmod", "remainder", "floor_divide", "div_floor", "div_trunc"}
# Eager's own order of operations decides which of these overflow.
OVERFLOWING = {"add_alpha", "lerp"}
BINARY_ITSELF = {"nextafter"}


def pairs(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return values[:, None], values[None, :]


@pytest.mark.parametrize("name", sorted(set(BINARY) - OVERFLOWING))
def test_special_pairs(name: str) -> None:
    a, b = pairs(SPECIAL[:-2] if name in DIVIDING else SPECIAL)
    try:
        BINARY[name](a, b)
    except (RuntimeError, NotImplementedError):
        return
    exact = name not in ROUNDED
    same(BINARY[name], a.contiguous(), b.contiguous(), exact=exact, itself=name in BINARY_ITSELF)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float16, torch.float64]
)
@pytest.mark.parametrize("name", BINARY)
def test_pairs_of_every_dtype(name: str, dtype: torch.dtype) -> None:
    a, b = pairs(
        (odd(17, dtype=dtype) if dtype.is_floating_point else INTEGERS.abs() if dtype == torch.uint8 else INTEGERS).to(
            dtype
        )
    )
    if name in ("left", "right") and dtype != torch.bool:
        b = b * 9
    if name == "pow" and dtype.is_floating_point:
        b = b.abs() % 5
    if name in DIVIDING and dtype != torch.bool:
        b = torch.where(b == 0, 3, b).to(dtype)
    try:
        BINARY[name](a, b)
    except (RuntimeError, NotImplementedError):
        return
    same(BINARY[name], a.contiguous(), b.contiguous(), itself=name in BINARY_ITSELF)


def test_powers_of_integers() -> None:
    same(lambda x: (x**0, x**5, x**63, x**100, 3**x, (-1) ** x, 2**x), torch.arange(0, 9))
    same(lambda x, y: x.pow(y), torch.arange(-4, 5)[:, None], torch.arange(-4, 70))
    same(lambda x, y: x.pow(y), torch.arange(-4, 5, dtype=torch.int8)[:, None], torch.arange(9, dtype=torch.int8))


@pytest.mark.parametrize(
    "fn", [torch.add, torch.mul, torch.div, torch.sub, torch.floor_divide, torch.remainder, torch.pow, torch.gt]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [2, 2.5, True])
def test_python_numbers_promote_as_in_eager(fn: Callable[..., Any], dtype: torch.dtype, number: Any) -> None:
    x = odd(7, dtype=dtype)
    if fn is torch.pow and dtype == torch.bool and number is True:
        pytest.skip("torch's tracing makes it int64, its kernels bool")
    try:
        fn(x, number)
    except RuntimeError:
        return
    same(lambda x: fn(x, number), x)


@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool])
@pytest.mark.parametrize("rank", [0, 1])
def test_tensors_promote_as_in_eager(dtype: torch.dtype, other: torch.dtype, rank: int) -> None:
    y = odd(5, dtype=other) if rank else odd(1, dtype=other)[0]
    same(lambda x, y: (x + y, x * y, x == y, torch.where(x > y, x, y)), odd(5, dtype=dtype), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_constant_keeps_the_sign_of_zero(dtype: torch.dtype) -> None:
    same(lambda x: torch.full_like(x, -0.0).copysign(torch.full_like(x, -0.0)), SPECIAL.to(dtype))
    same(lambda x: 1 / torch.where(x > 1, 0.0, torch.full_like(x, -0.0)), SPECIAL.to(dtype))


def test_shifts_of_and_by_numbers() -> None:
    same(lambda x: (x << 3, x >> 2, x << 70, x >> 70, 5 << x), torch.arange(-4, 5))
