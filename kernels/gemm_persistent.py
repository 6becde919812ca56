"""Persistent GEMM: y[M, N] = epilogue(x[M, K] @ W) for many tokens, where the tensor cores are the cost.

Schedule: one program per multiprocessor walks over output tiles [BLOCK_M, BLOCK_N]; both operands arrive by TMA;
groups of `group_m` rows of tiles are walked column by column, so that a group's x tiles and the current W tile stay in
L2. `flatten` makes tile and depth loop one pipeline: the next tile's loads fly during the epilogue. `subtile` runs the
epilogue on halves of the columns, which halves its shared memory.
Bytes: x and W once if a group fits in L2, y once. FLOPs: 2 * M * N * K per accumulator.
Paired problems (GLU) keep two accumulators of the same x tile, so neither half of the wide product is written.
Source: grouped tile order from Triton's public matmul tutorial; persistence and flattening from its persistent one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl

from .gemm import (
    GemmProblem,
    Measured,
    Table,
    descriptor,
    load_tile,
    lookup,
    reference,
    silu_mul_sample,
    store_sample,
    tma_obstacle,
    type_name,
    w_block,
)
from .jobs import CompileJob
from .launch import Kernel
from .target import Target

__all__ = ["CONFIGS", "Config", "choose", "compile_jobs", "estimate_us", "prepare", "reference", "supports"]

# Largest m of each row of CONFIGS; the last row serves everything above it too.
BUCKETS = (256, 512, 1024, 2048, 8192)


@dataclass(frozen=True)
class Config:
    """Tile sizes and pipeline of one launch.

    Args:
        block_m, block_n, block_k: output tile and depth per pipeline step.
        stages: tiles in flight.
        warps: 4 or 8.
        group_m: rows of tiles walked together.
        programs_per_sm: resident programs per multiprocessor.
        flatten: one pipeline over tiles and depth.
        subtile: the epilogue runs on two halves of the columns.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    group_m: int = 8
    programs_per_sm: int = 1
    flatten: bool = False
    subtile: bool = False

    def __str__(self) -> str:
        how = f"{' flatten' if self.flatten else ''}{' subtile' if self.subtile else ''}"
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{tile} stages {self.stages} warps {self.warps} group {self.group_m} x{self.programs_per_sm}{how}"


EVIDENCE = "NVIDIA H200, torch 2.11, triton 3.6, bf16, 2026-11-24"

CONFIGS: Table = {}


def supports(problem: GemmProblem) -> str | None:
    """Return why this family cannot do the problem, or None."""
    if problem.m <= 64:
        return f"{problem.m} tokens leave most of a 128-row tile empty"
    return tma_obstacle(problem)


def choose(problem: GemmProblem, target: Target) -> tuple[Config, str]:
    """Return the config for the problem and why: the measured one, else the cheapest by `estimate_us`."""
    if target.interpreted:
        return _interpreter_config(problem), "interpreter: few programs, large tiles"
    if target.arch == 90 and (hit := lookup(CONFIGS, BUCKETS, problem)) is not None:
        return hit.config, hit.why(EVIDENCE)
    config = min(_candidates(problem, target), key=lambda c: estimate_us(problem, c, target))
    return config, f"estimated {estimate_us(problem, config, target):.1f} us, no measurement for this N and K"


# A multiprocessor's bf16 rate with 128x256 tiles: 700 TFLOP/s over 132 of them (prefill sizes, H200, 2026-11-23).
SM_FLOPS = 700e12 / 132
# fp32 in FMA units: 128 lanes, 2 FLOPs, 1.755 GHz (the boost clock of the data sheet), per multiprocessor.
SM_FLOPS_FP32 = 128 * 2 * 1.755e9
# Launch, first tiles and last epilogue.
FIXED_US = 4.0


