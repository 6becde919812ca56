"""The kernels of plans compiled and loaded before any call: on arguments without memory, for every size of a range.

A plan's `call` runs on tensors of the meta device. What it launches is written down, so grids, argument types and
alignment are those of a real run; the kernels are compiled side by side and loaded. Scratch memory is made as large as
the largest of the sizes needs.

Which sizes stand for a range: what of a launch can change the binary is its config, which has bounds (`BySize`), the
width of ints and indices, which changes once between two sizes, and whether columns come in units of 16
(`kernels/segments.py`), which repeats every 16 sizes. So between any two bounds the first and the last sizes show all
there is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import torch

from ..kernels import workspace
from ..kernels.launch import Kernel, noting
from ..kernels.together import Compiling
from ..lowering.emit import Plan
from ..lowering.facts import Argument, Facts
from ..lowering.size import Size
from .compilers import asked

log = logging.getLogger("terrazzo")

META = torch.device("meta")


class Warming:
    """What plans launch at any size of their ranges, being compiled in the background.

    Ops that run as themselves are called on arguments without memory as well. Where one of them cannot be, the kernels
    of its plan are compiled at the plan's first calls.

    Args:
        device: where the plans will run.
        misaligned: inputs whose memory does not start at a multiple of 16 bytes.
    """

    def __init__(self, device: torch.device, misaligned: Collection[str] = ()) -> None:
        self._device, self._misaligned = device, misaligned
        self._noted: list[tuple[Kernel, tuple]] = []
        self._compiling: list[Compiling] = []
        self._cause: Exception | None = None

    def begin(self, plan: Plan, call: Callable[..., Any], lo: int, hi: int) -> None:
        """Begin to compile what a plan launches from its smallest to its largest size. What goes wrong is `finish`'s to
        raise: other plans are still being made."""
        if self._cause is not None:
            return
        try:
            with noting() as noted, torch.no_grad():
                self._run(plan, call, lo, hi)
            self._compiling.append(Compiling(noted, asked()))
            self._noted += noted
        except Exception as cause:
            self._cause = cause

    def _run(self, plan: Plan, call: Callable[..., Any], lo: int, hi: int) -> None:
        """Call a plan at every size that tells something."""
        try:
            for size in telling(plan.facts, lo, hi):
                call(*hollow(plan.facts, size, self._misaligned))
        except Exception as cause:
            if not plan.facts.foreign:
                raise
            said = "a plan with %d ops as themselves compiles its kernels at its first calls: %s: %s"
            log.info(said, plan.facts.foreign, type(cause).__name__, cause)

    def finish(self) -> None:
        """Wait for all of them and load them; further calls do nothing more.

        Raises:
            triton.CompilationError and its kin: a kernel does not compile. And what a plan raised in `begin`. Further
            calls raise it again.
        """
        for compiling in self._compiling:
            compiling.wait()
        if self._cause is None and self._noted:
            try:
                for kernel, args in self._noted:
                    kernel.precompile(*args)
            except Exception as cause:
                self._cause = cause
            workspace.reserve(self._device, META)
        self._noted, self._compiling = [], []
        if self._cause is not None:
            raise self._cause


def warm(plan: Plan, call: Callable[..., Any], device: torch.device, misaligned: Collection[str] = ()) -> None:
    """Compile and load what a plan for single sizes launches, as `Warming` says, now."""
    warming = Warming(device, misaligned)
    warming.begin(plan, call, 0, 0)
    warming.finish()


def telling(facts: Facts, lo: int, hi: int) -> list[int]:
    """Sizes at which a plan for the range from `lo` to `hi` launches every binary it ever launches."""
    bounds = sorted({bound for bound in facts.bounds if lo <= bound < hi} | {lo - 1, hi})
    found: set[int] = set()
    for below, last in pairwise(bounds):
        first = range(below + 1, min(below + facts.period, last) + 1)
        found |= {*first, *range(max(below + 1, last - facts.period + 1), last + 1)}
    return sorted(found)


def hollow(facts: Facts, size: int, misaligned: Collection[str] = ()) -> list[Any]:
    """Arguments of a plan's call at a size, without memory."""
    return [_hollow(argument, size, argument.name in misaligned) for argument in facts.arguments]


def _hollow(argument: Argument, size: int, misaligned: bool) -> Any:
    if argument.dtype is None:
        return _at((argument.value,), size)[0]
    shape, stride = _at(argument.shape, size), _at(argument.stride, size)
    if not misaligned:
        return torch.empty_strided(shape, stride, dtype=argument.dtype, device=META)
    # Without memory an address is the offset alone.
    last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    return torch.empty(2 + max(last, 0), dtype=argument.dtype, device=META).as_strided(shape, stride, 1)


def _at(numbers: Sequence[Any], size: int) -> list[Any]:
    return [n.at(size) if isinstance(n, Size) else n for n in numbers]
