"""Measure GEMM configs on this GPU: compile in parallel, check against fp64, time what survives, print the table.

    python -m terrazzo.tools.tune_gemm                                    every shape and size below
    python -m terrazzo.tools.tune_gemm --shapes 4096x4096,14336x4096p     some shapes (N x K, p: paired)
    python -m terrazzo.tools.tune_gemm --families gemm_persistent --m 256,512 --json out.jsonl
    … --families gemm_persistent,gemm_vendor --m 333                      beside cuBLAS with the epilogue after it
    … --known --m 136,160,192,320                                         only what the table holds for N and K

A time is that of one GEMM within a CUDA graph of many, each on its own copy of W, so that L2 holds no W it reads;
kernels wait for one another with programmatic dependent launch, as in a plan. cuBLAS (`F.linear`) runs in the same
harness, without the epilogue; ours includes it (SiLU·mul for pairs). A config that errs by more than twice what cuBLAS
does is reported and never timed, nor is one that is expected to take over 1.3 times as long as the best (`LIKELY`). The
last lines are rows for gemm_persistent's table; exit status 1 when any config was wrong.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import terrazzo.tools.device as place  # isort: skip  # before Triton is imported, whose interpreter it may choose
import torch
import triton
import triton.language as tl

from terrazzo.kernels import gemm_persistent, gemm_vendor
from terrazzo.kernels.gemm import GemmProblem, reference, row_of, table_columns
from terrazzo.kernels.target import Target
from terrazzo.tools.command import exit_status, parser_of, sizes, writable

FAMILIES = ("gemm_persistent", "gemm_vendor")
# The configs to try for a problem.
Space = Callable[[GemmProblem], Iterable[gemm_persistent.Config]]
# Projections of Llama-3.1-8B, Llama-3.2-1B and Qwen3-8B, as (N, K, paired).
SHAPES = (
    (4096, 4096, False),
    (6144, 4096, False),
    (14336, 4096, True),
    (4096, 14336, False),
    (2048, 2048, False),
    (3072, 2048, False),
    (8192, 2048, True),
    (2048, 8192, False),
    (12288, 4096, True),
    (4096, 12288, False),
)
# What a config is expected to take, at most, of what the best is expected to. Of 110 problems timed on an H100 the best
# config was estimated at 1.26 times the best estimate at most, by estimates that knew the table; without it one in a
# hundred is farther away.
LIKELY = 1.3
# What the copies of W must exceed together: five times an H200's 60 MB of L2.
ROTATION_BYTES = 300_000_000
# First and last rows compared with the oracle: fp64 products of the largest sizes would take longer than the tuning.
CHECKED_ROWS = 256


@triton.jit
def store_body(acc, acc2, m, n, mask, t):
    tl.store(t[0] + m * t[1] + n, acc.to(t[0].dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_body(acc, acc2, m, n, mask, t):
    dtype: tl.constexpr = t[0].dtype.element_ty
    gate = acc.to(dtype).to(tl.float32)
    act = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(t[0] + m * t[1] + n, (act * acc2.to(dtype).to(tl.float32)).to(dtype), mask=mask)


@dataclass(frozen=True)
class Candidate:
    """One config of one family for one problem."""

    family: str
    problem: GemmProblem
    config: Any

    def prepare(self) -> Any:
        body = silu_mul_body if self.problem.paired else store_body
        family = importlib.import_module(f"terrazzo.kernels.{self.family}")
        return family.prepare(body, self.config, self.problem, pdl=True)

    def binary(self) -> tuple:
        """What the compiled code depends on: m does not reach it."""
        return self.family, replace(self.problem, m=0), self.config


def persistent_space(problem: GemmProblem) -> Iterable[gemm_persistent.Config]:
    """Tiles that the tensor cores like, with the pipelines that fit in 227 KB; a pair's tile is twice as wide."""
    config, half = gemm_persistent.Config, 2 if problem.paired else 1
    if problem.m <= 512:
        yield config(64, 128 // half, 64, 4, 4, programs_per_sm=2)
        yield config(64, 128 // half, 64, 8, 4)
        yield config(64, 128 // half, 128, 4, 4)
        yield config(64, 64 // half, 128, 6, 4)
        yield config(128, 64, 64, 4, 4, programs_per_sm=2)
    for flatten, runs in ((False, 1), (True, 1), (True, 2)):
        yield config(128, 256 // half, 64, 3, 8, flatten=flatten, runs=runs)
        yield config(128, 256 // half, 64, 4, 8, flatten=flatten, runs=runs)
    yield config(128, 256 // half, 64, 3, 8, group_m=16)
    yield config(128, 256 // half, 64, 3, 8, group_m=16, flatten=True)
    yield config(256, 128 // half, 64, 4, 8)
    yield config(256, 128 // half, 64, 4, 8, flatten=True)
    yield config(128, 128 // half, 64, 4, 4)
    yield config(128, 128 // half, 64, 6, 8)
    yield config(128, 128 // half, 64, 5, 8, flatten=True)
    yield config(128, 128 // half, 64, 3, 8, programs_per_sm=2)
    yield config(64, 256 // half, 64, 5, 4)
    # Narrower tiles in a last wave that would be mostly empty, and other widths.
    for narrow in (64 // half, 128 // half):
        yield config(128, 256 // half, 64, 4, 8, tail_n=narrow)
        yield config(128, 256 // half, 64, 4, 8, flatten=True, runs=half, tail_n=narrow)
        yield config(64, 256 // half, 64, 5, 4, tail_n=narrow)
    yield config(128, 128 // half, 64, 6, 8, tail_n=64 // half)
    if problem.paired:
        for warps, rows in ((4, 64), (8, 128)):
            yield config(rows, 128, 64, 4, warps, extra_n=16)
            yield config(rows, 64, 64, 5, warps, extra_n=16)
            yield config(rows, 64, 64, 4, warps, extra_n=32)
        yield config(64, 128, 64, 4, 4, extra_n=32)
        yield config(128, 128, 64, 3, 8, extra_n=16, flatten=True, runs=2)
        yield config(128, 64, 64, 4, 8, extra_n=32, flatten=True)
    else:
        yield config(128, 128, 64, 4, 8, extra_n=64)
        yield config(128, 128, 64, 5, 8, extra_n=64)
        yield config(128, 128, 64, 4, 8, extra_n=64, flatten=True)
        yield config(64, 128, 64, 6, 4, extra_n=64)
        yield config(64, 128, 64, 4, 4, extra_n=64, programs_per_sm=2)
        yield config(64, 64, 128, 4, 4, extra_n=32)
        yield config(64, 64, 64, 8, 4, extra_n=32)
        yield config(64, 128, 64, 7, 4, extra_n=32)
        yield config(64, 256, 64, 4, 4, extra_n=32)
        yield config(64, 256, 64, 4, 4, extra_n=64)
        yield config(128, 64, 64, 7, 8, extra_n=32)
        yield config(128, 128, 64, 5, 8, extra_n=32)
        yield config(128, 128, 64, 5, 8, extra_n=32, flatten=True)
        yield config(128, 256, 64, 4, 8, extra_n=32)


def known_space(problem: GemmProblem) -> Iterable[gemm_persistent.Config]:
    """What was best for the problem's N and K at some m, on some device."""
    rows = (row_of(table, problem) for table in gemm_persistent.CONFIGS.values())
    yield from dict.fromkeys(hit.config for row in rows for hit in row.values())


def known_or_new(problem: GemmProblem) -> Iterable[gemm_persistent.Config]:
    """Both of those, each config once."""
    return dict.fromkeys((*persistent_space(problem), *known_space(problem)))


def as_planned(
    problem: GemmProblem, space: Iterable[gemm_persistent.Config], target: Target
) -> Iterable[gemm_persistent.Config]:
    """Configs as a plan for the target would run them, each once."""
    return dict.fromkeys(gemm_persistent.fitted(problem, config, target) for config in space)


def likely(problem: GemmProblem, space: Iterable[gemm_persistent.Config]) -> list[gemm_persistent.Config]:
    """Those whose estimate is within `LIKELY` of the best one's, as plans would take them."""
    target = Target.current()
    configs = as_planned(problem, space, target)
    estimates = {config: gemm_persistent.estimate_us(problem, config, target) for config in configs}
    return [config for config, us in estimates.items() if us <= LIKELY * min(estimates.values())]


def candidates(
    families: Sequence[str], shapes: Sequence[tuple], sizes: Sequence[int], space: Space = known_or_new
) -> list[Candidate]:
    """Every candidate of every problem, by problem."""
    found = []
    for n, k, paired in shapes:
        for m in sizes:
            offset = n if paired else 0
            problem = GemmProblem(m, n, k, torch.bfloat16, paired=paired, pair_offset=offset, rounds=True)
            if "gemm_persistent" in families and gemm_persistent.supports(problem) is None:
                found += [Candidate("gemm_persistent", problem, config) for config in likely(problem, space(problem))]
            if "gemm_vendor" in families and gemm_vendor.supports(problem) is None:
                found.append(Candidate("gemm_vendor", problem, gemm_vendor.Config()))
    return found


def compile_one(candidate: Candidate) -> str | None:
    """Compile in a worker, so that the main process finds the binary in Triton's cache; the error if it does not."""
    problem = candidate.problem
    try:
        x = torch.empty(problem.m, problem.k, dtype=problem.dtype, device="cuda")
        w = torch.empty(problem.w_shape, dtype=problem.dtype, device="cuda")
        launch = candidate.prepare()
        if candidate.family == "gemm_vendor":
            return None  # its one small kernel compiles at the first call
        launch.kernel.precompile(*launch.arguments(x, w, (x, problem.n))[1])
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:160] if str(error).strip() else ''}"
    return None


def compile_all(found: Sequence[Candidate], workers: int) -> dict[tuple, str | None]:
    """Compile each binary once; returns its error or None."""
    binaries = {candidate.binary(): candidate for candidate in found}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return dict(zip(binaries, pool.map(compile_one, binaries.values(), chunksize=4), strict=True))


class Bench:
    """Operands of one problem: copies of W that L2 cannot hold, the oracle, and what cuBLAS makes of it."""

    def __init__(self, problem: GemmProblem) -> None:
        self.problem = problem
        copies = max(2, -(-ROTATION_BYTES // problem.weight_bytes))
        self.x = torch.randn(problem.m, problem.k, device="cuda").to(problem.dtype)
        scale = problem.k**-0.5
        first = (torch.randn(problem.w_shape, device="cuda") * scale).to(problem.dtype)
        self.ws = [first, *(first.roll(i + 1, 0) for i in range(copies - 1))]
        self.y = torch.empty(problem.m, problem.n, dtype=problem.dtype, device="cuda")
        # Long graphs, so that starting one does not count; large products are long by themselves.
        self.rounds = max(1, (64 if problem.weight_bytes < 5e7 else 16) // copies) if problem.flops < 1e11 else 1
        ends = range(min(problem.m, CHECKED_ROWS)), range(max(0, problem.m - CHECKED_ROWS), problem.m)
        self.checked = torch.tensor(sorted({*ends[0], *ends[1]}), device="cuda")
        rows = self.x[self.checked]
        glu = (lambda gate, up: torch.nn.functional.silu(gate) * up) if problem.paired else None
        self.oracle = reference(problem, rows.double(), self.ws[0].double(), glu)
        eager = reference(problem, rows, self.ws[0], glu)
        self.bound = 2 * (eager.double() - self.oracle).abs().max().item() + 2**-8 * self.oracle.abs().max().item()
        self.vendor = self.graph(lambda w: torch.nn.functional.linear(self.x, w))

    def error(self, launch: Any) -> float:
        """Largest error against the oracle; NaN where an element was not written."""
        self.y.fill_(float("nan"))
        launch(self.x, self.ws[0], (self.y, self.problem.n))
        if not bool(self.y.isfinite().all()):
            return float("nan")
        return (self.y[self.checked].double() - self.oracle).abs().max().item()

    def graph(self, call: Any) -> torch.cuda.CUDAGraph:
        """A graph of one call for every copy of W."""
        call(self.ws[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for w in self.ws * self.rounds:
                call(w)
        return graph

    def duel(self, launch: Any, replays: int = 8) -> tuple[float, float]:
        """Median times of one call, ours and cuBLAS's, taken in turns: the clock follows the load of the moment."""
        t = (self.y, self.problem.n)
        ours = self.graph(lambda w: launch(self.x, w, t))
        turns = [ours, self.vendor] * (replays + 1)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(turns) + 1)]
        events[0].record()
        for graph, event in zip(turns, events[1:], strict=True):
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
        calls = len(self.ws) * self.rounds
        # The first turn of each warms up.
        return statistics.median(times[2::2]) * 1e3 / calls, statistics.median(times[3::2]) * 1e3 / calls


def measure(candidate: Candidate, bench: Bench, compiled: str | None) -> dict[str, Any]:
    """One line of the journal: the time, or why there is none."""
    problem = candidate.problem
    line = {"family": candidate.family, "m": problem.m, "n": problem.n, "k": problem.k, "paired": problem.paired}
    line["config"] = asdict(candidate.config)
    if compiled is not None:
        return line | {"failed": compiled}
    try:
        launch = candidate.prepare()
        error = bench.error(launch)
        if not error <= bench.bound:
            return line | {"wrong": error, "bound": bench.bound}
        us, vendor_us = bench.duel(launch)
        return line | {"us": round(us, 2), "vendor_us": round(vendor_us, 2), "error": error}
    except Exception as failure:
        return line | {"failed": f"{type(failure).__name__}: {str(failure)[:160]}"}


def tune(found: Sequence[Candidate], workers: int, write: Any, deadline: float) -> list[dict[str, Any]]:
    """Compile and time everything; returns all lines."""
    compiled, lines = compile_all(found, workers), []
    for problem in dict.fromkeys(candidate.problem for candidate in found):
        if time.monotonic() > deadline:
            break
        bench = Bench(problem)
        for candidate in found:
            if candidate.problem == problem:
                lines.append(measure(candidate, bench, compiled[candidate.binary()]))
                write(lines[-1])
    return lines


def ratio(line: dict[str, Any]) -> float:
    return line["us"] / line["vendor_us"]


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The best of ours for each shape and size, as rows of gemm_persistent's table; cuBLAS has nothing to choose."""
    best: dict[tuple, dict[str, Any]] = {}
    for line in lines:
        key = (line["n"], line["k"], line["paired"], line["m"])
        if line["family"] == "gemm_persistent" and "us" in line and (key not in best or ratio(line) < ratio(best[key])):
            best[key] = line
    names = table_columns(gemm_persistent.Config)
    return [
        f"{n} {k} {'pair' if paired else 'one'} {m} {' '.join(str(int(line['config'][name])) for name in names)} "
        f"{line['us']:.1f} {line['vendor_us']:.1f}"
        for (n, k, paired, m), line in sorted(best.items())
    ]


def shapes(text: str) -> list[tuple[int, int, bool]]:
    """Comma-separated NxK, with p for paired, as the `type` of an argument."""
    found = [re.fullmatch(r"(\d+)x(\d+)(p?)", part) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of shapes: NxK, with p for paired")
    return [(int(match[1]), int(match[2]), bool(match[3])) for match in found if match]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("tune_gemm", __doc__)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--shapes", default=SHAPES, type=shapes, help="NxK, with p for paired; default: SHAPES")
    parser.add_argument("--m", default="192,256,512,1024,2048,8192", type=sizes)
    parser.add_argument("--known", action="store_true", help="only configs that the table holds for N and K")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--budget-s", type=float, default=3600, help="start no further problem after so many seconds")
    parser.add_argument("--json", help="write every measurement there, one JSON object a line")
    options = parser.parse_args(arguments)
    if unknown := set(options.families.split(",")) - set(FAMILIES):
        parser.error(f"no configs of {', '.join(sorted(unknown))} are tried here; there are {', '.join(FAMILIES)}")
    writable(options.json, screen=False)
    place.timing()
    deadline = time.monotonic() + options.budget_s
    space = known_space if options.known else known_or_new
    found = candidates(options.families.split(","), options.shapes, options.m, space)
    with open(options.json or os.devnull, "w") as journal:

        def write(line: dict[str, Any]) -> None:
            journal.write(json.dumps(line) + "\n")
            journal.flush()

        lines = tune(found, options.workers, write, deadline)
    print("\n".join(table(lines)))
    wrong = [line for line in lines if "wrong" in line]
    failed = [line for line in lines if "failed" in line]
    print(f"{len(lines)} measured, {len(failed)} failed, {len(wrong)} wrong")
    for line in (*wrong[:5], *failed[:5]):
        print(json.dumps(line))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
