"""A plan's kernels, compiled for an architecture that need not be present.

`launches` runs the plan's `call` on tensors without memory (the meta device) and writes down every launch instead of
making it, so grids, argument types and alignment are those of a real run, whatever family launches. Each launch becomes
a `CompileJob`. Compiling and interpreting cannot share a process: under the interpreter it refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import mangle_type

from terrazzo.kernels.jobs import CompileJob
from terrazzo.kernels.launch import DESCRIPTORS, INTERPRETED, Grid, Kernel
from terrazzo.kernels.ptx import left_apart
from terrazzo.kernels.target import Target
from terrazzo.lowering.emit import Plan
from terrazzo.lowering.errors import Unsupported, UserError
from terrazzo.runtime.load import load
from terrazzo.runtime.warm import hollow
from terrazzo.tools.sass import SHARED_LIMIT_BYTES, Report, compile_job


@dataclass(frozen=True)
class Launch:
    """One launch of a plan: the value the kernel is known by, its grid, and what the compiler needs."""

    kernel: str
    grid: Grid
    job: CompileJob


@dataclass(frozen=True)
class Stats:
    """What a launch compiled to; `wrong` says which limit it breaks, or why it did not compile."""

    kernel: str
    grid: Grid
    registers: int = 0
    spills_bytes: int = 0
    shared_bytes: int = 0
    seconds: float = 0.0
    wrong: str = ""
    code: str = ""


def launches(plan: Plan, target: Target, size: int = 0) -> list[Launch]:
    """The launches that a call of this plan makes, in order; `size`: where the plan is for a range.

    Raises:
        UserError: the process interprets.
        Unsupported: an op that runs as itself needs its input's values to know its result's shape.
    """
    if INTERPRETED:
        raise UserError(
            "compiling a plan's kernels",
            "TRITON_INTERPRET=1 is set, and what was decorated under it cannot be compiled",
            stage="tools.dump_compile",
            remedy="Unset it for this command.",
        )
    call = load(plan)
    module = call.__globals__
    prepared = [name for name in module if name.startswith("launch_")]
    ours = [k for k in plan.schedule.launches() if k.family]
    found: list[Launch] = []
    current: list[tuple[str, str]] = []

    def note(kernel: Kernel, grid: Grid, *args: Any) -> None:
        if 0 not in grid:
            name, family = current[-1]
            found.append(Launch(name, grid, _job(kernel, args, family, name)))

    def named(launch: Any, name: str, family: str) -> Any:
        def run(*args: Any) -> None:
            current.append((name, family))
            launch(*args)

        return run

    for variable, kernel in zip(prepared, ours, strict=True):
        module[variable] = named(module[variable], kernel.name, kernel.family)
    with _recording(note, target), torch.no_grad():
        try:
            call(*hollow(plan.facts, size))
        except (NotImplementedError, RuntimeError) as cause:
            fact = f"after {current[-1][0] if current else 'the start'} an op cannot run without values: {cause}"
            raise Unsupported("a plan without memory", fact, stage="tools.dump_compile") from cause
    return found


def compile_launch(launch: Launch, arch: int, code: str = "", known: dict[Any, Report] | None = None) -> Stats:
    """Registers, local and shared memory of one launch, held against the architecture's limits.

    Args:
        launch: from `launches`.
        arch: 80, 90 or 100.
        code: "ptx" or "sass" to get the text in `Stats.code`.
        known: reports by what was compiled; kernels that a plan launches twice are compiled once.
    """
    key = _key(launch.job, arch)
    known = {} if known is None else known
    try:
        if key not in known:
            known[key] = compile_job(launch.job, arch)
        report = known[key]
    except Exception as error:  # whatever the compiler throws is this row's result
        lines = str(error).strip().splitlines() or [""]
        return Stats(launch.kernel, launch.grid, wrong=f"{type(error).__name__}: {lines[-1]}")
    wrong = []
    if report.shared_bytes > SHARED_LIMIT_BYTES[arch]:
        wrong.append(f"{report.shared_bytes} bytes of shared memory, the limit is {SHARED_LIMIT_BYTES[arch]}")
    if report.spills_bytes:
        wrong.append(f"{report.spills_bytes} bytes of local memory per thread")
    if left := left_apart(report.ptx):
        wrong.append(f"{left} products by a tile and the tokens beside it are two instructions each, not one")
    text = getattr(report, code) if code else ""
    numbers = (report.registers, report.spills_bytes, report.shared_bytes, round(report.seconds, 3))
    return Stats(launch.kernel, launch.grid, *numbers, "; ".join(wrong), text)


@contextmanager
def _recording(note: Any, target: Target) -> Iterator[None]:
    """Launches are noted, not made; whoever asks for the current device is told `target`."""
    current = staticmethod(lambda device=None: target)
    with mock.patch.object(Kernel, "__call__", note), mock.patch.object(Target, "current", current):
        yield


def _job(kernel: Kernel, args: tuple[Any, ...], family: str, name: str) -> CompileJob:
    names = [p for p in kernel.fn.arg_names if p not in kernel.constexprs]
    given = dict(zip(names, args, strict=True))
    return CompileJob(
        family=family,
        label=name,
        fn=kernel.fn,
        signature={p: mangle_type(value) for p, value in given.items()},
        constexprs=kernel.constexprs,
        num_warps=kernel.options["num_warps"],
        num_stages=kernel.options["num_stages"],
        divisible=tuple(p for p, value in given.items() if _aligned(value)),
    )


def _aligned(value: Any) -> bool:
    """Whether every address in an argument is a multiple of 16 bytes; a tuple is as aligned as its worst tensor."""
    if isinstance(value, tuple):
        return all(v is None or _aligned(v) for v in value)
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, DESCRIPTORS)


def _key(job: CompileJob, arch: int) -> tuple[Any, ...]:
    fixed = tuple((name, type(value), value) for name, value in sorted(job.constexprs.items()))
    types = tuple(job.signature.items())
    return job.fn, fixed, types, job.num_warps, job.num_stages, job.divisible, arch
