"""Pooling against eager: windows over edges, of any dilation, with indices; and what goes back through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from .equal import DEVICE, odd, same

DTYPES = [torch.float32, torch.bfloat16]
AVERAGES: list[tuple[Any, ...]] = [
    ((2, 3), (1, 2), 1, False, True, None),
    (3, 2, 1, True, False, None),
    (3, 2, 1, True, True, None),
    (2, 3, 0, True, True, 5),
    ((1, 2), (), (0, 1), False, False, None),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", AVERAGES)
def test_averages(dtype: torch.dtype, given: tuple[Any, ...]) -> None:
    pool, back = torch.ops.aten.avg_pool2d, torch.ops.aten.avg_pool2d_backward
    x = odd(2, 3, 7, 8, dtype=dtype)
    same(lambda x: pool(x * 2, *given) + 1, x)
    same(lambda x: pool(x, *given), x[0].transpose(1, 2))
    grad = odd(*pool(x, *given).shape, dtype=dtype)
    same(lambda g, x: back(g, x, *given), grad, x)


def test_averages_of_one_and_three_dimensions() -> None:
    same(lambda x: F.avg_pool1d(x, 3, 2, 1), odd(2, 3, 9))
    same(lambda x: F.avg_pool3d(x, (2, 1, 3), 2, (1, 0, 1), count_include_pad=False), odd(1, 2, 4, 5, 6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 8), (9, 11), (2, None)])
def test_averages_to_a_size(dtype: torch.dtype, size: tuple[Any, ...]) -> None:
    x = odd(2, 3, 7, 8, dtype=dtype)
    same(lambda x: F.adaptive_avg_pool2d(x, size), x)
    back = torch.ops.aten._adaptive_avg_pool2d_backward
    if size != (1, 1):
        same(lambda g, x: back(g, x), odd(*F.adaptive_avg_pool2d(x, size).shape, dtype=dtype), x)


def test_averages_to_a_size_in_one_and_three_dimensions() -> None:
    same(lambda x: F.adaptive_avg_pool1d(x, 4), odd(2, 3, 9))
    same(lambda x: F.adaptive_avg_pool3d(x, (2, 3, 4)), odd(1, 2, 5, 4, 6))


def indexed(x: torch.Tensor, *given: Any) -> Any:
    return torch.ops.aten.max_pool2d_with_indices(x, *given)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64])
@pytest.mark.parametrize(
    "given", [(2,), (3, 2, 1), ((2, 3), (1, 2), (1, 0), (2, 1)), (3, 2, 1, 1, True), ((1, 2), 3, 0, 2, True)]
)
def test_largest(dtype: torch.dtype, given: tuple[Any, ...]) -> None:
    if DEVICE.type == "cuda" and not dtype.is_floating_point:
        pytest.skip("eager's pool takes no integers on a GPU")
    x = odd(2, 3, 7, 8, dtype=dtype)
    same(lambda x: indexed(x, *given), x)
    same(lambda x: indexed(x + x, *given)[0] + 1, x.transpose(2, 3))
    if dtype.is_floating_point:
        x = torch.where(x > 1, torch.nan, torch.where(x < 0, -torch.inf, x)).to(dtype)
        same(lambda x: indexed(x, *given), x)


def test_largest_in_other_dimensions() -> None:
    same(lambda x: F.max_pool1d(x, 3, 2, 1), odd(2, 3, 9))
    same(lambda x: F.max_pool3d(x, (2, 1, 3), 2, (1, 0, 1), return_indices=True), odd(1, 2, 4, 5, 6))
    same(lambda x: F.adaptive_max_pool2d(x, (3, 5), return_indices=True), odd(2, 3, 7, 8))
    same(lambda x: F.adaptive_max_pool3d(x, 2), odd(1, 2, 4, 5, 6))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(3, 5), (9, 16)])
def test_resampling(mode: str, size: tuple[int, int]) -> None:
    same(lambda x: F.interpolate(x, size, mode=mode), odd(2, 3, 7, 8))


def test_sampling_at_places() -> None:
    x, grid = odd(2, 3, 7, 8), odd(2, 4, 5, 2)
    same(lambda x, g: F.grid_sample(x, g, padding_mode="reflection", align_corners=False), x, grid)


def test_batch_norm() -> None:
    args = odd(4, 3, 5), odd(3), odd(3).abs() + 1, odd(3, seed=1), odd(3, seed=2)
    same(lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b), *args)
    same(lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b, training=True), *args)
    same(lambda x: F.instance_norm(x), odd(4, 3, 5))
