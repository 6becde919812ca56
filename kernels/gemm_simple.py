"""Simple GEMM: y[b, M, N] = epilogue(x[b, M, K] @ W[b]) for any strides, alignment, batch and size.

Schedule: one program per output tile, grouped in rows of 8 tiles; masked pointer loads, pipelined with cp.async where
they can be. Everything that TMA cannot read comes here, and Triton's interpreter on the CPU.
Bytes: x once per column tile, W once per row tile (mostly from L2). FLOPs: 2 * batch * M * N * K per accumulator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl

from .functions import sum_of_parts
from .gemm import TYPES, GemmProblem, halves_apart, reference, type_name, whole_heads
from .gemm_jobs import sample
from .jobs import CompileJob
from .launch import Kernel
from .target import Target

__all__ = ["CONFIGS", "Config", "choose", "compile_jobs", "estimate_us", "prepare", "reference", "supports"]

# Rows of tiles walked together: 8 keeps the x tiles of a group and one W tile in L2 at every size up to K = 28672
# (8 * 128 * 28672 * 2 bytes = 58.7 MB, just under an H200's 60 MB).
GROUP_M = 8


@dataclass(frozen=True)
class Config:
    """Tile sizes and pipeline of one launch.

    Args:
        block_m, block_n, block_k: output tile and depth per step, powers of two of at least 16.
        stages: tiles in flight.
        warps: 4 or 8.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k} stages {self.stages} warps {self.warps}"


# Not measured against one another: this family is for correctness where TMA cannot go. Each row is a tile that fits
# registers without spilling (see compile_jobs) for its range: of fp32 pairs of 32x64 four warps kept 88 bytes a thread
# in local memory on sm_100, eight keep none. Columns: largest m, config for 2-byte operands, for fp32.
CONFIGS: tuple[tuple[int, Config, Config], ...] = (
    (16, Config(16, 64, 128, 3, 4), Config(16, 64, 32, 3, 4)),
    (64, Config(64, 64, 32, 3, 4), Config(32, 64, 32, 3, 8)),
    (1 << 31, Config(128, 128, 32, 3, 8), Config(64, 64, 32, 3, 8)),
)


def supports(problem: GemmProblem) -> str | None:
    """Return why this family cannot do the problem, or None."""
    if problem.dtype not in TYPES:
        return f"dtype {problem.dtype} is not one of {', '.join(TYPES.values())}"
    return None


