"""pointwise, and what all families over segments share: tiles, segments, masks, index width."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from terrazzo.kernels import pointwise
from terrazzo.kernels.segments import WIDE_FROM, Problem, pdl_pays
from terrazzo.kernels.target import Target

from .oracle import check


@triton.jit
def add(SEGMENT: tl.constexpr, row, col, mask, t):
    x_ptr, y_ptr, out_ptr, x_row, y_row, out_row = t
    x = tl.load(x_ptr + row * x_row + col, mask=mask).to(tl.float32)
    y = tl.load(y_ptr + row * y_row + col, mask=mask).to(tl.float32)
    tl.store(out_ptr + row * out_row + col, (x + y).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul(SEGMENT: tl.constexpr, row, col, mask, t):
    x_ptr, out_ptr, cols = t
    gate = tl.load(x_ptr + row * 2 * cols + col, mask=mask).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * cols + cols + col, mask=mask).to(tl.float32)
    act = (gate / (1 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * cols + col, (act * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_by_segment(SEGMENT: tl.constexpr, row, col, mask, t):
    x = tl.load(t[SEGMENT][0] + row * t[SEGMENT][2] + col, mask=mask)
    tl.store(t[SEGMENT][1] + row * t[SEGMENT][2] + col, x * (SEGMENT + 1), mask=mask)


@triton.jit
def masked_fill(SEGMENT: tl.constexpr, row, col, mask, t):
    x_ptr, where_ptr, out_ptr, cols = t
    x = tl.load(x_ptr + row * cols + col, mask=mask)
    where = tl.load(where_ptr + row * cols + col, mask=mask)
    tl.store(out_ptr + row * cols + col, tl.where(where, -1, x), mask=mask)


@triton.jit
def row_scale(SEGMENT: tl.constexpr, row, col, mask, t):
    # One value per row: no mask, whatever the tile's height.
    scale = tl.load(t[1] + row)
    tl.store(t[2] + row * t[3] + col, tl.load(t[0] + row * t[3] + col, mask=mask) * scale, mask=mask)


CHOICES = [((1,), 1), ((1,), 10**7), ((1 << 20,), 3), ((64,), 1025), ((0,), 7), ((8, 8), 130)]


def poisoned(shape, dtype, device):
    """An output in the middle of NaNs: what is not written stays visible, and so does what is written beside it."""
    guarded = torch.full((shape[0] + 2, *shape[1:]), torch.nan, dtype=dtype, device=device)
    return guarded, guarded[1:-1]


def choose(rows, cols, dtype=torch.float32, device="cpu"):
    return pointwise.choose(Problem(rows, cols, dtype), Target.current(torch.device(device)))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 17), (5, 64), (1, 4097), (1000, 3), (1031, 1), (0, 8), (8, 0)])
def test_add(device, dtype, rows, cols):
    # Every other row of a wider tensor, and a broadcast row.
    x = torch.randn(2 * rows, cols + 3, device=device).to(dtype)[::2, :cols]
    y = torch.randn(cols, device=device).to(dtype).expand(rows, cols)
    guarded, out = poisoned((rows, cols), dtype, device)
    config = choose((rows,), max(cols, 1), dtype, device)
    pointwise.prepare(add, config)((x, y, out, x.stride(0), 0, cols), (rows,), cols)
    check(out, x + y, x.double() + y.double())
    assert guarded[0].isnan().all()
    assert guarded[-1].isnan().all()


@pytest.mark.parametrize(("block_r", "block_c"), [(1, 16), (4, 8), (16, 1), (64, 64)])
def test_any_tile_gives_the_same(device, block_r, block_c):
    x, y = torch.randn(2, 19, 33, device=device)
    guarded, out = poisoned((19, 33), torch.float32, device)
    pointwise.prepare(add, pointwise.Config(block_r, block_c, 1))((x, y, out, 33, 33, 33), (19,), 33)
    assert torch.equal(out, x + y)
    assert guarded[0].isnan().all()
    assert guarded[-1].isnan().all()


@pytest.mark.parametrize("rows", [(1,), (5, 3), (5, 0, 1), (1, 2, 3, 4)])
def test_segments(device, rows):
    xs = [torch.randn(r, 31, device=device) for r in rows]
    outs = [torch.full_like(x, torch.nan) for x in xs]
    launch = pointwise.prepare(scale_by_segment, pointwise.Config(2, 16, 1))
    launch(tuple((x, out, 31) for x, out in zip(xs, outs, strict=True)), rows, 31)
    for segment, (x, out) in enumerate(zip(xs, outs, strict=True)):
        assert torch.equal(out, x * (segment + 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 7])
def test_silu_mul(device, dtype, m):
    x = torch.randn(m, 2 * 1376, device=device).to(dtype)
    out = torch.full((m, 1376), torch.nan, dtype=dtype, device=device)
    pointwise.prepare(silu_mul, choose((m,), 1376, dtype, device))((x, out, 1376), (m,), 1376)

    def formula(x):
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    check(out, formula(x), formula(x.double()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_and_bools(device, dtype):
    x = torch.randint(-9, 9, (4, 33), device=device, dtype=dtype)
    where = x > 0
    out = torch.full_like(x, 99)
    pointwise.prepare(masked_fill, choose((4,), 33, dtype, device))((x, where, out, 33), (4,), 33)
    assert torch.equal(out, x.masked_fill(where, -1))


def test_one_value_per_row_needs_no_mask(device):
    x = torch.randn(5, 3, device=device)
    # The scale's storage ends with the last row.
    scale = torch.randn(5, device=device)
    out = torch.full_like(x, torch.nan)
    pointwise.prepare(row_scale, pointwise.Config(16, 4, 1))((x, scale, out, 3), (5,), 3)
    assert torch.equal(out, x * scale[:, None])


def test_wide_indices_give_the_same(device):
    x, y = torch.randn(2, 5, 48, device=device)
    out = torch.full_like(x, torch.nan)
    pointwise.prepare(add, pointwise.Config(2, 32, 1), wide=True)((x, y, out, 48, 48, 48), (5,), 48)
    assert torch.equal(out, x + y)


def test_sizes_pick_the_binary(device):
    launch = pointwise.prepare(add, pointwise.Config(1, 16, 1))
    sizes = [((1,), 17), ((5,), 33), ((1,), 16), ((7,), 64), ((1,), WIDE_FROM)]
    kernels = [launch._resolve((), rows, cols)[0] for rows, cols in sizes]
    assert kernels[0] is kernels[1]
    assert kernels[2] is kernels[3]
    assert len({id(kernel) for kernel in kernels}) == 3
    assert [kernels[i].constexprs[name] for i, name in ((0, "UNIT"), (2, "UNIT"), (4, "WIDE"))] == [1, 16, True]


@pytest.mark.gpu
def test_beyond_int32(device):
    # 2**31 + 32 elements of one byte.
    cols = (1 << 31) + 32
    x = torch.zeros(cols, dtype=torch.int8, device=device)
    x[-1] = 3
    out = torch.full_like(x, 99)
    launch = pointwise.prepare(scale_by_segment, choose((1,), cols, torch.int8, device))
    launch(((x, out, cols),), (1,), cols)
    assert torch.equal(out, x)


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_pdl_chain_is_ordered(device, pdl):
    # Each launch reads what the one before wrote.
    x = torch.zeros(1 << 20, device=device)
    one = torch.ones_like(x)
    launch = pointwise.prepare(add, choose((1,), x.numel(), device=device), pdl=pdl)
    for _ in range(50):
        launch((x, one, x, 0, 0, 0), (1,), x.numel())
    assert torch.equal(x, one * 50)


@pytest.mark.parametrize("name", ["h200", "a100"])
@pytest.mark.parametrize(("rows", "cols"), CHOICES)
def test_choice_wastes_little(name, rows, cols):
    problem = Problem(rows, cols, torch.bfloat16)
    assert pointwise.supports(problem) is None
    config, why = pointwise.choose(problem, Target.named(name))
    assert why
    covered = -(-cols // config.block_c) * config.block_c
    assert covered <= max(1.25 * cols, 32, min(triton.next_power_of_2(cols), 4))
    assert config.block_r * config.block_c <= 2048


def test_pdl_pays_where_measured():
    h200 = Target.named("h200")
    # SiLU·mul of 8192 rows, 6 bytes per element: 553 against 278 us, 161 against 162 us; and decode.
    large = Problem((8192,), 14336, torch.bfloat16, 6)
    assert not pdl_pays(large, pointwise.Config(1, 256, 1), h200)
    assert pdl_pays(large, pointwise.Config(1, 2048, 8), h200)
    assert pdl_pays(Problem((1,), 14336, torch.bfloat16, 6), pointwise.Config(1, 256, 1), h200)
    # RoPE of 8192 tokens, 4 bytes: 50 against 43 us.
    assert not pdl_pays(Problem((8192 * 40,), 128, torch.bfloat16, 4), pointwise.Config(8, 128, 4), h200)
    assert not pdl_pays(Problem((1,), 14336, torch.bfloat16), pointwise.Config(1, 256, 1), Target.named("a100"))


def test_unsupported():
    assert "segments" in pointwise.supports(Problem((1,) * 5, 4, torch.float32))
    assert "columns" in pointwise.supports(Problem((1,), 0, torch.float32))


def test_reference():
    x, y = torch.randn(2, 5).bfloat16()
    assert torch.equal(pointwise.reference(x, y), x + y)
