"""The vendor's GEMM: y[M, N] = epilogue(x[M, K] @ W), the product by cuBLAS, the epilogue by a kernel of its own.

Schedule: cuBLAS's. It has tiles of any multiple of 8 and clusters that share a tile's loads, so it loses less where
tiles of powers of two fill the last rows or the last wave badly: between 130 and 1000 tokens, mostly. Where more than
the product is stored, the product goes to memory, rounded to the operands' dtype, and a kernel reads it back in tiles
and runs the same epilogue body on them as the other families do; only where eager rounds the product as well.
A candidate like the others: chosen by time alone, its time being the one that was measured beside ours, or modelled,
and that of the bytes that pass between the two.
Bytes: x and W once, the product once, or three times with the epilogue's. FLOPs: 2 * M * N * K per accumulator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl

from . import gemm_persistent
from .buffers import empty_on
from .gemm import GemmProblem, reference, tma_obstacle
from .gemm_jobs import sample
from .gemm_persistent_table import vendor_us
from .jobs import CompileJob
from .launch import Kernel
from .target import Target

__all__ = ["Config", "choose", "compile_jobs", "estimate_us", "prepare", "reference", "supports"]

# Launched without programmatic dependent launch, cuBLAS starts after its predecessor has ended: 0.4 to 0.5 us between
# the benchmark's kernels at 257 to 512 tokens, NVIDIA H100, 2026-11-25. The memset that some of its kernels bring along
# is in their measured time.
GAP_US = 0.5
# Without a measurement: cuBLAS at 256, 512 and 1024 tokens took FIXED_US and its FLOPs at this rate within 8 % for
# N and K of 4096 and 6144 (table of gemm_persistent, NVIDIA H200), until the power limit sets in.
FIXED_US = 5.0
FLOPS = 820e12


# The epilogue's tile: elements of a row by rows, 16 elements a thread.
ROWS, COLUMNS, WARPS = 2, 2048, 8


@dataclass(frozen=True)
class Config:
    """Nothing to choose: cuBLAS has heuristics of its own."""

    def __str__(self) -> str:
        return "cuBLAS"


def supports(problem: GemmProblem) -> str | None:
    """Return why this family cannot do the problem, or why it is not asked, or None."""
    if problem.m <= 128:
        return f"{problem.m} tokens: reading W is the cost, and kernels of ours that overlap do it faster"
    if problem.dtype.itemsize == 1:
        return "it does not multiply eight-bit floats"
    if problem.dtype == torch.float32:
        return "fp32 is multiplied in the precision that the problem asks for by kernels of ours"
    if not (problem.plain or problem.rounds):
        return "the epilogue belongs to the product, unrounded, and cuBLAS stores it rounded"
    if problem.halves:
        return "cuBLAS brings no halves of heads together"
    if problem.paired and problem.pair_offset != problem.n:
        return f"the pair's halves of {problem.n} columns are {problem.pair_offset} apart: they are no single product"
    return tma_obstacle(problem)


def choose(problem: GemmProblem, target: Target) -> tuple[Config, str]:
    """Return the config and why."""
    measured = target.arch == 90 and vendor_us(problem, target) is not None
    how = "between the times measured beside gemm_persistent's," if measured else "estimated"
    more = "" if problem.plain else " and the kernel of the epilogue after it"
    return Config(), f"{how} {estimate_us(problem, Config(), target):.1f} us with the gap before it{more}"


def estimate_us(problem: GemmProblem, config: Config, target: Target) -> float:
    """Return what was measured, in between linear in m; else the model; and what the epilogue's kernel adds."""
    if target.interpreted:
        return float("inf")
    us = vendor_us(problem, target) if target.arch == 90 else None
    if us is None:
        share = target.sm_count / gemm_persistent.MEASURED_SM_COUNT
        sustained = problem.flops / (gemm_persistent.SUSTAINED_FLOPS * share)
        fastest = FIXED_US * 1e-6 + problem.flops / (FLOPS * share)
        us = max(sustained, fastest, problem.bytes_moved / target.bandwidth_bytes_s) * 1e6
    if not problem.plain:
        product = problem.accumulators * problem.dtype.itemsize
        read_and_written = problem.m * problem.n * (product + (problem.epilogue_itemsize or problem.dtype.itemsize))
        # Nothing more: 9.8 us with its gap for 28.6 MB at 333 tokens of 8B, 6.8 for 22.1 MB at 257 (NVIDIA H100).
        us += read_and_written / target.bandwidth_bytes_s * 1e6
    return us + GAP_US


