"""Family and config of a kernel: for one size, and for every size of a range.

Enters: a problem as the families see it (`GemmProblem`, `Problem`), whose numbers may be `Size`s. Leaves: a `Choice`,
or for a range a table of them by the largest size each serves. The launch looks its own size up in that table, so that
the tile is always that of the size that runs. The families are asked at a grid of sizes that holds powers of two and
every multiple of 32, then of 64, where that decides how many tiles there are; sizes between take the choice above them.

Each choice is a kernel to compile, so a few stand for all: as few as keep every size of the grid within `LOSS` of its
own best by the families' estimates. Where the best was measured it is taken itself, and so it is where products stream
W: their estimates are for tiles that fit the size. Refuses nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from itertools import groupby
from math import inf
from typing import Any

from ..kernels import rows
from ..kernels.gemm import GemmProblem
from ..kernels.gemm_pick import pick
from ..kernels.segments import pdl_pays
from ..kernels.target import Target
from .options import Options
from .size import Size, Span, typical

# GEMM families that can wait in the kernel for the one before; of the vendor's, the kernel of the epilogue.
WAITING = ("gemm_stream", "gemm_skinny", "gemm_persistent", "gemm_vendor")
# Families that let the next kernel start before they wait themselves, unless they lead.
EARLY = ("gemm_stream", "pointwise", "norm", "rope", "gather", "rows")
# Families whose estimates hold for the choice of their own rule alone. At 32 tokens, o_proj of Qwen3-30B-A3B in tiles
# of 8 took 19.1 us for the 8.0 of 8 tokens, where 1.03 of it was expected (H200, served by vLLM, 2026-11-27).
BY_RULE = ("gemm_stream",)
# What a choice may take longer than the best for a size.
LOSS = 0.03
# Kernels compiled for one launch of a range, at most, beside those of `BY_RULE`: five, a power of two each.
MOST = 12


@dataclass(frozen=True)
class Choice:
    """A family, its config, whether launched with programmatic dependent launch; why, for the reader."""

    family: str
    config: Any
    pdl: bool
    why: str

    @property
    def key(self) -> tuple[str, Any, bool]:
        return self.family, self.config, self.pdl


Table = tuple[tuple[int, Choice], ...]


@lru_cache(maxsize=1 << 14)
def choose(family: str, problem: Any, options: Options, looped: bool = False) -> Choice:
    """The choice for a problem of plain integers.

    Args:
        family: of a problem over rows; a product's is chosen here.
        problem: at one size.
        options: the target chosen for.
        looped: rows are walked, not held.
    """
    pdl, target = options.pdl and options.target.pdl, options.target
    if isinstance(problem, GemmProblem):
        family, config, why = pick(problem, target)
        ours = family != "gemm_vendor" or not problem.plain
        return Choice(family, config, pdl and ours and family in WAITING, why)
    if looped:
        config, why = rows.choose(problem, target, looped=True)
    else:
        config, why = _module(family).choose(problem, target)
    return Choice(family, config, pdl and pdl_pays(problem, config, target), why)


def at_size(problem: Any, size: int | None = None) -> Any:
    """A problem at one size of the range it is for, by default the typical one."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        return value if not isinstance(value, Size) else typical(value) if size is None else value.at(size)

    return replace(problem, **{f.name: plain(getattr(problem, f.name)) for f in fields(problem)})


def by_size(family: str, problem: Any, options: Options, looped: bool = False) -> Table:
    """The choices for a range, each with the largest size it serves; none for a problem without a `Size`."""
    span = _span(problem)
    if span is None:
        return ()
    grid = _grid(span)
    best = {bound: choose(family, at_size(problem, bound), options, looped) for bound in grid}
    if isinstance(problem, GemmProblem):
        best = _fewer(best, problem, options)
    runs = [list(run) for _, run in groupby(best.items(), key=lambda entry: entry[1].key)]
    return tuple(run[-1] for run in runs)


def _fewer(best: Mapping[int, Choice], problem: GemmProblem, options: Options) -> dict[int, Choice]:
    """A choice for every size of the grid out of few."""
    span = _span(problem)
    assert span is not None
    # The smallest and the largest size that a bound's choice serves.
    smallest = (max(span.lo, 1), *(bound + 1 for bound in best))
    ends = {bound: {first, bound} for first, bound in zip(smallest, best, strict=False)}
    asked = {size: at_size(problem, size) for size in {s for pair in ends.values() for s in pair}}
    least = {size: _us(choose("", at, options), at, options) for size, at in asked.items()}
    fixed = {b for b, choice in best.items() if choice.family in BY_RULE or _measured(choice, asked[b], options)}

    @cache
    def loss(choice: Choice, bound: int) -> float:
        """What it takes longer than the best, at the most."""
        if choice.key == best[bound].key and bound in fixed:
            return 0.0
        if any(_module(choice.family).supports(asked[size]) is not None for size in ends[bound]):
            return inf
        return max(0.0, *(_us(choice, asked[size], options) / least[size] - 1 for size in ends[bound]))

    candidates = list({choice.key: choice for choice in best.values()}.values())
    serves = {
        c.key: {b for b, own in best.items() if c.key == own.key or (b not in fixed and loss(c, b) <= LOSS)}
        for c in candidates
    }
    kept = [c for c in candidates if c.family in BY_RULE]
    left = set(best).difference(*(serves[c.key] for c in kept))
    most = len(kept) + MOST
    while left and len(kept) < most:
        kept.append(max(candidates, key=lambda c: len(serves[c.key] & left)))
        left -= serves[kept[-1].key]

    def given(bound: int) -> Choice:
        own = best[bound]
        steady = bound in fixed and any(c.key == own.key for c in kept)
        return own if steady else min(kept, key=lambda c: loss(c, bound))

    return {bound: given(bound) for bound in best}


def expected_us(family: str, config: Any, problem: GemmProblem, target: Target) -> float:
    """What a family expects of a config: its measurement, or an estimate."""
    return float(_module(family).estimate_us(problem, config, target))


def _us(choice: Choice, problem: GemmProblem, options: Options) -> float:
    return expected_us(choice.family, choice.config, problem, options.target)


def _measured(choice: Choice, problem: GemmProblem, options: Options) -> bool:
    """Whether the choice's time is one that its family has measured, on this device or another."""
    module = _module(choice.family)
    hit = module.measurement(problem, options.target) if hasattr(module, "measurement") else None
    return hit is not None and hit.us == _us(choice, problem, options)


def _span(problem: Any) -> Span | None:
    """The range that a problem is for."""
    for field in fields(problem):
        value = getattr(problem, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, Size):
                return number.span
    return None


def _grid(span: Span) -> list[int]:
    """Sizes to ask at, the largest among them: powers of two, then multiples of 16 up to 160, of 32, of 64, and 16 to
    each power; where cuBLAS starts with another tile, 16 beyond a power, as well."""

    def bounds() -> Iterator[int]:
        bound = 1
        while bound < span.hi:
            yield bound
            if bound >= 256 and bound.bit_count() == 1 and bound + 16 < span.hi:
                yield bound + 16
            step = bound if bound < 16 else 16 if bound < 160 else 32 if bound < 512 else 64
            bound += max(step, (1 << bound.bit_length()) // 32)
        yield span.hi

    return [bound for bound in bounds() if bound >= span.lo]


@cache
def _module(family: str) -> Any:
    return importlib.import_module(f"..kernels.{family}", __package__)
