"""Products whose columns come in heads: the epilogue gets the halves of a head side by side."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from terrazzo.kernels import functions, gemm_persistent, gemm_simple, gemm_skinny, gemm_stream, gemm_vendor
from terrazzo.kernels.gemm import GemmProblem, reference
from terrazzo.kernels.target import Target

from .oracle import check
from .test_gemm_families import FAMILIES, operands, poisoned

H200 = Target.named("h200")
SIZES = [(1, 96, 72), (19, 160, 136), (67, 256, 64)]


@triton.jit
def rotate(acc, acc2, m, n, mask, t):
    out, width, angles, half = t
    at = m * width + n + n // half * half
    cos = tl.load(angles + m * half + n % half, mask=mask).to(tl.float32)
    tl.store(out + at, (acc * cos - acc2).to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + half, (acc2 * cos + acc).to(out.dtype.element_ty), mask=mask)


@triton.jit
def scaled_by_row(acc, acc2, m, n, mask, t):
    # What depends on the row alone is read without a mask, as generated bodies do.
    out, width, scale, half = t
    at = m * width + n + n // half * half
    factor = tl.load(scale + m).to(tl.float32)
    tl.store(out + at, (acc * factor).to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + half, (acc2 * factor).to(out.dtype.element_ty), mask=mask)


@triton.jit
def normed(acc, acc2, m, n, mask, t, HALF: tl.constexpr):
    out, width = t
    at = m * width + n + n // HALF * HALF
    total = functions.sum_of_heads(acc * acc + acc2 * acc2, n, HALF)
    scale = tl.rsqrt(total / (2 * HALF) + 1e-3)
    tl.store(out + at, (acc * scale).to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + HALF, (acc2 * scale).to(out.dtype.element_ty), mask=mask)


@triton.jit
def normed_8(acc, acc2, m, n, mask, t):
    normed(acc, acc2, m, n, mask, t, 8)


@triton.jit
def normed_16(acc, acc2, m, n, mask, t):
    normed(acc, acc2, m, n, mask, t, 16)


@triton.jit
def normed_32(acc, acc2, m, n, mask, t):
    normed(acc, acc2, m, n, mask, t, 32)


@triton.jit
def normed_64(acc, acc2, m, n, mask, t):
    normed(acc, acc2, m, n, mask, t, 64)


NORMED = {8: normed_8, 16: normed_16, 32: normed_32, 64: normed_64}


def rotated(problem: GemmProblem, x: torch.Tensor, w: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = reference(problem, x, w).unflatten(-1, (-1, problem.halves)).unbind(0)
    cos = angles[:, None, :]
    return torch.cat([first * cos - second, second * cos + first], dim=-1).flatten(-2)


def run(family: ModuleType, config: Any, problem: GemmProblem, device: torch.device) -> torch.Tensor:
    x, w = operands(problem, device)
    y, buffer = poisoned(problem, device)
    angles = torch.randn(problem.m, problem.halves).to(device, problem.dtype)
    family.prepare(rotate, config, problem)(x, w, (y, problem.n, angles, problem.halves))
    eager = rotated(problem, x, w, angles)
    check(y, eager, rotated(problem, x.double(), w.double(), angles.double()))
    assert buffer[:64].isnan().all() and buffer[-64:].isnan().all(), "written outside of the result"
    return y


@pytest.mark.parametrize(("family", "config"), FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_tiles_of_whole_heads(
    family: ModuleType, config: Any, size: tuple[int, int, int], device: torch.device
) -> None:
    runs = getattr(config, "runs", 1)
    halves = 16 if config.block_n // runs >= 32 else 8
    run(family, config, GemmProblem(*size, torch.float16, halves=halves), device)


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "config"), [p for p in FAMILIES if p.values[0] is gemm_stream])
@pytest.mark.parametrize("size", [(1, 256, 256), (19, 512, 136), (67, 256, 64)])
def test_heads_wider_than_a_tile(family: ModuleType, config: Any, size: tuple[int, int, int], device: Any) -> None:
    run(family, config, GemmProblem(*size, torch.bfloat16, halves=64), device)


def normed_heads(problem: GemmProblem, device: torch.device, family: ModuleType, config: Any) -> None:
    x, w = operands(problem, device)
    y, buffer = poisoned(problem, device)
    family.prepare(NORMED[problem.halves], config, problem)(x, w, (y, problem.n))

    def by_torch(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        heads = (x @ w.T).unflatten(-1, (-1, 2 * problem.halves))
        return torch.nn.functional.rms_norm(heads, heads.shape[-1:], eps=1e-3).flatten(-2)

    check(y, by_torch(x, w), by_torch(x.double(), w.double()))
    assert buffer[:64].isnan().all() and buffer[-64:].isnan().all(), "written outside of the result"


@pytest.mark.parametrize(("family", "config"), FAMILIES)
@pytest.mark.parametrize("size", [(1, 128, 72), (19, 192, 136), (67, 256, 64)])
def test_tiles_sum_their_heads(
    family: ModuleType, config: Any, size: tuple[int, int, int], device: torch.device
) -> None:
    runs = getattr(config, "runs", 1)
    halves = 16 if config.block_n // runs >= 32 else 8
    normed_heads(GemmProblem(*size, torch.float16, halves=halves, summed=2 * halves), device, family, config)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 33, 64, 128, 1100, 2048])
@pytest.mark.parametrize(("n", "k", "halves"), [(6144, 4096, 64), (3072, 2048, 32), (2560, 2048, 64)])
def test_heads_are_summed_by_what_is_chosen(m: int, n: int, k: int, halves: int, device: torch.device) -> None:
    problem = GemmProblem(m, n, k, torch.bfloat16, halves=halves, summed=2 * halves, rounds=True)
    for family in (gemm_stream, gemm_skinny, gemm_persistent):
        if family.supports(problem) is None:
            normed_heads(problem, device, family, family.choose(problem, Target.current())[0])


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64, 128, 130, 512, 1000])
@pytest.mark.parametrize(("n", "k", "halves"), [(6144, 4096, 64), (3072, 2048, 32), (4608, 3584, 128)])
def test_what_is_chosen(m: int, n: int, k: int, halves: int, device: torch.device) -> None:
    problem = GemmProblem(m, n, k, torch.bfloat16, halves=halves, rounds=True)
    target = Target.current()
    for family in (gemm_stream, gemm_skinny, gemm_persistent, gemm_vendor):
        if family.supports(problem) is None:
            first = run_seeded(family, problem, target, device)
            assert torch.equal(first, run_seeded(family, problem, target, device))


def run_seeded(family: ModuleType, problem: GemmProblem, target: Target, device: torch.device) -> torch.Tensor:
    torch.manual_seed(0)
    return run(family, family.choose(problem, target)[0], problem, device)


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_rows_beyond_the_last_are_the_last(family: ModuleType, config: Any, device: torch.device) -> None:
    problem = GemmProblem(5, 64, 64, torch.float16, halves=8)
    x, w = operands(problem, device)
    y, _ = poisoned(problem, device)
    # Behind the scales nothing may be read.
    scale = torch.randn(problem.m).to(device, problem.dtype)
    family.prepare(scaled_by_row, config, problem)(x, w, (y, problem.n, scale, problem.halves))
    check(y, (x @ w.T) * scale[:, None], (x.double() @ w.double().T) * scale.double()[:, None])


@pytest.mark.parametrize("m", [1, 64, 128, 200, 512, 2048])
@pytest.mark.parametrize("halves", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_configs_hold_whole_heads(m: int, halves: int, dtype: torch.dtype) -> None:
    """Where a schedule cannot bring halves of wider heads together, its tiles hold whole heads."""
    for n, k in ((6144, 4096), (3072, 2048), (5120, 3584)):
        problem = GemmProblem(m, n, k, dtype, halves=halves, rounds=True)
        for family in (gemm_skinny, gemm_persistent, gemm_simple):
            if family.supports(problem) is None:
                config, _ = family.choose(problem, H200)
                assert config.block_n % (2 * halves) == 0 and getattr(config, "tail_n", 0) % (2 * halves) == 0
                assert not getattr(config, "extra_n", 0)
        summed = replace(problem, summed=2 * halves)
        for family in (gemm_stream, gemm_skinny, gemm_persistent, gemm_simple):
            if family.supports(summed) is None:
                config, _ = family.choose(summed, H200)
                assert config.block_n // getattr(config, "runs", 1) >= 2 * halves, (family.__name__, str(config))


def test_stored_the_other_way_is_refused_by_the_stream() -> None:
    problem = GemmProblem(16, 512, 256, torch.bfloat16, "kn", halves=64)
    assert "other way" in str(gemm_stream.supports(problem))
    assert gemm_stream.supports(replace(problem, halves=0)) is None
