"""Times norm, RoPE, SiLU·mul and gather over a few configs each, against the bytes they must move.

    python tools/bench_rows.py [--json FILE] [--only norm,rope,pointwise,gather]

Every config is checked against the family's reference before it is timed; a wrong one ends the run. Times are medians
of CUDA graph replays of a chain of launches. Problems larger than the L2 rotate through buffers; small ones stay in
it, as they do between the kernels of a layer. `floor` is bytes over the bandwidth of a large copy measured first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

from terrazzo.kernels import gather, norm, pointwise, rope
from terrazzo.kernels.segments import Problem
from terrazzo.kernels.target import Target
from terrazzo.tools.command import exit_status, writable
from terrazzo.tools.device import timing

DTYPE = torch.bfloat16
LAUNCHES = 40
REPLAYS = 7


@triton.jit
def add_rms_norm(SEGMENT: tl.constexpr, row, col, mask, t):
    """t: x, residual, weight, sum, out, cols."""
    at = row * t[5] + col
    x = tl.load(t[0] + at, mask=mask, other=0.0).to(tl.float32) + tl.load(t[1] + at, mask=mask, other=0.0).to(
        tl.float32
    )
    tl.store(t[3] + at, x.to(t[3].dtype.element_ty), mask=mask)
    x = x.to(t[3].dtype.element_ty).to(tl.float32)
    weight = tl.load(t[2] + col, mask=col < t[5], other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / t[5] + 1e-5)
    tl.store(t[4] + at, (x * scale * weight).to(t[4].dtype.element_ty), mask=mask)


@triton.jit
def silu_mul(SEGMENT: tl.constexpr, row, col, mask, t):
    """t: gate and up side by side, out, cols."""
    gate = tl.load(t[0] + row * 2 * t[2] + col, mask=mask).to(tl.float32)
    up = tl.load(t[0] + row * 2 * t[2] + t[2] + col, mask=mask).to(tl.float32)
    tl.store(t[1] + row * t[2] + col, (gate / (1 + tl.exp(-gate)) * up).to(t[1].dtype.element_ty), mask=mask)


@dataclass
class Case:
    """One problem of one family with the configs to try.

    Args:
        family: module of `terrazzo.kernels`.
        label: the problem in a few characters.
        problem: for `choose`.
        body: the family's body.
        configs: what to time beside the family's own choice.
        inputs: makes one set of the body's arguments.
        outputs: those of them to poison and to compare.
        expected: the right outputs for one set of arguments.
    """

    family: Any
    label: str
    problem: Problem
    body: Any
    configs: list[Any]
    inputs: Callable[[], tuple]
    outputs: tuple[int, ...]
    expected: Callable[[tuple], list[torch.Tensor]]
    sets: list[tuple] = field(default_factory=list)


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def norm_cases() -> Iterator[Case]:
    """Residual + RMSNorm: three tensors read or written per element besides the output, so 8 bytes."""
    for cols in (2048, 4096):
        for rows in (1, 16, 64, 128, 2048, 8192):
            configs = [norm.Config(1, cols, warps) for warps in (2, 4, 8, 16)] + [norm.Config(2, cols, 8)]

            def inputs(rows: int = rows, cols: int = cols) -> tuple:
                return _randn(rows, cols), _randn(rows, cols), _randn(cols), *_randn(2, rows, cols), cols

            def expected(t: tuple) -> list[torch.Tensor]:
                return [t[0] + t[1], norm.reference(t[0], t[2], 1e-5, t[1])]

            problem = Problem((rows,), cols, DTYPE, 8)
            yield Case(norm, f"{rows}x{cols}", problem, add_rms_norm, configs, inputs, (3, 4), expected)


def rope_cases() -> Iterator[Case]:
    """neox over 32 q and 8 k heads of 128."""
    for tokens in (1, 16, 64, 2048, 8192):
        shapes = ((1, 1), (2, 1), (4, 2), (8, 2), (8, 4), (16, 4), (16, 8), (32, 8))
        configs = [rope.Config(r, 128, warps) for r, warps in shapes]

        def inputs(tokens: int = tokens) -> tuple:
            q, k = _randn(tokens, 32, 128), _randn(tokens, 8, 128)
            return (q, k, _randn(tokens, 64), _randn(tokens, 64), torch.empty_like(q), torch.empty_like(k))

        def expected(t: tuple) -> list[torch.Tensor]:
            return [rope.reference(x, t[2], t[3]) for x in t[:2]]

        problem = Problem((tokens * 32, tokens * 8), 128, DTYPE, 4)
        yield Case(rope, f"{tokens} tokens", problem, rope.sample, configs, inputs, (4, 5), expected)


def pointwise_cases() -> Iterator[Case]:
    """SiLU·mul of 14336 columns."""
    for rows in (1, 16, 64, 2048, 8192):
        shapes = ((256, 1), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8))
        configs = [pointwise.Config(1, elements, warps) for elements, warps in shapes]

        def inputs(rows: int = rows) -> tuple:
            return _randn(rows, 2 * 14336), torch.empty(rows, 14336, device="cuda", dtype=DTYPE), 14336

        def expected(t: tuple) -> list[torch.Tensor]:
            gate, up = t[0].float().chunk(2, -1)
            return [torch.nn.functional.silu(gate) * up]

        problem = Problem((rows,), 14336, DTYPE, 6)
        yield Case(pointwise, f"{rows}x14336", problem, silu_mul, configs, inputs, (1,), expected)


def gather_cases() -> Iterator[Case]:
    """Embedding of 4096 columns out of 32000."""
    table = _randn(32000, 4096)
    for rows in (1, 64, 8192):
        shapes = ((512, 1), (512, 2), (1024, 4), (2048, 4), (4096, 4), (4096, 8))
        configs = [gather.Config(1, cols, warps) for cols, warps in shapes]

        def inputs(rows: int = rows) -> tuple:
            return table, torch.randint(0, 32000, (rows,), device="cuda"), _randn(rows, 4096)

        def expected(t: tuple) -> list[torch.Tensor]:
            return [gather.reference(t[0], t[1])]

        yield Case(
            gather, f"{rows}x4096", Problem((rows,), 4096, DTYPE, 4), gather.sample, configs, inputs, (2,), expected
        )


CASES = {"norm": norm_cases, "rope": rope_cases, "pointwise": pointwise_cases, "gather": gather_cases}


def graph_us(launch: Callable[[int], object], launches: int = LAUNCHES) -> float:
    """Median time of one launch within a captured chain of `launches`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            launch(i)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


