"""Reductions against eager: every kind, dimensions of every sort, ties, NaN, nothing to reduce."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .equal import odd, same

X = torch.Tensor
KINDS: dict[str, Callable[..., Any]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "amax": torch.amax,
    "amin": torch.amin,
    "prod": torch.prod,
    "any": torch.any,
    "all": torch.all,
    "argmax": torch.argmax,
    "argmin": torch.argmin,
    "var": torch.var,
    "std": torch.std,
    "logsumexp": torch.logsumexp,
    "max": torch.max,
    "min": torch.min,
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "nansum": torch.nansum,
    "var_mean": torch.var_mean,
    "std_mean": torch.std_mean,
    "norm": lambda x, d: torch.linalg.vector_norm(x, dim=d),
    "count": torch.count_nonzero,
    "norm1": lambda x, d: torch.linalg.vector_norm(x, 1, dim=d),
    "norminf": lambda x, d: torch.linalg.vector_norm(x, math.inf, dim=d),
    "aminmax": lambda x, d: torch.aminmax(x, dim=d),
}
SHAPES = [((7,), 0), ((5, 17), 1), ((5, 17), 0), ((3, 1, 13), -2), ((3, 4, 5), 1), ((1, 1), -1), ((2, 131), -1)]
SEVERAL = ["sum", "mean", "amax", "amin", "var", "std", "logsumexp", "any", "all", "var_mean"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_along_one_dimension(name: str, shape: tuple[int, ...], dim: int) -> None:
    if shape[dim] == 1 and name in ("var", "std", "var_mean", "std_mean"):
        return
    if name in ("norm", "norm1"):
        # torch 2.11's fake result on a GPU keeps a dimension of size 1 that is counted from the back.
        dim %= len(shape)
    same(lambda x: KINDS[name](x, dim), odd(*shape))


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("dims", [(0, 2), (-1, -2), (0, 1, 2), (1,)])
def test_along_several_dimensions(name: str, dims: tuple[int, ...]) -> None:
    same(lambda x: KINDS[name](x, dims), odd(3, 4, 5))
    same(lambda x: KINDS[name](x, dims, keepdim=True), odd(3, 4, 5))


@pytest.mark.parametrize(
    "name", ["sum", "mean", "amax", "amin", "prod", "any", "all", "argmax", "argmin", "max", "min", "var", "std"]
)
def test_everything(name: str) -> None:
    same(KINDS[name], odd(3, 5))
    if name not in ("var", "std"):
        same(KINDS[name], odd(1)[0])


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.bfloat16, torch.float16, torch.float64],
)
@pytest.mark.parametrize(
    "name",
    ["sum", "amax", "amin", "prod", "any", "all", "argmax", "argmin", "max", "min", "mean", "var", "softmax", "count"],
)
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    x = odd(4, 6, dtype=dtype)
    try:
        KINDS[name](x, 1)
    except (RuntimeError, NotImplementedError):
        return
    same(lambda x: KINDS[name](x, 1), x)


def test_dtypes_asked_for() -> None:
    same(lambda x: (x.sum(1, dtype=torch.float32), x.mean(0, dtype=torch.float64)), odd(4, 6, dtype=torch.bfloat16))
    # Whole numbers, so that every order of adding gives the same.
    same(lambda x: x.sum(1, dtype=torch.bfloat16).float() + 0.5, odd(4, 600, dtype=torch.int64).float() * 7, exact=True)
    same(lambda x: (x.sum(dtype=torch.int32), x.prod(dtype=torch.float32)), odd(4, dtype=torch.int64))
    same(lambda x: torch.softmax(x, 1, dtype=torch.float32), odd(4, 6, dtype=torch.bfloat16))


SPECIAL = torch.tensor(
    [
        [1.0, math.nan, 3.0],
        [math.nan, math.nan, 1.0],
        [-math.inf, -math.inf, -math.inf],
        [math.inf, 1.0, math.inf],
        [2.0, 2.0, 1.0],
    ]
)


@pytest.mark.parametrize(
    "name", ["amax", "amin", "argmax", "argmin", "max", "min", "sum", "prod", "any", "all", "softmax", "logsumexp"]
)
def test_nan_infinities_and_ties(name: str) -> None:
    same(lambda x: KINDS[name](x, 1), SPECIAL, exact=name not in ("softmax", "logsumexp"))
    same(lambda x: KINDS[name](x, 0), SPECIAL, exact=name not in ("softmax", "logsumexp"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16])
def test_the_first_of_equal_ones_wins(dtype: torch.dtype) -> None:
    x = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).to(dtype)
    if dtype == torch.bool:
        same(lambda x: (x.max(1), x.min(1)), x)
    else:
        same(lambda x: (x.argmax(1), x.argmin(1), x.max(1), x.min(0), x.argmax()), x)


def test_integers_beyond_what_floats_hold() -> None:
    x = torch.tensor([[2**60 + 1, 2**60, -(2**62)], [2**53 + 1, 2**53, 1]])
    same(lambda x: (x.amax(1), x.amin(1), x.sum(1), x.argmax(1), x.max(0), x * 3 // 2, x.clamp(max=2**60)), x)


def test_geometry_of_operands() -> None:
    same(lambda x: x.t().sum(1), odd(5, 7))
    same(lambda x: x[:, ::2].amax(1), odd(5, 7))
    same(lambda x: x.expand(4, 6, 5).sum(2), odd(6, 1))
    same(lambda x: x.permute(2, 0, 1).mean((0, 2)), odd(3, 4, 5))
    same(lambda x: x.permute(2, 0, 1).argmax(1), odd(3, 4, 5))


@pytest.mark.parametrize("name", ["sum", "prod", "any", "all", "mean"])
def test_over_nothing(name: str) -> None:
    same(lambda x: KINDS[name](x, 1), odd(3, 0))
    same(lambda x: KINDS[name](x, 1), odd(0, 3))


def test_variance_with_corrections() -> None:
    same(
        lambda x: (x.var(1, correction=0), x.std(0, correction=2), x.var(1, unbiased=False), x.std(unbiased=True)),
        odd(4, 6),
    )
    same(lambda x: (x.var(1), x.std(1), x.var(1, correction=3)), odd(4, 1))
    same(lambda x: torch.var_mean(x, 1, correction=7), odd(4, 5))
    same(lambda x: (x.var(1), torch.var_mean(x, 1)), odd(4, 0))
    # Cancellation: the spread is a thousandth of the mean.
    same(lambda x: x.var(1), odd(4, 64) * 1e-2 + 10)


def test_what_follows_a_reduction() -> None:
    same(lambda x: x / x.norm(dim=-1, keepdim=True), odd(5, 9))
    same(lambda x: (x - x.mean(1, keepdim=True)).pow(2).mean(1).rsqrt(), odd(5, 9))
    same(lambda x: x.sum(0) + x.sum(1), odd(7, 7))
    same(lambda x: x.softmax(1).sum(0).argmax(), odd(5, 9))
    same(lambda x: torch.nn.functional.layer_norm(x, (3, 5)), odd(2, 3, 5))
    same(lambda x, w, b: torch.nn.functional.group_norm(x, 2, w, b), odd(2, 4, 3), odd(4), odd(4, seed=1))
    same(
        lambda x, w: torch.nn.functional.rms_norm(x, (9,), w),
        odd(5, 9, dtype=torch.bfloat16),
        odd(9, dtype=torch.bfloat16),
    )
    same(
        lambda x, i: torch.nn.functional.cross_entropy(x, i, reduction="none"), odd(5, 9), torch.tensor([0, 3, 8, 1, 2])
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
@pytest.mark.parametrize("shape", [(1,), (3, 5)])
def test_what_is_computed_from_a_largest_small_number_wraps(dtype, shape):
    def fn(x):
        most, least = x.amax(-1), x.amin(-1)
        return ((most + most) + (most + most)) // 3, (least + least) // 3, (most - least - least) > 0

    same(fn, torch.full(shape, torch.iinfo(dtype).max - 27, dtype=dtype))


@pytest.mark.parametrize("name", ["sum", "amax", "argmax", "argmin", "any", "all", "mean", "max"])
def test_rows_wider_than_a_program_holds(name: str) -> None:
    same(lambda x: KINDS[name](x, 1), 1 + odd(2, 140_000) / 1000)


def test_wide_rows_with_ties_and_nan() -> None:
    x = torch.zeros(3, 140_000)
    x[0, [70_000, 139_999]] = 1.0
    x[1, [80_000, 100_000]] = math.nan
    same(lambda x: (x.argmax(1), x.argmin(1), x.max(1), x.amin(1)), x)
    same(lambda x: (x + 2).to(torch.int32).prod(1), x[:1].remainder(2))


def test_all_of_a_large_tensor() -> None:
    same(lambda x: (x.sum(), x.amax(), x.var()), odd(300, 700))


@pytest.mark.parametrize("width", [1, 5, 70_000])
def test_numbers_that_no_memory_holds(width: int) -> None:
    """Whole numbers that are constants are reduced as wide as their tensor's dtype is."""

    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        none = x.new_zeros(2, width, dtype=torch.int64)
        both = torch.cat([none - 1, none + 2_000_000_000], 1)
        small = both.to(torch.int32) * 0 + 3
        return both.amax(1), both.amin(1), both.sum(1), both.argmax(1), both.prod(), small.amin(1), small.any(1), x + 1

    same(fn, odd(3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_sums_of_small_numbers_wrap_before_what_follows(dtype: torch.dtype) -> None:
    large, count = torch.full((2, 5), torch.iinfo(dtype).max - 3, dtype=dtype), torch.ones(2, 300, dtype=dtype)
    same(lambda x: x.sum(1, dtype=x.dtype).float(), large)
    same(lambda x: x.cumsum(1, dtype=x.dtype) // 2, count)
    same(lambda x: (x @ x.t()) // 2, torch.full((2, 5), 7, dtype=dtype))
    same(lambda x: x.prod(1, dtype=x.dtype).float(), large)


def test_what_is_added_to_small_numbers_wraps_before_what_follows() -> None:
    values, places = torch.full((4,), 100, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    same(lambda x, i: torch.zeros(4, dtype=torch.uint8, device=x.device).scatter_add(0, i, x) >> 1, values, places)
    same(lambda x, i: torch.zeros_like(x).index_put((i,), x, accumulate=True) // 3, values, places)