@triton.jit(do_not_specialize=["m_size"])
def vendor_epilogue_kernel(
    product,
    m_size,
    t,
    N: tl.constexpr,
    PAIRED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # Rows before columns: a grid's second dimension ends at 65535.
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (m < m_size) & (n < N)
    WIDTH: tl.constexpr = 2 * N if PAIRED else N
    acc = tl.load(product + m * WIDTH + n, mask=mask, other=0.0).to(tl.float32)
    acc2 = tl.load(product + m * WIDTH + N + n, mask=mask, other=0.0).to(tl.float32) if PAIRED else acc
    EPILOGUE(acc, acc2, tl.minimum(m, m_size - 1), n, mask, t)


def _constexprs(problem: GemmProblem, epilogue: Any, pdl: bool) -> dict[str, Any]:
    columns = min(COLUMNS, triton.next_power_of_2(problem.n))
    rows = ROWS * COLUMNS // columns
    return {
        "N": problem.n,
        "PAIRED": problem.paired,
        "ROWS": rows,
        "COLUMNS": columns,
        "PDL": pdl,
        "EPILOGUE": epilogue,
    }


class VendorGemm:
    """A prepared call. A plain product goes to `t[0]`, [M, N] row-major; another to memory of its own, from which the
    epilogue takes it."""

    def __init__(self, epilogue: Any, config: Config, problem: GemmProblem, pdl: bool) -> None:
        self.config, self.problem, self.epilogue = config, problem, epilogue
        if not problem.plain:
            self.kernel = Kernel(vendor_epilogue_kernel, _constexprs(problem, epilogue, pdl), WARPS, pdl=pdl)

    def __call__(self, x: torch.Tensor, w: torch.Tensor, t: tuple) -> None:
        if torch.is_grad_enabled():
            # Like the kernels, which autograd never sees; `out=` refuses parameters otherwise.
            with torch.no_grad():
                self(x, w, t)
            return
        problem, m, wide = self.problem, x.shape[0], self.problem.w_columns
        columns = w.t() if problem.layout == "nk" else w
        if columns.shape[1] > wide:
            columns = columns[:, :wide]
        product = t[0] if problem.plain else empty_on(x.device)((m, wide), (wide, 1), x.dtype)
        torch.mm(x, columns, out=product)
        if not problem.plain:
            tile = self.kernel.constexprs
            self.kernel((ceil(m / tile["ROWS"]), ceil(problem.n / tile["COLUMNS"]), 1), product, m, t)


def prepare(epilogue: Any, config: Config, problem: GemmProblem, *, pdl: bool = False) -> VendorGemm:
    """Fix everything that does not change between calls.

    Args:
        epilogue: `@triton.jit` body `(acc, acc2, m, n, mask, t)`; not run where the problem is plain.
        config: from `choose`.
        problem: sizes and strides; `m` is only a hint.
        pdl: the epilogue's kernel takes part in programmatic dependent launch; cuBLAS does not.
    """
    return VendorGemm(epilogue, config, problem, pdl)


def compile_jobs(arch: int) -> Iterable[CompileJob]:
    """Yield the epilogue's kernel for a product and for a pair; cuBLAS comes compiled."""
    if arch < 90:
        return
    for paired in (False, True):
        problem = GemmProblem(512, 4096, 4096, torch.bfloat16, paired=paired, pair_offset=4096 if paired else 0)
        yield CompileJob(
            family="gemm_vendor",
            label=f"epilogue{' paired' if paired else ''} bf16",
            fn=vendor_epilogue_kernel,
            signature={"product": "*bf16", "m_size": "i32", "t": ("*bf16",)},
            constexprs=_constexprs(problem, sample(problem), pdl=True),
            num_warps=WARPS,
            num_stages=3,
            divisible=("product", "t"),
        )
