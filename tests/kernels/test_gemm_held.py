"""The persistent GEMM whose epilogue runs while the next tile is multiplied."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from terrazzo.kernels import gemm_held, gemm_persistent
from terrazzo.kernels.gemm import GemmProblem, reference
from terrazzo.kernels.target import Target

from .oracle import check
from .test_gemm_families import (
    add_in_place,
    check_order,
    operands,
    plain,
    run,
    silu_mul,
    silu_residual,
    store,
    with_residual,
)

H200 = Target.named("h200")
# Eight warps and four; few stages, which wrap within a tile's first steps.
WIDE = gemm_persistent.Config(128, 256, 64, 4, 8, flatten=True, held=True)
SMALL = gemm_persistent.Config(64, 64, 64, 2, 4, group_m=2, flatten=True, held=True)
CONFIGS = [pytest.param(WIDE, id="wide"), pytest.param(SMALL, id="small")]
# One tile and several a program; depths of one step, of fewer than there are parts, and of many.
SIZES = [
    (1, 61, 72), (67, 128, 64), (130, 264, 200), (300, 1000, 1032), (700, 6144, 4096), (9000, 320, 64),
    (9000, 320, 200),
]  # fmt: skip
gpu = pytest.mark.gpu


def half_as_wide(config: gemm_persistent.Config) -> gemm_persistent.Config:
    """The same for a pair, whose tile is of two accumulators."""
    return replace(config, block_n=config.block_n // 2)


@triton.jit
def sum_of_halves(acc, acc2, m, n, mask, t):
    tl.store(t[0] + m * t[1] + n, (acc + 2 * acc2).to(t[0].dtype.element_ty), mask=mask)


@gpu
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_sizes(config, dtype, size, device):
    problem = GemmProblem(*size, dtype)
    run(gemm_persistent, config, problem, device, store, plain)
    run(gemm_persistent, config, problem, device, silu_residual, with_residual)


@gpu
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(5, 72, 136), (700, 3000, 1032)])
def test_pairs(config, dtype, size, device):
    # The pair starts beyond the first accumulator's last column, and the last tile reaches beyond W.
    problem = GemmProblem(*size, dtype, paired=True, pair_offset=size[1] + 8)
    run(gemm_persistent, half_as_wide(config), problem, device, silu_mul, lambda _, a, b: with_residual(0 * a, a) * b)


@gpu
@pytest.mark.parametrize("m", [5, 700])
def test_halves_of_heads(m, device):
    problem = GemmProblem(m, 1536, 1032, torch.bfloat16, halves=64)
    x, w = operands(problem, device)
    y = torch.full((m, 768), torch.nan, dtype=x.dtype, device=device)
    gemm_persistent.prepare(sum_of_halves, WIDE, problem)(x, w, (y, 768))
    product = (x.double() @ w.double().T).view(m, 12, 2, 64)
    torch.testing.assert_close(y.double(), (product[:, :, 0] + 2 * product[:, :, 1]).view(m, 768), rtol=2e-2, atol=2e-2)


@gpu
@pytest.mark.parametrize("config", CONFIGS)
def test_each_row_is_stored_by_one_tile(config, device):
    # The last tile's rows begin before the end of the tile before it.
    problem = GemmProblem(300, 520, 264, torch.bfloat16)
    x, w = operands(problem, device)
    launch = gemm_persistent.prepare(add_in_place, config, problem)
    expected = reference(problem, x.double(), w.double())
    for m in (0, 1, 63, 64, 65, 127, 128, 129, 193, 300):
        y = torch.ones(m, problem.n, dtype=torch.float32, device=device)
        launch(x[:m], w, (y, problem.n))
        torch.testing.assert_close(y.double() - 1, expected[:m], rtol=1e-2, atol=2e-2)


@gpu
def test_rows_of_wider_matrices(device):
    problem = GemmProblem(300, 512, 256, torch.bfloat16, x_strides=(0, 768, 1), w_strides=(0, 512, 1))
    wide, wider = torch.randn(300, 768).to(device, torch.bfloat16), torch.randn(512, 512).to(device, torch.bfloat16)
    x, w = wide[:, 256:512], wider[:, 128:384]
    y = torch.full((300, 512), torch.nan, dtype=x.dtype, device=device)
    gemm_persistent.prepare(store, WIDE, problem)(x, w, (y, 512))
    check(y, reference(problem, x, w), reference(problem, x.double(), w.double()))


@gpu
def test_dependent_launch_keeps_the_order(device):
    check_order(gemm_persistent, WIDE, GemmProblem(1000, 2048, 2048, torch.bfloat16), device)


def test_where_it_is_chosen():
    """Where tiles follow one another, the graph rounds the sums, and a part leaves registers."""
    problem = GemmProblem(2048, 4096, 14336, torch.bfloat16, rounds=True)
    config, why = gemm_persistent.choose(problem, H200)
    assert config.held
    assert "held until the next tile" in why
    assert str(config).endswith("held")
    assert gemm_persistent.smem_bytes(problem, config) <= H200.smem_bytes
    for change, reason in (
        ({"rounds": False}, "as they are"),
        ({"dtype": torch.float32}, "dtype torch.float32"),
        ({"layout": "kn"}, "[K, N]"),
        ({"epilogue_itemsize": 8}, "8-byte"),
        ({"halves": 64, "summed": 128}, "sums over columns"),
    ):
        other = replace(problem, **change)
        assert reason in (gemm_held.obstacle(other) or "")
        assert not gemm_persistent.choose(other, H200)[0].held
    assert not gemm_persistent.choose(problem, Target.named("b200"))[0].held
    assert not gemm_persistent.choose(replace(problem, m=160), H200)[0].held


def test_what_is_rounded_and_what_is_not_keep_their_own_configs():
    """Neither is asked for at a size that was measured, where only the table would speak."""
    problem = GemmProblem(5000, 4096, 14336, torch.bfloat16, rounds=True)
    for rounds in (True, False, True):
        config, _ = gemm_persistent.choose(replace(problem, rounds=rounds), H200)
        assert config.held == rounds
