"""Ops that write at places known at run time, against eager: the last write counts, sums have a fixed order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .equal import DEVICE, odd, same

DTYPES = [torch.float32, torch.bfloat16, torch.int64]


def places(*shape: int, below: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def apart(*shape: int, below: int, axis: int = 0) -> torch.Tensor:
    """Places without repeats along an axis: of several writes to one place eager on a GPU keeps any."""
    whole = [below if i == axis % len(shape) else n for i, n in enumerate(shape)]
    drawn = torch.rand(whole, generator=torch.Generator().manual_seed(0)).argsort(axis)
    return drawn.narrow(axis, 0, shape[axis])


def put(x: Any, indices: list[Any], values: Any, accumulate: bool = False) -> Any:
    """`torch.index_put`, which refuses symbolic tracing."""
    return torch.ops.aten.index_put(x, indices, values, accumulate)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_scatter(dtype: torch.dtype, dim: int) -> None:
    x, src = odd(4, 5, 6, dtype=dtype), odd(3, 5, 6, dtype=dtype, seed=1)
    index = apart(3, 4, 5, below=x.shape[dim], axis=dim)
    same(lambda x, i, s: x.scatter(dim, i, s), x, index, src)
    same(lambda x, i: x.scatter(dim, i, 1), x, index)
    same(lambda x, i, s: (x + x).scatter(dim, i, s.flip(2)) + x, x, index, src)


def test_scatter_of_little() -> None:
    same(lambda x, i, s: x.scatter(0, i, s), odd(4), places(0, below=4), odd(3))
    same(lambda x, i, s: x.scatter(1, i, s), odd(4, 1), places(4, 1, below=1), odd(4, 1))
    same(lambda x, i, s: x.scatter(0, i, s), odd(0, 3), places(0, 3, below=1), odd(0, 3))
    same(lambda x, i, s: x.scatter(0, i, s), odd(), torch.tensor(0), odd(), itself=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "prod", "mean", "amax", "amin"])
def test_scatter_reduce(dtype: torch.dtype, include: bool, reduce: str) -> None:
    x, src, index = odd(4, 5, dtype=dtype), odd(7, 5, dtype=dtype, seed=1), places(6, 5, below=3)
    same(lambda x, i, s: x.scatter_reduce(0, i, s, reduce, include_self=include), x, index, src)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
def test_scatter_add(dtype: torch.dtype) -> None:
    same(lambda x, i, s: x.scatter_add(1, i, s), odd(4, 5, dtype=dtype), places(3, 9, below=5), odd(3, 9, dtype=dtype))
    same(lambda x, i, s: x.index_add(1, i, s), odd(4, 5, dtype=dtype), places(9, below=5), odd(4, 9, dtype=dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
def test_index_put(dtype: torch.dtype) -> None:
    x, i, j = odd(4, 5, 6, dtype=dtype), apart(3, below=4), apart(2, 1, below=5) - 5
    same(lambda x, i, v: put(x, [i], v), x, i, odd(3, 5, 6, dtype=dtype))
    same(lambda x, i, v: put(x, [i], v), x, i, odd(dtype=dtype))
    same(lambda x, i, j, v: put(x, [i, j], v), x, i, j, odd(2, 3, 6, dtype=dtype))
    same(lambda x, j, v: put(x, [None, j], v), x, j, odd(4, 2, 1, 6, dtype=dtype))
    same(lambda x, i, j, v: put(x, [i, None, j], v), x, i, j, odd(2, 3, 5, dtype=dtype))
    same(lambda x, i, j, v: put(x, [i, j, i], v), x, i, j, odd(3, dtype=dtype))
    same(lambda x, i, v: put(x, [i], v), x, places(0, below=4), odd(0, 5, 6, dtype=dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
def test_index_put_accumulates(dtype: torch.dtype) -> None:
    x, i, j = odd(4, 5, 6, dtype=dtype), places(9, below=4), places(9, below=5) - 5
    same(lambda x, i, v: put(x, [i], v, accumulate=True), x, i, odd(9, 5, 6, dtype=dtype))
    same(lambda x, i, j, v: put(x, [i, None, j], v, accumulate=True), x, i, j, odd(9, 5, dtype=dtype))


def test_index_put_by_a_mask() -> None:
    mask = odd(4, 5, dtype=torch.bool)
    same(lambda x, m, v: put(x, [m], v), odd(4, 5), mask, odd())
    same(lambda x, m, v: put(x, [m], v), odd(4, 5, 3), mask, odd(1))
    same(lambda x, m, v: put(x, [m], v), odd(4, 5), mask, odd(int(mask.sum())), itself=True)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="eager keeps any of several writes on a GPU")
def test_the_last_of_many_writes_counts() -> None:
    index, src = places(3, 4, 5, below=4), odd(3, 5, 6, seed=1)
    for dim in (0, 1, -1):
        same(lambda x, i, s, dim=dim: x.scatter(dim, i, s), odd(4, 5, 6), index, src)
    same(lambda x, i, s: put(x, [i], s), odd(3), torch.zeros(40, dtype=torch.int64), odd(40))
    same(lambda x, i, s: x.scatter(0, i, s), odd(3), torch.ones(40, dtype=torch.int64), odd(40), exact=True)


def test_a_search_that_takes_too_long_is_left_to_the_op() -> None:
    n = 3000
    same(lambda x, i, s: x.scatter(0, i, s), odd(n), torch.arange(n), odd(n), itself=True)


def test_places_that_nobody_writes_read_no_memory() -> None:
    index, values = places(6, below=40), odd(6, 3)
    pieces = [
        same(lambda x, i, v: put(x, [i], v), torch.zeros(40, 3), index, values),
        same(lambda x, i, v: x.scatter(0, i, v), torch.zeros(40, 3), index[:, None].expand(6, 3), values),
    ]
    for piece in pieces:
        (loaded,) = piece.plans.values()
        # The number of the writer is -1 where there is none.
        assert "tl.maximum(" in loaded.plan.source


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_buckets(dtype: torch.dtype, right: bool) -> None:
    bounds = odd(3, 7, dtype=dtype).sort(1).values
    values = torch.cat([odd(3, 9, dtype=dtype, seed=1), bounds], 1)
    if dtype == torch.float32:
        values[:, 0] = torch.nan
    same(lambda b, v: torch.bucketize(v, b[0], right=right), bounds, values)
    same(lambda b, v: torch.searchsorted(b, v, right=right, out_int32=True), bounds, values)
    same(lambda b, v: torch.searchsorted(b[0], v, side="right"), bounds, values)
    same(lambda b: (torch.bucketize(2, b[0]), torch.searchsorted(b[0], 2)), bounds)
    same(lambda b, v: torch.bucketize(v, b[0, :0]), bounds, values)


@pytest.mark.parametrize("offset", [0, 2, -1, -3])
def test_diagonals(offset: int) -> None:
    x = odd(4, 3, 5)
    diagonal = x.diagonal(offset, 0, 2)
    same(lambda x, s: torch.diagonal_scatter(x, s, offset, 0, 2), x, odd(*diagonal.shape))
    same(lambda x, s: torch.diagonal_scatter(x, s, offset, -1, 0), x, odd(*x.diagonal(offset, -1, 0).shape))