def choose(problem: GemmProblem, target: Target) -> tuple[Config, str]:
    """Return the config for the problem and why."""
    if target.interpreted:
        m, n, k = (max(16, triton.next_power_of_2(size)) for size in (problem.m, problem.n, problem.k))
        k = max(k, 32 // problem.dtype.itemsize)
        return Config(min(m, 128), min(n, 256), min(k, 256), 1, 4), "interpreter: few programs, large tiles"
    bound, half, full = next(row for row in CONFIGS if problem.m <= row[0])
    config = full if problem.dtype.itemsize == 4 else half
    if problem.paired and config.block_n == 128:
        # Two accumulators of 128x128 spill 120 bytes a thread on sm_80.
        config = replace(config, block_n=64)
    if not whole_heads(problem, config.block_n):
        config = replace(config, block_n=2 * problem.halves, block_m=min(config.block_m, 64))
    config = replace(config, block_n=max(config.block_n, problem.summed))
    largest = bound == CONFIGS[-1][0]
    return config, "the tile for the most tokens" if largest else f"the tile for up to {bound} tokens"


# Masked pointer loads reach about this share of the memory's bandwidth: the loss that loading x that way cost at 64
# tokens against TMA (30 %, decode sizes, H200, 2026-11-23).
LOAD_SHARE = 0.7
# Half of the persistent family's measured rate per multiprocessor, and the FMA units' peak for fp32 in IEEE precision.
SM_FLOPS = 0.5 * 700e12 / 132
SM_FLOPS_FP32 = 128 * 2 * 1.755e9
FIXED_US = 4.0


def estimate_us(problem: GemmProblem, config: Config, target: Target) -> float:
    """Estimate the time: waves of tiles at the arithmetic rate, or W once per row tile at the memory's, if more."""
    tiles_m = ceil(max(problem.m, 1) / config.block_m)
    tiles = tiles_m * ceil(problem.n / config.block_n) * problem.batch
    waves = ceil(tiles / (target.sm_count * 2))
    flops = 2 * config.block_m * config.block_n * problem.k * problem.accumulators * 2
    half = problem.dtype.itemsize <= 2 or problem.allow_tf32
    compute_us = waves * flops / (SM_FLOPS if half else SM_FLOPS_FP32) * 1e6
    bytes_us = problem.bytes_moved * (1 + 0.1 * (tiles_m - 1)) / (LOAD_SHARE * target.bandwidth_bytes_s) * 1e6
    return FIXED_US + max(compute_us, bytes_us)


@triton.jit(do_not_specialize=["m_size", "x_b", "x_m", "x_k", "w_b", "w_n", "w_k"])
def gemm_simple_kernel(
    x,
    w,
    m_size,
    x_b,
    x_m,
    x_k,
    w_b,
    w_n,
    w_k,
    t,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIR_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    X_UNIT_K: tl.constexpr,
    W_UNIT: tl.constexpr,
    STRIDE_FACTOR: tl.constexpr,
    HALVES: tl.constexpr,
    PAIRED: tl.constexpr,
    PRECISION: tl.constexpr,
    LOAD_PARTS: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    # What the strides have in common is known when this is compiled; it decides how wide the loads may be.
    x_m = tl.multiple_of(x_m.to(tl.int64), STRIDE_FACTOR)
    x_b = tl.multiple_of(x_b.to(tl.int64), STRIDE_FACTOR)
    w_b = tl.multiple_of(w_b.to(tl.int64), STRIDE_FACTOR)
    x_k = 1 if X_UNIT_K else x_k.to(tl.int64)
    w_n = 1 if W_UNIT == "n" else tl.multiple_of(w_n.to(tl.int64), STRIDE_FACTOR)
    w_k = 1 if W_UNIT == "k" else tl.multiple_of(w_k.to(tl.int64), STRIDE_FACTOR)
    batch = tl.program_id(1).to(tl.int64)
    tiles_m = tl.cdiv(m_size, BLOCK_M)
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    group = tile // (GROUP * TILES_N)
    rows = min(tiles_m - group * GROUP, GROUP)
    in_group = tile % (GROUP * TILES_N)
    m = (group * GROUP + in_group % rows) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = in_group // rows * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    m_ok = m < m_size
    n_ok = n < N

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc2 = acc
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k_row = k0 + tl.arange(0, BLOCK_K)[None, :]
        k_col = k0 + tl.arange(0, BLOCK_K)[:, None]
        x_at = x + batch * x_b + m * x_m + k_row * x_k
        x_tile = tl.load(x_at, mask=m_ok & (k_row < K), other=0.0)  # [BLOCK_M, BLOCK_K]
        w_at = w + batch * w_b + n * w_n + k_col * w_k  # [BLOCK_K, BLOCK_N]
        w_ok = n_ok & (k_col < K)
        acc = tl.dot(x_tile, tl.load(w_at, mask=w_ok, other=0.0), acc, input_precision=PRECISION)
        if PAIRED:
            acc2 = tl.dot(
                x_tile, tl.load(w_at + PAIR_OFFSET * w_n, mask=w_ok, other=0.0), acc2, input_precision=PRECISION
            )
    if not PAIRED:
        acc2 = acc
    row = batch * m_size + tl.minimum(m, m_size - 1)
    ACROSS: tl.constexpr = 2 if HALVES > 0 else 1
    if HALVES > 0:
        acc, acc2 = halves_apart(acc, HALVES, 1)
        n = in_group // rows * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[None, :]
    if LOAD_PARTS is not None:
        t = t + (sum_of_parts(LOAD_PARTS(row, n, t), n),)
    EPILOGUE(acc, acc2, row, n, m_ok & (n < N // ACROSS), t)


def _stride_factor(strides: tuple[int, ...]) -> int:
    """Largest of 16, 8, 4, 2, 1 that divides every stride."""
    return next(factor for factor in (16, 8, 4, 2, 1) if all(stride % factor == 0 for stride in strides))


def _constexprs(
    problem: GemmProblem,
    config: Config,
    epilogue: Any,
    unit: tuple[bool, str, int],
    parts: Any = None,
) -> dict[str, Any]:
    x_unit_k, w_unit, factor = unit
    return {
        "N": problem.n,
        "K": problem.k,
        "PAIR_OFFSET": problem.pair_offset if problem.paired else 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
        "GROUP": GROUP_M,
        "X_UNIT_K": x_unit_k,
        "W_UNIT": w_unit,
        "STRIDE_FACTOR": factor,
        "HALVES": problem.halves,
        "PAIRED": problem.paired,
        "PRECISION": problem.precision,
        "LOAD_PARTS": parts,
        "EPILOGUE": epilogue,
    }


class SimpleGemm:
    """A prepared launch; call it with x, W in the problem's layout, and the epilogue's tensors."""

    def __init__(self, epilogue: Any, config: Config, problem: GemmProblem, parts: Any) -> None:
        self.config, self.problem, self.epilogue, self.parts = config, problem, epilogue, parts
        self._kernels: dict[tuple[bool, str, int], Kernel] = {}

    def kernel(self, x_strides: tuple[int, int, int], w_strides: tuple[int, int, int]) -> Kernel:
        """Return the binary for operands with such strides: which axis is dense, and what divides the others."""
        w_unit = "k" if w_strides[2] == 1 else "n" if w_strides[1] == 1 else ""
        # Only the dense axis may have stride 1 and wide loads: rows that overlap have stride 1 too.
        others = w_strides[:2] if w_unit == "k" else w_strides[::2] if w_unit == "n" else w_strides
        unit = (x_strides[2] == 1, w_unit, _stride_factor((*x_strides[:2], *others)))
        if unit not in self._kernels:
            constexprs = _constexprs(self.problem, self.config, self.epilogue, unit, self.parts)
            config = self.config
            self._kernels[unit] = Kernel(gemm_simple_kernel, constexprs, config.warps, num_stages=config.stages)
        return self._kernels[unit]

    def __call__(self, x: torch.Tensor, w: torch.Tensor, t: tuple) -> None:
        m = x.shape[-2]
        x_strides = (x.stride(0) if x.dim() == 3 else 0, _stride(x, -2), _stride(x, -1))
        n_axis, k_axis = (-2, -1) if self.problem.layout == "nk" else (-1, -2)
        w_strides = (w.stride(0) if w.dim() == 3 else 0, _stride(w, n_axis), _stride(w, k_axis))
        tiles = ceil(m / self.config.block_m) * ceil(self.problem.n / self.config.block_n)
        kernel = self.kernel(x_strides, w_strides)
        kernel((tiles, x.shape[0] if x.dim() == 3 else 1, 1), x, w, m, *x_strides, *w_strides, t)


def _stride(tensor: torch.Tensor, axis: int) -> int:
    """The stride, with torch's arbitrary stride of an axis of length 1 replaced by what a dense tensor has there."""
    if tensor.shape[axis] != 1:
        return tensor.stride(axis)
    return 1 if axis == -1 else tensor.shape[-1]


def prepare(epilogue: Any, config: Config, problem: GemmProblem, *, parts: Any = None) -> SimpleGemm:
    """Fix everything that does not change between calls.

    Args:
        epilogue: `@triton.jit` body `(acc, acc2, m, n, mask, t)`; with a batch, `m` is `b * M + row`.
        config: from `choose`.
        problem: sizes and layout; `m` and the strides are only hints, the tensors' own are used.
        parts: as for `gemm_stream.prepare`.
    """
    return SimpleGemm(epilogue, config, problem, parts)


def compile_jobs(arch: int) -> Iterable[CompileJob]:
    """Yield every tile for a dense and an unaligned problem, plain and paired."""
    target = Target.named("a100" if arch < 90 else "h200" if arch < 100 else "b200")
    for bound, _, _ in CONFIGS:
        m = min(bound, 4096)
        for dtype in (torch.bfloat16, torch.float32):
            for paired in (False, True):
                problem = GemmProblem(m, 4096, 4096, dtype, paired=paired, pair_offset=4096)
                yield _job(problem, choose(problem, target)[0], 16)
            problem = GemmProblem(m, 1001, 333, dtype)
            yield _job(problem, choose(problem, target)[0], 1)


def _job(problem: GemmProblem, config: Config, factor: int) -> CompileJob:
    dtype = type_name(problem.dtype)
    return CompileJob(
        family="gemm_simple",
        label=f"{config} {dtype} {problem.n}x{problem.k}{' paired' if problem.paired else ''}",
        fn=gemm_simple_kernel,
        signature={
            "x": f"*{dtype}",
            "w": f"*{dtype}",
            **dict.fromkeys(("m_size", "x_b", "x_m", "x_k", "w_b", "w_n", "w_k"), "i32"),
            "t": (f"*{dtype}",),
        },
        constexprs=_constexprs(problem, config, sample(problem), (True, "k", factor)),
        num_warps=config.warps,
        num_stages=config.stages,
        divisible=("x", "w", "t") if factor == 16 else (),
    )
