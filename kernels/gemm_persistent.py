"""Persistent GEMM: y[M, N] = epilogue(x[M, K] @ W) for many tokens, where the tensor cores are the cost.

Schedule: one program per multiprocessor walks over output tiles [BLOCK_M, BLOCK_N]; both operands arrive by TMA;
groups of `group_m` rows of tiles are walked column by column, so that a group's x tiles and the current W tile stay in
L2. `flatten` makes tile and depth loop one pipeline: the next tile's loads fly during the epilogue. In `runs` the
epilogue takes halves or quarters of the columns, each of which needs as much less shared memory. `tail_n` computes the
tiles that are left over from whole waves as narrower ones, where these then are one for each program at most. `held`
takes another kernel (gemm_held.py), in which the epilogue itself runs during the next tile.
Bytes: x and W once if a group fits in L2, y once. FLOPs: 2 * M * N * K per accumulator.
Paired problems (GLU) keep two accumulators of the same x tile, so neither half of the wide product is written; both
halves of W come as one tile of a three-dimensional view and are multiplied by one instruction (see gemm_tiles.py).
Source: grouped tile order from Triton's public matmul tutorial; persistence and flattening from its persistent one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from math import ceil
from operator import attrgetter
from typing import Any

import torch
import triton

from . import gemm_held
from .gemm import GemmProblem, Measured, in_bucket, reference, row_of, tma_obstacle, type_name, whole_heads
from .gemm_boxes import describe_x
from .gemm_jobs import job_configs, label, sample
from .gemm_persistent_table import BUCKETS, CONFIGS, EVIDENCE, Config, as_many_tiles, table_for
from .gemm_tiles import gemm_persistent_kernel, w_descriptor, w_descriptor_type
from .jobs import CompileJob
from .launch import Kernel
from .target import Target
from .tma import Descriptors, descriptor

__all__ = [
    "CONFIGS", "EVIDENCE", "Config", "choose", "compile_jobs", "estimate_us", "measurement", "prepare", "reference",
    "supports",
]  # fmt: skip


def supports(problem: GemmProblem) -> str | None:
    """Return why this family cannot do the problem, or None."""
    if problem.m <= (128 if problem.dtype.itemsize == 2 else 64):
        return f"{problem.m} tokens: reading W is the cost, and the families for few tokens do nothing else"
    if problem.dtype.itemsize == 1:
        return "it does not multiply eight-bit floats"
    if problem.scaled:
        return "it does not add up parts of rows' sums"
    if problem.dtype == torch.float32 and not problem.allow_tf32 and problem.paired:
        return "a pair of fp32 accumulators in IEEE precision spills registers"
    if problem.dtype == torch.float32 and not problem.allow_tf32 and problem.halves > 32:
        return f"heads of {2 * problem.halves} columns: a tile that wide in IEEE precision spills registers"
    return tma_obstacle(problem)


def choose(problem: GemmProblem, target: Target) -> tuple[Config, str]:
    """Return the config for the problem and why: the measured one, else the cheapest by `estimate_us`."""
    if target.interpreted:
        m, n, k = (max(16, triton.next_power_of_2(size)) for size in (problem.m, problem.n, problem.k))
        return Config(min(m, 128), min(n, 256), min(k, 256), 1, 4), "interpreter: few programs, large tiles"
    row = _row(problem, target)
    same = as_many_tiles(row, problem.m, TILE_ROWS)
    if same is not None and _holds_heads(problem, row[same].config):
        config, how = fitted(problem, row[same].config, target), ""
        if same != problem.m:
            how = f"; at {same} tokens, which fill as many tiles of {TILE_ROWS}"
        if config.held:
            how += "; less what the epilogue took, which is held until the next tile"
        elif config != row[same].config:
            how += f"; the epilogue is wider than the measured one: {config.runs} runs"
        return config, row[same].why(problem) + how
    known = list(_measured_at(problem, target))
    tried = known or list(_candidates(problem, target))
    config = min(tried, key=lambda c: estimate_us(problem, c, target))
    us = estimate_us(problem, config, target)
    if known:
        sources = "; ".join(dict.fromkeys(hit.source for hit in row.values()))
        return config, f"{us:.1f} us by the waves of what was measured at {', '.join(map(str, row))} ({sources})"
    return config, f"estimated {us:.1f} us, no measurement for this N and K"


def _holds_heads(problem: GemmProblem, config: Config) -> bool:
    """Whether the epilogue gets whole heads, where the problem has them."""
    narrowest = config.tail_n or config.block_n
    return whole_heads(problem, narrowest) and (not problem.halves or not config.extra_n)


def _row(problem: GemmProblem, target: Target) -> Mapping[int, Measured]:
    """What was measured for this N and K on this architecture."""
    return row_of(table_for(target), problem) if target.arch == 90 and not target.interpreted else {}


def measurement(problem: GemmProblem, target: Target) -> Measured | None:
    """Return what was measured for the problem's N and K at its m, or else in the bucket that holds it."""
    row = _row(problem, target)
    return row.get(problem.m) or in_bucket(row, BUCKETS, problem.m)


