"""rows: whole-row bodies (softmax, argmax) and looped ones (softmax, mean and variance, argmax)."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from terrazzo.kernels import rows
from terrazzo.kernels.rows import Looped
from terrazzo.kernels.segments import Problem
from terrazzo.kernels.target import Target

from .oracle import check


@triton.jit
def softmax(SEGMENT: tl.constexpr, row, col, mask, t):
    x_ptr, out_ptr, x_row, cols = t
    x = tl.load(x_ptr + row * x_row + col, mask=mask, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
    y = e / tl.sum(e, axis=1, keep_dims=True)
    tl.store(out_ptr + row * cols + col, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_and_any(SEGMENT: tl.constexpr, row, col, mask, t):
    x_ptr, sum_ptr, any_ptr, cols = t
    x = tl.load(x_ptr + row * cols + col, mask=mask, other=0)
    total = tl.sum(x.to(tl.int64), axis=1, keep_dims=True)
    positive = tl.max((x > 0).to(tl.int32), axis=1, keep_dims=True)
    tl.store(sum_ptr + row + col * 0, total, mask=mask & (col == 0))
    tl.store(any_ptr + row + col * 0, positive > 0, mask=mask & (col == 0))


@triton.jit
def moments_init(PASS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.zeros((R, C), tl.float32)


@triton.jit
def moments_partial(PASS: tl.constexpr, SEGMENT: tl.constexpr, row, col, mask, t, acc, scalars):
    x = tl.load(t[0] + row * t[3] + col, mask=mask, other=0.0).to(tl.float32)
    if PASS == 0:
        return acc + x
    else:
        centred = tl.where(mask, x - scalars[0] / t[3], 0.0)
        return acc + centred * centred


@triton.jit
def moments_finish(PASS: tl.constexpr, acc):
    return tl.sum(acc, axis=1, keep_dims=True)


@triton.jit
def moments_store(SEGMENT: tl.constexpr, row, col, mask, t, scalars):
    first = mask & (col == 0)
    tl.store(t[1] + row + col * 0, scalars[0] / t[3], mask=first)
    tl.store(t[2] + row + col * 0, scalars[1] / t[3], mask=first)


@triton.jit
def argmax_init(PASS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return tl.full((R, C), float("-inf"), tl.float32), tl.full((R, C), 0, tl.int32)


@triton.jit
def argmax_partial(PASS: tl.constexpr, SEGMENT: tl.constexpr, row, col, mask, t, acc, scalars):
    best, at = acc
    x = tl.load(t[0] + row * t[2] + col, mask=mask, other=float("-inf")).to(tl.float32)
    better = x > best
    return tl.where(better, x, best), tl.where(better, col, at)


@triton.jit
def argmax_finish(PASS: tl.constexpr, acc):
    best, at = acc
    top = tl.max(best, axis=1, keep_dims=True)
    # The first of equals, as torch on the CPU.
    return tl.min(tl.where(best == top, at, 2147483647), axis=1, keep_dims=True)


@triton.jit
def argmax_store(SEGMENT: tl.constexpr, row, col, mask, t, scalars):
    tl.store(t[1] + row + col * 0, scalars[0].to(tl.int64), mask=mask & (col == 0))


@triton.jit
def softmax_partial(PASS: tl.constexpr, SEGMENT: tl.constexpr, row, col, mask, t, acc, scalars):
    top, total = acc
    x = tl.load(t[0] + row * t[2] + col, mask=mask, other=float("-inf")).to(tl.float32)
    higher = tl.maximum(top, x)
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(top - safe) + tl.exp(x - safe)


@triton.jit
def softmax_store(SEGMENT: tl.constexpr, row, col, mask, t, scalars):
    x = tl.load(t[0] + row * t[2] + col, mask=mask, other=float("-inf")).to(tl.float32)
    top, total = scalars[0]
    tl.store(t[1] + row * t[2] + col, (tl.exp(x - top) / total).to(t[1].dtype.element_ty), mask=mask)


MOMENTS = Looped(2, moments_init, moments_partial, moments_finish, moments_store)
ARGMAX = Looped(1, argmax_init, argmax_partial, argmax_finish, argmax_store)
SOFTMAX = Looped(1, rows.sample_init, softmax_partial, rows.sample_finish, softmax_store)


def wide_cols(device):
    """Columns and tile of the looped tests: real on the GPU, the same loop in small in the interpreter."""
    return (151937, rows.LOOPED) if device.type == "cuda" else (517, rows.Config(2, 128, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "cols"), [(1, 1), (5, 31), (7, 64), (3, 1025), (0, 16), (9, 257)])
def test_softmax(device, dtype, m, cols):
    x = torch.randn(m, cols + 5, device=device).to(dtype)[:, :cols]
    out = torch.full((m, cols), torch.nan, dtype=dtype, device=device)
    config, _ = rows.choose(Problem((m,), cols, dtype), Target.current(device))
    rows.prepare(softmax, config)((x, out, cols + 5, cols), (m,), cols)
    check(out, torch.softmax(x, -1), torch.softmax(x.double(), -1))
    check(rows.reference(x), torch.softmax(x, -1), torch.softmax(x.double(), -1))


@pytest.mark.gpu
@pytest.mark.parametrize("cols", [16384, 32768, 131072])
def test_widest_whole_rows(device, cols):
    x = torch.randn(3, cols, device=device).bfloat16()
    out = torch.full_like(x, torch.nan)
    config, _ = rows.choose(Problem((3,), cols, x.dtype), Target.current(device))
    assert config.block_c == cols
    rows.prepare(softmax, config)((x, out, cols, cols), (3,), cols)
    check(out, torch.softmax(x, -1), torch.softmax(x.double(), -1))


def test_integer_reductions(device):
    x = torch.randint(-(2**31), 2**31 - 1, (6, 100), device=device, dtype=torch.int32)
    x[2] = -1
    total = torch.full((6,), 7, device=device, dtype=torch.int64)
    positive = torch.zeros(6, device=device, dtype=torch.bool)
    rows.prepare(sum_and_any, rows.Config(4, 128, 1))((x, total, positive, 100), (6,), 100)
    assert torch.equal(total, x.long().sum(-1))
    assert torch.equal(positive, (x > 0).any(-1))


def test_looped_softmax(device):
    cols, config = wide_cols(device)
    # A row whose first tiles are all -inf, as masked logits are.
    x = torch.randn(5, cols, device=device).bfloat16()
    x[1, : cols - 3] = -torch.inf
    out = torch.full_like(x, torch.nan)
    rows.prepare(SOFTMAX, config)((x, out, cols), (5,), cols)
    check(out, torch.softmax(x, -1), torch.softmax(x.double(), -1))


def test_looped_mean_and_variance(device):
    cols, config = wide_cols(device)
    # Far from zero, so that a one-pass variance would lose everything.
    x = torch.randn(5, cols, device=device) + 1000
    mean, variance = torch.full((2, 5), torch.nan, device=device)
    rows.prepare(MOMENTS, config)((x, mean, variance, cols), (5,), cols)
    check(mean, x.mean(-1), x.double().mean(-1), what="mean")
    check(variance, x.var(-1, unbiased=False), x.double().var(-1, unbiased=False), what="variance")


def test_looped_argmax(device):
    cols, config = wide_cols(device)
    x = torch.randn(5, cols, device=device)
    x[3, [cols // 2, cols // 3]] = 99.0
    at = torch.full((5,), -1, device=device, dtype=torch.int64)
    rows.prepare(ARGMAX, config)((x, at, cols), (5,), cols)
    assert torch.equal(at.cpu(), x.cpu().argmax(-1))


@pytest.mark.parametrize(("m", "cols"), [((1,), 1), ((1,), 128256), ((8192,), 64), ((4096,), 4096), ((1,), 151936)])
def test_choice(m, cols):
    problem = Problem(m, cols, torch.bfloat16)
    assert rows.supports(problem) is None
    config, why = rows.choose(problem, Target.named("h200"))
    assert why
    assert config.block_c >= cols or cols > rows.MAX_WHOLE
    assert 1 <= config.warps <= 32
    assert rows.choose(problem, Target.named("h200"), looped=True)[0].block_c <= rows.LOOPED.block_c
