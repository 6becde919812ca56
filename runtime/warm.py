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

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch

from ..kernels import workspace
from ..kernels.launch import compiling_together
from ..lowering.emit import Plan
from ..lowering.ir import Input
from ..lowering.size import Size

META = torch.device("meta")
# Sizes after which the divisibility of what is linear in the size by 16 repeats.
PERIOD = 16


def warm(
    served: Iterable[tuple[Plan, Callable[..., Any], int, int]], device: torch.device, misaligned: Collection[str] = ()
) -> None:
    """Compile and load what these plans launch at any size of their ranges.

    Args:
        served: plans, each with its call and its smallest and largest size.
        device: where they will run.
        misaligned: inputs whose memory does not start at a multiple of 16 bytes.

    Raises:
        triton.CompilationError and its kin: a kernel does not compile.
    """
    with compiling_together() as noted, torch.no_grad():
        for plan, call, lo, hi in served:
            for size in telling(plan, lo, hi):
                call(*hollow(plan, size, misaligned))
    for kernel, args in noted:
        kernel.precompile(*args)
    workspace.reserve(device, META)


def telling(plan: Plan, lo: int, hi: int) -> list[int]:
    """Sizes at which a plan for the range from `lo` to `hi` launches every binary it ever launches."""
    kernels = plan.schedule.launches()
    period = PERIOD if any(isinstance(g.cols, Size) for k in kernels for g in k.segments) else 1
    bounds = sorted({bound for k in kernels for bound, _ in k.by_size if lo <= bound < hi} | {lo - 1, hi})
    found: set[int] = set()
    for below, last in pairwise(bounds):
        found |= {*range(below + 1, min(below + period, last) + 1), *range(max(below + 1, last - period + 1), last + 1)}
    return sorted(found)


def hollow(plan: Plan, size: int, misaligned: Collection[str] = ()) -> list[Any]:
    """Arguments of a plan's call at a size, without memory."""
    return [_argument(given, size, given.name in misaligned) for given in plan.schedule.values.inputs]


def _argument(given: Input, size: int, misaligned: bool) -> Any:
    if given.spec is None:
        return _at((given.value,), size)[0]
    spec = given.spec
    shape, stride = _at(spec.shape, size), _at(spec.stride, size)
    if not misaligned:
        return torch.empty_strided(shape, stride, dtype=spec.dtype, device=META)
    # Without memory an address is the offset alone.
    last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    return torch.empty(2 + max(last, 0), dtype=spec.dtype, device=META).as_strided(shape, stride, 1)


def _at(numbers: Sequence[Any], size: int) -> list[Any]:
    return [n.at(size) if isinstance(n, Size) else n for n in numbers]