def _measured_at(problem: GemmProblem, target: Target) -> Mapping[Config, Sequence[int]]:
    """At which m each config was measured for this N and K, as the problem's epilogue needs it."""
    key = _ALL_BUT_M(problem)
    if (known := _MEASURED_AT.get((key, target))) is None:
        # Asked for every config at every size of a range; the number of tokens changes none of it.
        known = _MEASURED_AT[key, target] = {}
        for m, hit in _row(problem, target).items():
            if _holds_heads(problem, hit.config):
                known.setdefault(fitted(problem, hit.config, target), []).append(m)
    return known


# Whatever a rule may ask of a problem.
_ALL_BUT_M = attrgetter(*(field.name for field in fields(GemmProblem) if field.name != "m"))
_MEASURED_AT: dict[tuple[Any, ...], dict[Config, list[int]]] = {}

# bf16 FLOP/s by columns times rows of a tile, all 132 multiprocessors busy: medians of the timings behind CONFIGS at m
# up to 2048, less FIXED_US. A pair's tile counts both halves. Held against those timings without the table, what the
# estimate chooses is 3.9 % slower than the best config tried on average, 21 % at worst (8192x2048 paired, m = 128).
TILE_FLOPS = {64 * 64: 470e12, 64 * 128: 705e12, 128 * 128: 830e12, 128 * 192: 805e12, 128 * 256: 915e12}
# What is left of that where the work is long enough for the power limit: 8192 tokens ran at 660 to 720 TFLOP/s.
SUSTAINED_FLOPS = 700e12
MEASURED_SM_COUNT = 132
# What tiles are multiples of: sizes that fill as many of them take as long as one that was measured.
TILE_ROWS = 64
# fp32 in FMA units: 128 lanes, 2 FLOPs, 1.755 GHz (the boost clock of the data sheet), per multiprocessor.
SM_FLOPS_FP32 = 128 * 2 * 1.755e9
# Launch, first tiles and last epilogue: 64x64 tiles at N = K = 2048 took 6.0 us, 2.0 of it W's bytes, 1.1 arithmetic.
FIXED_US = 3.0


def estimate_us(problem: GemmProblem, config: Config, target: Target) -> float:
    """Estimate the time: waves of whole tiles at their rate, the bytes at the memory's, or the power limit, if more.

    What was measured for this N, K and config at another m counts by the waves it takes there and here.
    """
    resident = target.sm_count * config.programs_per_sm
    area = config.block_m * config.width * problem.accumulators
    if problem.dtype == torch.float32 and not problem.allow_tf32:
        rate = limit = SM_FLOPS_FP32 * target.sm_count
    else:
        share = target.sm_count / MEASURED_SM_COUNT * (1.0 if problem.dtype.itemsize == 2 else 0.5)
        best = max(TILE_FLOPS.values())
        rate = next((rate for known, rate in TILE_FLOPS.items() if area <= known), best) * share
        # A tile that feeds the tensor cores worse burns the same power for less.
        limit = SUSTAINED_FLOPS * rate / best
    wave_us = resident * 2 * area * problem.k / rate * 1e6
    row = _row(problem, target)
    same = as_many_tiles(row, problem.m, TILE_ROWS)
    if at := _measured_at(problem, target).get(config):
        if same is not None and same in at:
            return row[same].us
        nearest = min(at, key=lambda m: max(m, problem.m) / min(m, problem.m))
        wave_us = (row[nearest].us - FIXED_US) / _waves(nearest, problem, config, target)
    floor_us = max(problem.flops / limit, problem.bytes_moved / target.bandwidth_bytes_s) * 1e6
    # No config tried was faster for fewer tokens, or as many tiles, than the best of them, so none is for these.
    fewer_us = max((hit.us for m, hit in row.items() if m <= problem.m or m == same), default=0.0)
    return max(FIXED_US + max(_waves(problem.m, problem, config, target) * wave_us, floor_us), fewer_us)