def estimate_us(problem: GemmProblem, config: Config, target: Target) -> float:
    """Estimate the time: waves of whole tiles at the tensor cores' rate, or the bytes at the memory's, if more."""
    hit = lookup(CONFIGS, BUCKETS, problem) if target.arch == 90 and not target.interpreted else None
    if hit is not None and hit.config == config:
        # The row was measured at its bucket's largest m.
        bound = next((b for b in BUCKETS if problem.m <= b), BUCKETS[-1])
        return hit.us * max(problem.m / bound, problem.weight_bytes / target.bandwidth_bytes_s * 1e6 / hit.us)
    tiles = ceil(problem.m / config.block_m) * ceil(problem.n / config.block_n)
    waves = ceil(tiles / (target.sm_count * config.programs_per_sm))
    flops = 2 * config.block_m * config.block_n * problem.k * problem.accumulators * config.programs_per_sm
    wide = config.block_m * config.block_n * problem.accumulators
    # Smaller tiles feed the tensor cores worse: 128x128 reaches about 0.85 of 128x256 (same source), 64x128 about 0.7.
    share = 1.0 if wide >= 128 * 256 else 0.85 if wide >= 128 * 128 else 0.7
    half = problem.dtype.itemsize == 2 or problem.allow_tf32
    rate = (SM_FLOPS if problem.dtype.itemsize == 2 else SM_FLOPS / 2) * share if half else SM_FLOPS_FP32
    compute_us = waves * flops / rate * 1e6
    return FIXED_US + max(compute_us, problem.bytes_moved / target.bandwidth_bytes_s * 1e6)


def smem_bytes(problem: GemmProblem, config: Config) -> int:
    """Shared memory of the pipeline, and of the epilogue's transposition where that is larger (fp32 tile at worst)."""
    rows = config.block_m + problem.accumulators * config.block_n
    return config.stages * rows * config.block_k * problem.dtype.itemsize + 1024


def _candidates(problem: GemmProblem, target: Target) -> Iterable[Config]:
    """Every tile that fits, for `choose` to estimate."""
    if problem.dtype == torch.float32 and not problem.allow_tf32:
        # FMA units from registers: larger tiles spill.
        yield Config(64, 64, 32, 2, 8)
        return
    block_k = 64 if problem.dtype.itemsize == 2 else 32
    tiles = ((128, 128), (64, 128)) if problem.paired else ((128, 256), (128, 128), (64, 128))
    for block_m, block_n in tiles:
        warps = 8 if block_m * block_n * problem.accumulators >= 128 * 256 else 4
        for stages in (4, 3, 2):
            config = Config(block_m, block_n, block_k, stages, warps)
            if smem_bytes(problem, config) <= target.smem_bytes:
                yield config
                break


def _interpreter_config(problem: GemmProblem) -> Config:
    block_n = min(256, max(16, triton.next_power_of_2(problem.n)))
    block_k = min(256, max(16, triton.next_power_of_2(problem.k)))
    return Config(min(128, max(16, triton.next_power_of_2(problem.m))), block_n, block_k, 1, 4)


@triton.jit
def _halves(acc):
    """Split [M, N] into its left and right columns."""
    HALF: tl.constexpr = acc.shape[1] // 2
    return acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1).split()


