"""Running sums and products against eager."""

from __future__ import annotations

import pytest
import torch

from .equal import DEVICE, odd, same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool])
def test_running_sums_and_products(dtype: torch.dtype) -> None:
    x = odd(3, 7, 5, dtype=dtype)
    for dim in (0, 1, -1):
        same(lambda x, dim=dim: (x.cumsum(dim), x.cumprod(dim)), x)
        same(lambda x, dim=dim: x.cumsum(dim), x.transpose(0, 2)[:, ::2])


def test_running_sums_of_little() -> None:
    same(lambda x: x.cumsum(0), odd())
    same(lambda x: x.cumsum(0), odd(0))
    same(lambda x: x.cumsum(1), odd(3, 1))
    same(lambda x: x.cumsum(0), odd(1, 3))
    same(lambda x: x.cumprod(1), odd(0, 3))
    same(lambda x: x.cumsum(1), odd(2, 1031))
    same(lambda x: x.cumsum(1, dtype=torch.int64), odd(2, 31))
    same(lambda x: x.cumsum(1, dtype=torch.float64), odd(2, 31))


def test_running_sums_among_others() -> None:
    same(lambda x: (x * 2).cumsum(1) / x.sum(1, keepdim=True), odd(5, 9))
    same(lambda x: (x.cumsum(1) + x).cumsum(1), odd(5, 9))
    same(lambda x: x.cumsum(1).cumsum(0).sum(1), odd(5, 9))
    same(lambda x: x.cumsum(1)[:, 3:] + x.cumsum(1)[:, -1:], odd(5, 9))
    same(lambda x: x.cumsum(-1).flip(0).t() * 2, odd(5, 9))
    same(lambda x, y: (x @ y).cumsum(0), odd(5, 9), odd(9, 6))


def test_what_lies_between_zeros_is_equal_and_cancels() -> None:
    # Decays in log space, padded with zeros: what a model subtracts from one another again.
    x = torch.nn.functional.pad(-torch.rand(5, 7) * 2, (0, 57))

    def decays(x: torch.Tensor) -> torch.Tensor:
        total = x.cumsum(1)
        return (total[:, -1:] - total).exp()

    piece = same(decays, x)
    assert bool((piece(x.to(DEVICE))[:, 6:] == 1).all())


def test_a_row_too_long_for_registers_is_left_to_the_op() -> None:
    same(lambda x: x.cumsum(0), odd(40000), itself=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_elements_put_where_a_mask_holds(dtype: torch.dtype) -> None:
    mask = odd(4, 5, dtype=torch.bool)
    same(lambda x, m, s: x.masked_scatter(m, s), odd(4, 5, dtype=dtype), mask, odd(9, 3, dtype=dtype).t())
    same(lambda x, m, s: x.masked_scatter(m, s), odd(4, 5, dtype=dtype), mask[:, :1], odd(20, dtype=dtype))
    same(lambda x, m, s: (x + 1).masked_scatter(m, s) * 2, odd(4, 5, dtype=dtype).t(), mask.t(), odd(20, dtype=dtype))
    same(lambda x, m, s: x.masked_scatter(m, s), odd(5, dtype=dtype), mask, odd(20, dtype=dtype))
    same(lambda x, m, s: x.masked_scatter(m, s), odd(0, dtype=dtype), mask[0, :0], odd(0, dtype=dtype))
