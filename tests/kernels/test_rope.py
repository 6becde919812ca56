"""rope: neox and gptj, partial rotary, q and k in one launch, with the q/k norm fused before."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from terrazzo.kernels import rope
from terrazzo.kernels.segments import Problem
from terrazzo.kernels.target import Target

from .oracle import check


@triton.jit
def partner(col, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Column of the element that `col` is rotated with, the column of its angle, and the sign."""
    if INTERLEAVED:
        return col ^ 1, col // 2, tl.where(col % 2 == 0, -1.0, 1.0)
    else:
        return tl.where(col < HALF, col + HALF, col - HALF), col % HALF, tl.where(col < HALF, -1.0, 1.0)


@triton.jit
def rotate(row, col, mask, x_ptr, out_ptr, x_token, heads, t, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    token, head = row // heads, row % heads
    head_dim = t[6]
    x_row = token * x_token + head * head_dim
    rotary = col < 2 * HALF
    other, angle, sign = partner(col, HALF, INTERLEAVED)
    x = tl.load(x_ptr + x_row + col, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + x_row + other, mask=mask & rotary, other=0.0).to(tl.float32)
    cos = tl.load(t[2] + token * HALF + angle, mask=mask & rotary, other=1.0).to(tl.float32)
    sin = tl.load(t[3] + token * HALF + angle, mask=mask & rotary, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * head_dim + col, (x * cos + sign * y * sin).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def neox(SEGMENT: tl.constexpr, row, col, mask, t):
    # t: q, k, cos, sin, q out, k out, head_dim, qkv's row stride, q heads, k heads
    rotate(row, col, mask, t[SEGMENT], t[4 + SEGMENT], t[7], t[8 + SEGMENT], t, 8, False)


@triton.jit
def gptj(SEGMENT: tl.constexpr, row, col, mask, t):
    rotate(row, col, mask, t[SEGMENT], t[4 + SEGMENT], t[7], t[8 + SEGMENT], t, 8, True)


@triton.jit
def norm_neox(SEGMENT: tl.constexpr, row, col, mask, t):
    """RMSNorm over head_dim 16 (rounded, as the model rounds it), then neox over all of it. t[10:12]: the weights."""
    token, head = row // t[8 + SEGMENT], row % t[8 + SEGMENT]
    dtype: tl.constexpr = t[4].dtype.element_ty
    x_ptr = t[SEGMENT] + token * t[7] + head * 16
    x = tl.load(x_ptr + col, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / 16 + 1e-6)
    other = (col + 8) % 16
    y = tl.load(x_ptr + other, mask=mask, other=0.0).to(tl.float32)
    x = (x * scale * tl.load(t[10 + SEGMENT] + col).to(tl.float32)).to(dtype).to(tl.float32)
    y = (y * scale * tl.load(t[10 + SEGMENT] + other).to(tl.float32)).to(dtype).to(tl.float32)
    cos = tl.load(t[2] + token * 8 + col % 8).to(tl.float32)
    sin = tl.load(t[3] + token * 8 + col % 8).to(tl.float32)
    out = x * cos + tl.where(col < 8, -y, y) * sin
    tl.store(t[4 + SEGMENT] + row * 16 + col, out.to(dtype), mask=mask)


def inputs(tokens, q_heads, k_heads, head_dim, dtype, device):
    """q and k as slices of one qkv tensor, cos and sin of 16 rotary dimensions, poisoned outputs."""
    qkv = torch.randn(tokens, (q_heads + 2 * k_heads) * head_dim, device=device).to(dtype)
    q = qkv[:, : q_heads * head_dim].view(tokens, q_heads, head_dim)
    k = qkv[:, q_heads * head_dim : (q_heads + k_heads) * head_dim].view(tokens, k_heads, head_dim)
    angle = torch.rand(tokens, 8, device=device) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    outs = [torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) for x in (q, k)]
    t = (q, k, cos, sin, *outs, head_dim, qkv.stride(0), q_heads, k_heads)
    return t, (tokens * q_heads, tokens * k_heads)


def oracle64(x, cos, sin, interleaved):
    """RoPE as a multiplication of complex numbers."""
    half = cos.shape[-1]
    head = x[..., : 2 * half].double()
    pairs = head.unflatten(-1, (half, 2)) if interleaved else head.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = torch.complex(pairs[..., 0], pairs[..., 1]) * torch.complex(cos.double(), sin.double())[:, None]
    y = torch.view_as_real(turned)
    y = y.flatten(-2) if interleaved else y.transpose(-1, -2).flatten(-2)
    return torch.cat((y, x[..., 2 * half :].double()), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 24, 33])
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(device, dtype, head_dim, tokens, interleaved):
    t, rows = inputs(tokens, 3, 1, head_dim, dtype, device)
    q, k, cos, sin, q_out, k_out = t[:6]
    config, _ = rope.choose(Problem(rows, head_dim, dtype), Target.current(device))
    rope.prepare(gptj if interleaved else neox, config)(t, rows, head_dim)
    for what, x, out in (("q", q, q_out), ("k", k, k_out)):
        eager = rope.reference(x, cos, sin, interleaved=interleaved)
        check(out, eager, oracle64(x, cos, sin, interleaved), what=what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_r", [1, 4, 16])
def test_norm_then_rope(device, dtype, block_r):
    t, rows = inputs(5, 3, 1, 16, dtype, device)
    weights = torch.rand(2, 16, device=device).to(dtype) + 1
    rope.prepare(norm_neox, rope.Config(block_r, 16, 1))((*t, *weights), rows, 16)
    q, k, cos, sin, q_out, k_out = t[:6]
    for x, out, weight in ((q, q_out, weights[0]), (k, k_out, weights[1])):

        def rms(x, weight=weight):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.to(x.dtype)

        eager = rope.reference(rms(x.float()).to(dtype), cos, sin)
        check(out, eager, oracle64(rms(x.double()), cos, sin, False))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 2049])
def test_real_sizes(device, tokens):
    q, k = (torch.randn(tokens, heads, 128, device=device).bfloat16() for heads in (32, 8))
    angle = torch.rand(tokens, 64, device=device) * 6
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    q_out, k_out = torch.full_like(q, torch.nan), torch.full_like(k, torch.nan)
    rows = (tokens * 32, tokens * 8)
    config, _ = rope.choose(Problem(rows, 128, q.dtype), Target.current(device))
    rope.prepare(rope.sample, config, pdl=True)((q, k, cos, sin, q_out, k_out), rows, 128)
    for x, out in ((q, q_out), (k, k_out)):
        check(out, rope.reference(x, cos, sin), oracle64(x, cos, sin, False))


@pytest.mark.parametrize(("rows", "cols"), [((40, 8), 128), ((40 << 13, 8 << 13), 128), ((1,), 512), ((6, 6), 80)])
def test_choice(rows, cols):
    problem = Problem(rows, cols, torch.bfloat16)
    assert rope.supports(problem) is None
    config, why = rope.choose(problem, Target.named("h200"))
    assert why
    assert config.block_c == triton.next_power_of_2(cols)


def test_long_heads_are_refused():
    assert "head_dim" in rope.supports(Problem((1,), 513, torch.bfloat16))