# Time of narrower tiles, one a program, as a share of the wave that they spare, by the columns times rows of the tile
# that is cut (a pair's count twice) and into how many: medians of 125 timings on an H100 (2026-11-26) with and without
# them, of problems 2048 to 14336 deep. Of other tiles nothing is expected.
NARROWER = {(64 * 256, 2): 0.80, (64 * 256, 4): 0.65, (128 * 256, 2): 0.60, (128 * 256, 4): 0.46}


def _waves(m: int, problem: GemmProblem, config: Config, target: Target) -> float:
    """How often every multiprocessor computes a tile, the last time perhaps not all, or all of them a narrower one."""
    resident, split = target.sm_count * config.programs_per_sm, config.tail_split
    waves, rest = divmod(ceil(m / config.block_m) * ceil(problem.n / config.width), resident)
    area = config.block_m * config.width * problem.accumulators
    last = NARROWER.get((area, split), 1.0) if rest * split <= resident else 1.0
    return waves + (last if rest else 0.0)


def starts_early(problem: GemmProblem, config: Config) -> bool:
    """Whether to launch with programmatic dependent launch: programs then take multiprocessors in the order in which
    the kernel before leaves them, and neighbours that read the same tile no longer sit side by side, where the L2 would
    answer both at once. Tiles of 128x256 read little enough per FLOP not to mind.

    Measured as a piece's replay (NVIDIA H100, torch 2.11, triton 3.6, bf16, 2026-11-25), all kernels started early and
    these not: 8B shape at 256, 333, 512, 2048 tokens 245, 445, 447, 1305 us and 214, 313, 368, 1318 us.
    """
    return config.block_m * config.width * problem.accumulators >= 128 * 256


def smem_bytes(problem: GemmProblem, config: Config) -> int:
    """Shared memory of the pipeline and, where the next tile's loads fly meanwhile, of the epilogue's transposition."""
    rows = config.block_m + problem.accumulators * config.width
    pipeline = config.stages * rows * config.block_k * problem.dtype.itemsize + 1024
    if config.held:
        # 4 bytes a thread and register, of four registers at a time.
        return pipeline + 16 * 32 * config.warps
    if not config.flatten:
        return pipeline
    # As compiled for a 128x256 tile: 32 KB for 2-byte results, of the whole tile or of either half; 4-byte ones whole.
    area = config.block_m * max(config.block_n, config.extra_n) // config.runs
    return pipeline + (32768 if (problem.epilogue_itemsize or problem.dtype.itemsize) == 2 else area * 4)


def held(problem: GemmProblem, config: Config, target: Target) -> bool:
    """Whether the config's epilogue runs while the next tile is multiplied: for whole tiles beside whose accumulators
    what is held fits. Long formulas then keep numbers in local memory, as they do without it.

    Measured product by product, for the shapes of 8B, 1B and Qwen3-8B (NVIDIA H200, torch 2.11, triton 3.6, bf16,
    2026-11-27): 0.968 to 0.999 of the time otherwise from 1000 to 8192 tokens (once 1.044, where another run had
    0.986), 0.953 to 1.000 from 160 to 768. On an H100 it was not timed.
    """
    area = config.block_m * config.block_n * problem.accumulators
    tile = config.block_m == 16 * config.warps == 128 and area in (128 * 128, 128 * 256)
    whole = not (config.extra_n or config.tail_n) and config.programs_per_sm == 1
    hopper = target.arch == 90 and not target.interpreted
    return tile and whole and hopper and gemm_held.obstacle(problem) is None