@triton.jit(do_not_specialize=["m_size"])
def gemm_persistent_kernel(
    x_desc,
    w_desc,
    m_size,
    t,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIR_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    SUBTILE: tl.constexpr,
    PAIRED: tl.constexpr,
    KN: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
    tiles_m = tl.cdiv(m_size, BLOCK_M)
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    HALF: tl.constexpr = BLOCK_N // 2
    for tile in tl.range(tl.program_id(0), tiles_m * TILES_N, tl.num_programs(0), flatten=FLATTEN):
        group = tile // (GROUP_M * TILES_N)
        rows = min(tiles_m - group * GROUP_M, GROUP_M)
        in_group = tile % (GROUP_M * TILES_N)
        m0 = (group * GROUP_M + in_group % rows) * BLOCK_M
        n0 = in_group // rows * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc2 = acc
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            x = x_desc.load([m0, k])  # [BLOCK_M, BLOCK_K]
            acc = tl.dot(x, load_tile(w_desc, n0, k, KN).T, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            if PAIRED:
                acc2 = tl.dot(x, load_tile(w_desc, n0 + PAIR_OFFSET, k, KN).T, acc2, input_precision=PRECISION)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        if not PAIRED:
            acc2 = acc
        # Bodies multiply m by a row length: M * N may exceed 2^31 here.
        m = m0.to(tl.int64) + tl.arange(0, BLOCK_M)[:, None]
        if SUBTILE:
            left, right = _halves(acc)
            left2, right2 = left, right
            if PAIRED:
                left2, right2 = _halves(acc2)
            n = n0 + tl.arange(0, HALF)[None, :]
            EPILOGUE(left, left2, m, n, (m < m_size) & (n < N), t)
            EPILOGUE(right, right2, m, n + HALF, (m < m_size) & (n + HALF < N), t)
        else:
            n = n0 + tl.arange(0, BLOCK_N)[None, :]
            EPILOGUE(acc, acc2, m, n, (m < m_size) & (n < N), t)


def _constexprs(problem: GemmProblem, config: Config, epilogue: Any, pdl: bool) -> dict[str, Any]:
    return {
        "N": problem.n,
        "K": problem.k,
        "PAIR_OFFSET": problem.pair_offset if problem.paired else 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
        "GROUP_M": config.group_m,
        "FLATTEN": config.flatten,
        "SUBTILE": config.subtile,
        "PAIRED": problem.paired,
        "KN": problem.layout == "kn",
        "PDL": pdl,
        "PRECISION": problem.precision,
        "EPILOGUE": epilogue,
    }


class PersistentGemm:
    """A prepared launch; call it with x [M, K], W in the problem's layout and the epilogue's tensors."""

    def __init__(self, epilogue: Any, config: Config, problem: GemmProblem, pdl: bool) -> None:
        self.config, self.problem = config, problem
        self.kernel = Kernel(
            gemm_persistent_kernel,
            _constexprs(problem, config, epilogue, pdl),
            num_warps=config.warps,
            num_stages=config.stages,
            pdl=pdl,
        )
        self._w_block = w_block(problem, config.block_n, config.block_k)
        self._tiles_n = ceil(problem.n / config.block_n)

    def arguments(self, x: torch.Tensor, w: torch.Tensor, t: tuple) -> tuple[tuple[int, int, int], tuple]:
        """Return grid and kernel arguments, as the next call would launch them."""
        config, m = self.config, x.shape[0]
        tiles = ceil(m / config.block_m) * self._tiles_n
        resident = _sm_count(x.device) * config.programs_per_sm
        x_desc = descriptor(x, [config.block_m, config.block_k], "x")
        return (min(tiles, resident), 1, 1), (x_desc, descriptor(w, self._w_block, "W"), m, t)

    def __call__(self, x: torch.Tensor, w: torch.Tensor, t: tuple) -> None:
        if x.shape[0] == 0:
            return
        grid, args = self.arguments(x, w, t)
        self.kernel(grid, *args)


def _sm_count(device: torch.device) -> int:
    return Target.current(device).sm_count


def prepare(epilogue: Any, config: Config, problem: GemmProblem, *, pdl: bool = False) -> PersistentGemm:
    """Fix everything that does not change between calls.

    Args:
        epilogue: `@triton.jit` body `(acc, acc2, m, n, mask, t)`; accumulators are [BLOCK_M, BLOCK_N], or halves of it.
        config: from `choose`.
        problem: sizes and strides; `m` is only a hint.
        pdl: wait for the predecessor in the kernel and let the successor start before the first epilogue.
    """
    return PersistentGemm(epilogue, config, problem, pdl)


def compile_jobs(arch: int) -> Iterable[CompileJob]:
    """Yield one job for every measured config, with the sample epilogues."""
    if arch < 90:
        return
    for (n, k, paired), row in CONFIGS.items():
        for bucket, entry in row.items():
            yield _job(GemmProblem(bucket, n, k, torch.bfloat16, paired=paired, pair_offset=n), entry)


def _job(problem: GemmProblem, entry: Measured) -> CompileJob:
    config, dtype = entry.config, type_name(problem.dtype)
    return CompileJob(
        family="gemm_persistent",
        label=f"{problem.n}x{problem.k}{' paired' if problem.paired else ''} m<={problem.m}",
        fn=gemm_persistent_kernel,
        signature={
            "x_desc": f"tensordesc<{dtype}[{config.block_m},{config.block_k}]>",
            "w_desc": f"tensordesc<{dtype}[{config.block_n},{config.block_k}]>",
            "m_size": "i32",
            "t": (f"*{dtype}",),
        },
        constexprs=_constexprs(problem, config, silu_mul_sample if problem.paired else store_sample, pdl=True),
        num_warps=config.warps,
        num_stages=config.stages,
        divisible=("t",),
    )
