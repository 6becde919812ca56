"""What the TMA families give to be compiled ahead of time: problems, names for them, and sample epilogues."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from .functions import silu, store_sums, sum_of_heads
from .gemm import GemmProblem, Table, part_width, type_name
from .target import Target


def job_configs(
    tables: Mapping[str, Table],
    buckets: tuple[int, ...],
    supports: Callable[..., Any],
    choose: Callable[..., Any],
    arch: int,
) -> Iterable[tuple[GemmProblem, Any]]:
    """Yield a TMA family's problems and configs to compile: all that any device's table gives, and one per layout,
    dtype and kind."""
    if arch < 90:
        return
    # Each device takes its own rows.
    asked = [
        (measured_problem(m, *key), Target.named("b200" if arch >= 100 else name))
        for name, table in tables.items()
        for key, row in table.items()
        for m in row
    ]
    problems = []
    kinds = ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False), (torch.float8_e4m3fn, False))
    for m, layout, paired, (dtype, allow_tf32) in product(buckets, ("nk", "kn"), (False, True), kinds):
        offset = 5120 if paired else 0
        problems.append(GemmProblem(m, 5120, 3584, dtype, layout, paired, offset, allow_tf32=allow_tf32))
    for m, (n, k, halves) in product(buckets, ((6144, 4096, 64), (3072, 2048, 32))):
        problems.append(GemmProblem(m, n, k, torch.bfloat16, halves=halves))
        problems.append(replace(problems[-1], summed=2 * halves))
    asked += [(problem, Target.named("b200" if arch >= 100 else "h200")) for problem in problems]
    yield from dict.fromkeys((p, choose(p, target)[0]) for p, target in asked if supports(p) is None)


def measured_problem(m: int, n: int, k: int, kind: str) -> GemmProblem:
    """A problem that takes a row of a table."""
    one = GemmProblem(m, n, k, torch.bfloat16)
    if kind == "pair":
        return replace(one, paired=True, pair_offset=n)
    if kind in ("head", "norm"):
        half = 64 if n % 128 == 0 else 32
        return replace(one, halves=half, summed=2 * half if kind == "norm" else 0)
    return replace(one, summed=part_width(m, n) if kind == "sum" else 0)


def label(problem: GemmProblem) -> str:
    """Name a problem in a few characters; with its config unique among `job_configs`."""
    dtype = "tf32" if problem.allow_tf32 else type_name(problem.dtype)
    kind = " paired" if problem.paired else f" halves {problem.halves}" if problem.halves else ""
    kind += (" normed" if problem.halves else f" parts of {problem.summed}") if problem.summed else ""
    return f"{problem.n}x{problem.k} {problem.layout}{kind} {dtype} m<={problem.m}"


def sample(problem: GemmProblem) -> Any:
    """The epilogue that a job is compiled with."""
    if problem.summed:
        return norm_sample if problem.halves else SUMS[problem.summed]
    return silu_mul_sample if problem.paired or problem.halves else store_sample


@triton.jit
def store_sample(acc, acc2, m, n, mask, t):
    """The smallest epilogue: the accumulator, rounded, into a dense [M, 4096] matrix. Compile jobs use it."""
    tl.store(t[0] + m.to(tl.int64) * 4096 + n, acc.to(t[0].dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_sample(acc, acc2, m, n, mask, t):
    """The paired sample: silu(acc) * acc2, rounded where separate kernels would, into a dense [M, 4096] matrix."""
    dtype: tl.constexpr = t[0].dtype.element_ty
    gate = acc.to(dtype).to(tl.float32)
    up = acc2.to(dtype).to(tl.float32)
    act = silu(gate).to(dtype).to(tl.float32)
    tl.store(t[0] + m.to(tl.int64) * 4096 + n, (act * up).to(dtype), mask=mask)


@triton.jit
def _sums_sample(acc, m, n, mask, t, WIDTH: tl.constexpr):
    """The sample of parts of 4096 columns: the sums, and over their memory the accumulator."""
    PARTS: tl.constexpr = 4096 // WIDTH
    store_sums(t[0] + m.to(tl.int64) * PARTS, acc, n, mask, WIDTH, PARTS)
    store_sample(acc, acc, m, n, mask, t)


@triton.jit
def sums_of_32_sample(acc, acc2, m, n, mask, t):
    _sums_sample(acc, m, n, mask, t, 32)


@triton.jit
def sums_of_64_sample(acc, acc2, m, n, mask, t):
    _sums_sample(acc, m, n, mask, t, 64)


@triton.jit
def sums_of_128_sample(acc, acc2, m, n, mask, t):
    _sums_sample(acc, m, n, mask, t, 128)


SUMS = {32: sums_of_32_sample, 64: sums_of_64_sample, 128: sums_of_128_sample}


@triton.jit
def norm_sample(acc, acc2, m, n, mask, t):
    """The sample of normed heads: each divided by its root mean square, as if a tile held one, and gated."""
    HALF: tl.constexpr = n.shape[0] if n.shape[0] > 1 else n.shape[1]
    scale = tl.rsqrt(sum_of_heads(acc * acc + acc2 * acc2, n, HALF) / (2 * HALF) + 1e-6)
    silu_mul_sample(acc * scale, acc2 * scale, m, n, mask, t)
