"""Functions that bodies call, where their formulas end."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from terrazzo.kernels import functions, pointwise

from .oracle import check

SPECIAL = [0.0, -0.0, 1e30, -1e30, 3e38, float("inf"), float("-inf"), float("nan")]


@triton.jit
def silu_body(SEGMENT: tl.constexpr, row, col, mask, t):
    tl.store(t[1] + col, functions.silu(tl.load(t[0] + col, mask=mask)), mask=mask)


@triton.jit
def sigmoid_body(SEGMENT: tl.constexpr, row, col, mask, t):
    tl.store(t[1] + col, functions.sigmoid(tl.load(t[0] + col, mask=mask)), mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("body", "fn"), [(silu_body, torch.nn.functional.silu), (sigmoid_body, torch.sigmoid)])
def test_sigmoids_up_to_where_exp_ends(device, body, fn, dtype):
    """exp(-x) leaves fp32 at x = -88.7: down to there a result is a normal number, of which none may become 0."""
    x = torch.cat([torch.linspace(-120, 120, 4088), torch.tensor(SPECIAL)]).to(device, dtype)
    y = torch.full_like(x, torch.nan)
    pointwise.prepare(body, pointwise.Config(1, 1024, 4))((x, y), (1,), len(x))
    exact = fn(x.double())
    check(y, fn(x), exact)
    # The rule's floor scales with the largest result. exp2's argument is rounded: half an ulp of 128 at the end.
    held = (x > -88.7) & (x < 20) & (x != 0)
    assert ((y.double() - exact).abs() <= 6e-6 * exact.abs())[held].all()