def check(case: Case, t: tuple, config: Any) -> None:
    """Ends the run when an output is further than 1 % (RMS) from the reference: two roundings of bf16 are 0.4 %."""
    for at, want in zip(case.outputs, case.expected(t), strict=True):
        error = ((t[at].double() - want.double()).norm() / want.double().norm()).item()
        if not error < 1e-2:
            sys.exit(f"{case.family.__name__} {case.label} {config}: relative error {error:.3g}")


def time_case(case: Case, target: Target) -> list[dict[str, Any]]:
    """Checks and times every config of a case, without and with programmatic dependent launch."""
    copies = min(8, max(1, 4 * target.l2_bytes // max(1, case.problem.bytes_moved)))
    copies = copies if case.problem.bytes_moved > target.l2_bytes // 8 else 1
    case.sets = [case.inputs() for _ in range(copies)]
    chosen, _ = case.family.choose(case.problem, target)
    result = []
    for config in [chosen, *(c for c in case.configs if c != chosen)]:
        entry = {"family": case.family.__name__.rpartition(".")[2], "case": case.label, "config": str(config)}
        entry["chosen"] = config is chosen
        for name, pdl in (("us", False), ("pdl_us", True)):
            launch = case.family.prepare(case.body, config, pdl=pdl)
            for at in case.outputs:
                case.sets[0][at].fill_(torch.nan)
            launch(case.sets[0], case.problem.rows, case.problem.cols)
            check(case, case.sets[0], config)

            def step(i: int, launch: Callable = launch) -> None:
                launch(case.sets[i % copies], case.problem.rows, case.problem.cols)

            entry[name] = graph_us(step)
        result.append(entry)
    floor = case.problem.bytes_moved / target.bandwidth_bytes_s * 1e6
    for entry in result:
        entry["floor_us"] = floor
    case.sets = []
    return result


def copy_bandwidth() -> float:
    """Bytes read plus written per second by a copy of 2 GiB."""
    # By a kernel: a memcpy node of a graph reached 2.8 TB/s where kernels reach 4.3.
    x = torch.randint(0, 1 << 30, (1 << 29,), dtype=torch.int32, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / graph_us(lambda _: torch.add(x, 1, out=y), launches=4) * 1e6


def host_us() -> dict[str, float]:
    """Host time of one launch with six tensors: ours, and Triton's JIT for the same kernel."""
    case = next(norm_cases())
    t = case.inputs()
    launch = norm.prepare(add_rms_norm, case.configs[0])
    kernel, grid, args = launch._resolve(t, case.problem.rows, case.problem.cols)
    ways = {
        "prepared": lambda: launch(t, case.problem.rows, case.problem.cols),
        "kernel": lambda: kernel(grid, *args),
        "jit": lambda: kernel.fn[grid](*args, **kernel.constexprs, **kernel.options),
    }
    result = {}
    for name, way in ways.items():
        for _ in range(20):
            way()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):
            way()
        result[name] = round((time.perf_counter() - start) * 1e6 / 500, 2)
        torch.cuda.synchronize()
    return result


def line(entry: dict[str, Any], note: str) -> str:
    share = entry["floor_us"] / entry["us"]
    what = f"{entry['family']:9s} {entry['case']:12s} {entry['config']:34s}"
    note = ("chosen " if entry["chosen"] else "") + note
    return f"{what} {entry['us']:8.2f} us, pdl {entry['pdl_us']:8.2f} us, {share:4.0%} of floor  {note}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write every number to this file")
    parser.add_argument("--only", default=",".join(CASES), help="families, comma-separated")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - set(CASES)
    if unknown:
        parser.error(f"unknown family {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    writable(options.json, screen=False)
    timing()
    target = Target.current()
    bandwidth, host = copy_bandwidth(), host_us()
    print(f"{target.name}: copy {bandwidth / 1e12:.2f} TB/s; host us per launch {host}")
    results = []
    for family in options.only.split(","):
        for case in CASES[family]():
            entries = time_case(case, target)
            results += entries
            best = min(entries, key=lambda e: min(e["us"], e["pdl_us"]))
            for entry in entries:
                if entry["chosen"] or entry is best:
                    print(line(entry, "best" if entry is best else ""))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": target.name, "bandwidth": bandwidth, "host_us": host, "results": results}, file)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