def fitted(problem: GemmProblem, config: Config, target: Target) -> Config:
    """The config as the problem's epilogue needs it: in runs that keep registers, with as many stages as then fit; or
    held, with all stages that fit.

    Compiled for sm_90 with a residual added and fp32 stored, a 128x256 tile keeps 24, 488 and 32 bytes a thread in
    local memory in 1, 2 and 4 runs; only the last leaves room for four stages when flattened.
    """
    if held(problem, config, target):
        config = replace(config, held=True, flatten=True, runs=1, stages=gemm_held.MOST_STAGES)
    elif (problem.epilogue_itemsize or problem.dtype.itemsize) > 2 and config.block_m * config.block_n >= 128 * 256:
        config = replace(config, runs=4)
    elif problem.halves and config.block_m * config.block_n >= 128 * 256:
        # A rotation in one part keeps 56 bytes a thread in local memory.
        config = replace(config, runs=max(config.runs, 2))
    if problem.summed:
        # A part of the epilogue sums whole heads.
        config = replace(config, runs=min(config.runs, config.block_n // problem.summed))
    while smem_bytes(problem, config) > target.smem_bytes and config.stages > 2:
        config = replace(config, stages=config.stages - 1)
    return config


def _candidates(problem: GemmProblem, target: Target) -> Iterable[Config]:
    """The tiles that won somewhere in CONFIGS, where they fit."""
    if problem.dtype == torch.float32 and not problem.allow_tf32:
        # FMA units from registers: larger tiles spill.
        yield Config(64, 64, 32, 2, 8)
        return
    if problem.paired:
        large = Config(128, 128, 64, 4, 8, flatten=True, runs=2)
        tiles = [Config(64, 32, 128, 6, 4), Config(64, 64, 64, 8, 4), Config(128, 64, 64, 6, 8), large]
        tiles += [replace(large, tail_n=narrow) for narrow in (64, 32)]
    else:
        large = Config(128, 256, 64, 4, 8, flatten=True, runs=2)
        tiles = [Config(64, 64, 128, 6, 4), Config(64, 128, 64, 8, 4), Config(128, 128, 64, 6, 8)]
        tiles += [Config(128, 128, 64, 5, 8, extra_n=64), large]
        tiles += [replace(large, runs=1, tail_n=narrow) for narrow in (128, 64)]
    for config in tiles:
        config = replace(config, block_k=config.block_k * 2 // problem.dtype.itemsize)
        if not _holds_heads(problem, config):
            continue
        config = fitted(problem, config, target)
        if smem_bytes(problem, config) <= target.smem_bytes:
            yield config


def _constexprs(problem: GemmProblem, config: Config, epilogue: Any, pdl: bool) -> dict[str, Any]:
    return {
        "N": problem.n,
        "K": problem.k,
        "PAIR_OFFSET": problem.pair_offset if problem.paired else 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "EXTRA_N": config.extra_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
        "TAIL_N": config.tail_n,
        "GROUP_M": config.group_m,
        "FLATTEN": config.flatten,
        "RUNS": config.runs,
        "HALVES": problem.halves,
        "PAIRED": problem.paired,
        "KN": problem.layout == "kn",
        "PDL": pdl,
        "PRECISION": problem.precision,
        "EPILOGUE": epilogue,
    }


class PersistentGemm:
    """A prepared launch; call it with x [M, K], W in the problem's layout and the epilogue's tensors."""

    def __init__(self, epilogue: Any, config: Config, problem: GemmProblem, pdl: bool) -> None:
        assert not (problem.halves and config.extra_n), "columns beside a tile are of no whole head"
        assert not (config.tail_n and config.extra_n), "either columns beside a tile or narrower tiles at the end"
        assert not config.tail_n or config.block_n % config.tail_n == 0, "parts of a tile are equal"
        self.config, self.problem, self.epilogue = config, problem, epilogue
        self._tiles_n = ceil(problem.n / config.width)
        early = pdl and starts_early(problem, config)
        if config.held:
            made = gemm_held.constexprs(problem, config, epilogue, pdl)
            self.kernel = Kernel(gemm_held.gemm_held_kernel, made, num_warps=config.warps, pdl=early)
            self._describe_x = Descriptors(lambda x: describe_x(x, [config.block_m, config.block_k]))
            self._describe_w = Descriptors(lambda w: gemm_held.describe_w(w, problem, config))
            return
        self.kernel = Kernel(
            gemm_persistent_kernel,
            _constexprs(problem, config, epilogue, pdl),
            num_warps=config.warps,
            num_stages=config.stages,
            pdl=early,
        )
        self._describe_x = Descriptors(lambda x: descriptor(x, [config.block_m, config.block_k], "x"))
        self._describe_w = Descriptors(lambda w: w_descriptor(w, problem, config.block_n, config.block_k))
        # One of its own also where it is not used: a descriptor is encoded for one parameter.
        self._describe_second = Descriptors(lambda w: w_descriptor(w, problem, config.second_n, config.block_k))

    def arguments(self, x: torch.Tensor, w: torch.Tensor, t: tuple) -> tuple[tuple[int, int, int], tuple]:
        """Return grid and kernel arguments, as the next call would launch them."""
        config, m = self.config, x.shape[0]
        tiles = ceil(m / config.block_m) * self._tiles_n * config.tail_split
        resident = _sm_count(x.device) * config.programs_per_sm
        described = [self._describe_x(x), self._describe_w(w)]
        if not config.held:
            described.append(self._describe_second(w))
        return (min(tiles, resident), 1, 1), (*described, m, t)

    def __call__(self, x: torch.Tensor, w: torch.Tensor, t: tuple) -> None:
        if x.shape[0] == 0:
            return
        grid, args = self.arguments(x, w, t)
        self.kernel(grid, *args)


@cache
def _sm_count(device: torch.device) -> int:
    """Asked at every launch, where no driver should be."""
    return Target.current(device).sm_count


def prepare(epilogue: Any, config: Config, problem: GemmProblem, *, pdl: bool = False) -> PersistentGemm:
    """Fix everything that does not change between calls.

    Args:
        epilogue: `@triton.jit` body `(acc, acc2, m, n, mask, t)`; accumulators are [BLOCK_M, BLOCK_N / runs], where
            held half as many rows, and columns as `gemm_held.parts` says.
        config: from `choose`.
        problem: sizes and strides; `m` is only a hint.
        pdl: let the successor start before the first epilogue; start before the predecessor has ended and wait for it
            in the kernel, where `starts_early` says that this pays.
    """
    return PersistentGemm(epilogue, config, problem, pdl)


def compile_jobs(arch: int) -> Iterable[CompileJob]:
    """Yield one job for every config that `choose` gives for a measured or a sample problem, with sample epilogues; and
    one with the epilogue held, where it may be."""
    target = Target.named("h200" if arch == 90 else "b200")
    configs: dict[tuple[GemmProblem, Config], None] = {}
    for problem, config in job_configs(CONFIGS, BUCKETS, supports, choose, arch):
        configs[problem, config] = None
        rounded = replace(problem, rounds=True)
        if held(rounded, config, target):
            configs[rounded, fitted(rounded, config, target)] = None
    for problem, config in configs:
        yield _job(problem, config)


def _job(problem: GemmProblem, config: Config) -> CompileJob:
    dtype = type_name(problem.dtype)
    signature: dict[str, Any] = {
        "x_desc": f"tensordesc<{dtype}[{config.block_m},{config.block_k}]>",
        "w_desc": w_descriptor_type(problem, config.block_n, config.block_k, dtype),
        "second_desc": w_descriptor_type(problem, config.second_n, config.block_k, dtype),
        "m_size": "i32",
        "t": (f"*{dtype}",),
    }
    constexprs = gemm_held.constexprs if config.held else _constexprs
    return CompileJob(
        family="gemm_persistent",
        label=f"{label(problem)}: {config}",
        fn=gemm_held.gemm_held_kernel if config.held else gemm_persistent_kernel,
        signature=gemm_held.signature(problem, config) if config.held else signature,
        constexprs=constexprs(problem, config, sample(problem), pdl=True),
        num_warps=config.warps,
        num_stages=config.stages,
        divisible=("t",),
    )
