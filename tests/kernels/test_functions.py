"""Functions that do large tiles otherwise than small ones."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from terrazzo.kernels import functions


@triton.jit
def silu_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out_ptr + at, functions.silu(tl.load(x_ptr + at)))


@pytest.mark.parametrize("rows", [4, 64])
def test_silu(device, rows):
    x = torch.linspace(-43, 90, rows * 64)[torch.randperm(rows * 64)].to(device)
    special = torch.tensor([torch.nan, torch.inf, 0.0, -0.0, 3e38, -60.0, -1e30], device=device)
    # Each beside a number: two share a reciprocal.
    x[: 2 * len(special) : 2] = special
    out = torch.empty_like(x)
    silu_kernel[(1,)](x, out, rows, 64)
    exact = torch.nn.functional.silu(x.double())
    torch.testing.assert_close(out.double(), exact, equal_nan=True, rtol=3e-6, atol=1e-17)
    assert torch.equal(out[4:8:2].signbit().cpu(), torch.tensor([False, True]))
