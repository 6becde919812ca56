"""norm: RMSNorm with and without residual, and LayerNorm."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from terrazzo.kernels import norm
from terrazzo.kernels.segments import Problem
from terrazzo.kernels.target import Target

from .oracle import check

EPS = 1e-5


@triton.jit
def rms_norm(SEGMENT: tl.constexpr, row, col, mask, t):
    x_ptr, weight_ptr, out_ptr, x_row, cols = t
    x = tl.load(x_ptr + row * x_row + col, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / cols + 1e-5)
    tl.store(out_ptr + row * cols + col, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_rms_norm(SEGMENT: tl.constexpr, row, col, mask, t):
    x_ptr, residual_ptr, weight_ptr, sum_ptr, out_ptr, cols = t
    at = row * cols + col
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    # The sum is rounded where the model rounds it: what is normalised is what is stored.
    x = (x + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)).to(dtype)
    tl.store(sum_ptr + at, x, mask=mask)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / cols + 1e-5)
    tl.store(out_ptr + at, (x * scale * weight).to(dtype), mask=mask)


@triton.jit
def layer_norm(SEGMENT: tl.constexpr, row, col, mask, t):
    x_ptr, weight_ptr, bias_ptr, out_ptr, cols = t
    at = row * cols + col
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - tl.sum(x, axis=1, keep_dims=True) / cols, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / cols + 1e-5)
    tl.store(out_ptr + at, (centred * scale * weight + bias).to(out_ptr.dtype.element_ty), mask=mask)


def tiles(rows, cols, dtype, device):
    """The chosen tile, and one that does not divide the rows."""
    yield norm.choose(Problem((rows,), cols, dtype), Target.current(device))[0]
    yield norm.Config(4, triton.next_power_of_2(cols), 4)


SIZES = [(1, 64), (5, 127), (3, 513), (0, 16), (7, 1)]
REAL_SIZES = [(1, 4096), (64, 8192), (129, 14336), (3001, 4096), (8192, 2048), (300, 16384)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_rms_norm(device, dtype, rows, cols):
    x = (torch.randn(rows, 2 * cols, device=device) * 3).to(dtype)[:, :cols]
    weight = torch.randn(cols, device=device).to(dtype)
    eager, oracle = norm.reference(x, weight, EPS), _rms64(x.double(), weight)
    for config in tiles(rows, cols, dtype, device):
        out = torch.full((rows, cols), torch.nan, dtype=dtype, device=device)
        norm.prepare(rms_norm, config)((x, weight, out, 2 * cols, cols), (rows,), cols)
        check(out, eager, oracle, what=str(config))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), SIZES)
@pytest.mark.parametrize("in_place", [False, True])
def test_add_rms_norm(device, dtype, rows, cols, in_place):
    x, residual = torch.randn(2, rows, cols, device=device).to(dtype)
    weight = torch.randn(cols, device=device).to(dtype)
    eager = norm.reference(x, weight, EPS, residual)
    summed = (x + residual).double()
    for config in tiles(rows, cols, dtype, device):
        given = residual.clone()
        total = given if in_place else torch.full_like(x, torch.nan)
        out = torch.full_like(x, torch.nan)
        norm.prepare(add_rms_norm, config)((x, given, weight, total, out, cols), (rows,), cols)
        assert torch.equal(total, x + residual)
        check(out, eager, _rms64(summed, weight), what=str(config))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_layer_norm(device, dtype, rows, cols):
    x = (torch.randn(rows, cols, device=device) + 5).to(dtype)
    weight, bias = torch.randn(2, cols, device=device).to(dtype)
    layer = torch.nn.functional.layer_norm
    eager = layer(x, (cols,), weight, bias, EPS)
    oracle = layer(x.double(), (cols,), weight.double(), bias.double(), EPS)
    for config in tiles(rows, cols, dtype, device):
        out = torch.full_like(x, torch.nan)
        norm.prepare(layer_norm, config)((x, weight, bias, out, cols), (rows,), cols)
        check(out, eager, oracle, what=str(config))


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize(("rows", "cols"), REAL_SIZES)
def test_real_sizes(device, rows, cols, pdl):
    x, residual = torch.randn(2, rows, cols, device=device).bfloat16()
    weight = torch.randn(cols, device=device).bfloat16()
    config, _ = norm.choose(Problem((rows,), cols, x.dtype), Target.current(device))
    total, out = torch.full((2, rows, cols), torch.nan, dtype=x.dtype, device=device)
    launch = norm.prepare(add_rms_norm, config, pdl=pdl)
    launch((x, residual, weight, total, out, cols), (rows,), cols)
    assert torch.equal(total, x + residual)
    check(out, norm.reference(x, weight, EPS, residual), _rms64((x + residual).double(), weight))
    again = torch.full_like(out, torch.nan)
    launch((x, residual, weight, total, again, cols), (rows,), cols)
    assert torch.equal(out, again)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1024), (128, 16384), (8192, 4096), (70000, 128)])
def test_choice(rows, cols):
    problem = Problem((rows,), cols, torch.bfloat16)
    assert norm.supports(problem) is None
    config, why = norm.choose(problem, Target.named("h200"))
    assert why
    assert config.block_c >= cols
    assert config.warps <= 32


def test_too_wide_is_refused():
    assert "columns" in norm.supports(Problem((1,), 131073, torch.bfloat16))


def _rms64(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()
