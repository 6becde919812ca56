"""gather: embedding and index_select, int32 and int64 indices, strided tables."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from terrazzo.kernels import gather
from terrazzo.kernels.segments import Problem
from terrazzo.kernels.target import Target


@triton.jit
def embedding(SEGMENT: tl.constexpr, row, col, mask, t):
    table_ptr, index_ptr, out_ptr, table_row, cols = t
    index = tl.load(index_ptr + row).to(tl.int64)
    value = tl.load(table_ptr + index * table_row + col, mask=mask)
    tl.store(out_ptr + row * cols + col, value, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 33), (7, 600), (0, 8), (37, 16)])
def test_embedding(device, dtype, index_dtype, rows, cols):
    table = (torch.randn(11, cols + 3, device=device) * 100).to(dtype)[:, :cols]
    index = torch.randint(0, 11, (rows,), device=device, dtype=index_dtype)
    out = torch.full((rows, cols), -7, device=device).to(dtype)
    config, _ = gather.choose(Problem((rows,), cols, dtype), Target.current(device))
    gather.prepare(embedding, config)((table, index, out, cols + 3, cols), (rows,), cols)
    assert torch.equal(out, gather.reference(table, index))
    assert torch.equal(gather.reference(table, index), table[index.long()])


@pytest.mark.parametrize(("block_r", "block_c"), [(1, 16), (4, 8), (64, 64)])
def test_any_tile_gives_the_same(device, block_r, block_c):
    table = torch.randn(11, 40, device=device)
    # The index's storage ends with the last row.
    index = torch.randint(0, 11, (13,), device=device)
    out = torch.full((13, 40), torch.nan, device=device)
    gather.prepare(embedding, gather.Config(block_r, block_c, 1))((table, index, out, 40, 40), (13,), 40)
    assert torch.equal(out, table[index])


@pytest.mark.gpu
def test_table_beyond_int32(device):
    # The last entry starts at element 2**31 + 2**20.
    table = torch.zeros((1 << 11) + 2, 1 << 20, dtype=torch.float16, device=device)
    table[-1] = 3
    index = torch.tensor([0, len(table) - 1], device=device)
    out = torch.full((2, 1 << 20), torch.nan, dtype=torch.float16, device=device)
    config, _ = gather.choose(Problem((2,), 1 << 20, out.dtype), Target.current(device))
    gather.prepare(embedding, config)((table, index, out, 1 << 20, 1 << 20), (2,), 1 << 20)
    assert torch.equal(out, table[index])


@pytest.mark.parametrize(("rows", "cols"), [(1, 4096), (8192, 4096), (100, 3), (1, 5)])
def test_choice(rows, cols):
    problem = Problem((rows,), cols, torch.bfloat16)
    assert gather.supports(problem) is None
    config, why = gather.choose(problem, Target.named("h200"))
    assert why
    assert config.block_c <= triton.next_power_of_2(cols)
    assert config.warps >= 1
