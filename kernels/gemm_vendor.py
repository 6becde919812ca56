"""The vendor's GEMM: y[M, N] = x[M, K] @ W by cuBLAS, where it is faster and nothing but the product is stored.

Schedule: cuBLAS's own. It has tiles of any multiple of 8 and clusters that share a tile's loads, so it loses less where
tiles of powers of two fill the last rows or the last wave badly: between 130 and 1000 tokens, mostly.
A candidate like the others: chosen by time alone, its time being the one that was measured beside ours, or modelled.
Bytes: x and W once, y once. FLOPs: 2 * M * N * K.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from . import gemm_persistent
from .gemm import GemmProblem, reference, tma_obstacle
from .gemm_persistent_table import vendor_us
from .jobs import CompileJob
from .target import Target

__all__ = ["Config", "choose", "compile_jobs", "estimate_us", "prepare", "reference", "supports"]

# Launched without programmatic dependent launch, cuBLAS starts after its predecessor has ended; about half of its calls
# at 333 tokens and up bring a memset along. Read off the benchmark's kernels, NVIDIA H100, 2026-11-25: 0.4 us between
# kernels, 2 us for a memset.
GAP_US = 2.0
# Without a measurement: cuBLAS at 256, 512 and 1024 tokens took FIXED_US and its FLOPs at this rate within 8 % for
# N and K of 4096 and 6144 (table of gemm_persistent, NVIDIA H200), until the power limit sets in.
FIXED_US = 5.0
FLOPS = 820e12


@dataclass(frozen=True)
class Config:
    """Nothing to choose: cuBLAS has heuristics of its own."""

    def __str__(self) -> str:
        return "cuBLAS"


def supports(problem: GemmProblem) -> str | None:
    """Return why this family cannot do the problem, or why it is not asked, or None."""
    if not problem.plain:
        return "the epilogue is more than storing the product"
    if problem.m <= 128:
        return f"{problem.m} tokens: reading W is the cost, and kernels of ours that overlap do it faster"
    if problem.dtype == torch.float32:
        return "fp32 is multiplied in the precision that the problem asks for by kernels of ours"
    return tma_obstacle(problem)


def choose(problem: GemmProblem, target: Target) -> tuple[Config, str]:
    """Return the config and why."""
    how = "estimated" if vendor_us(problem) is None else "measured (between its neighbours)"
    return Config(), f"{how} {estimate_us(problem, Config(), target):.1f} us with the gap before it"


def estimate_us(problem: GemmProblem, config: Config, target: Target) -> float:
    """Return what was measured, in between linear in m; else the model."""
    if target.interpreted:
        return float("inf")
    us = vendor_us(problem) if target.arch == 90 else None
    if us is None:
        share = target.sm_count / gemm_persistent.MEASURED_SM_COUNT
        sustained = problem.flops / (gemm_persistent.SUSTAINED_FLOPS * share)
        fastest = FIXED_US * 1e-6 + problem.flops / (FLOPS * share)
        us = max(sustained, fastest, problem.bytes_moved / target.bandwidth_bytes_s) * 1e6
    return us + GAP_US


class VendorGemm:
    """A prepared call; `t` holds the result's memory, [M, N] row-major."""

    def __init__(self, config: Config, problem: GemmProblem) -> None:
        self.config, self.problem = config, problem

    def __call__(self, x: torch.Tensor, w: torch.Tensor, t: tuple) -> None:
        # Like the kernels, which autograd never sees; `out=` refuses parameters otherwise.
        with torch.no_grad():
            torch.mm(x, w.t() if self.problem.layout == "nk" else w, out=t[0])


def prepare(epilogue: Any, config: Config, problem: GemmProblem, *, pdl: bool = False) -> VendorGemm:
    """Fix everything that does not change between calls; `epilogue` says what is stored, and `pdl` has no meaning."""
    return VendorGemm(config, problem)


def compile_jobs(arch: int) -> Iterable[CompileJob]:
    """Yield nothing: there is nothing of ours to compile."""
    return ()
