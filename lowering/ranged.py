"""Plans for every size of a range: a few regimes, each one plan with the number of tokens as a run-time integer.

Enters: a way to make a plan for a number (an integer, or a `Size` that stands for a span), and the range. Leaves:
`Regime`s that cover it, one after the other, so that the kernels of one compile while the next is planned. Where they
begin and end:

- Where planning must know the size: it then cuts the span at the size at which its answer changes (`Undecided`). A
  part of one size gets the exact plan; a part in which no cut helps gets none, with the reason, and its sizes are
  planned one by one when they come.
- Where fusion decides otherwise, as what it saves depends on the size: it is asked at a few sizes, and neighbours for
  which it is the same share a regime.

Configs are no reason for a regime: each launch looks its own up by the size that runs (`choices.py`).

Why a plan is right at every size of its regime: see `size.py`. What costs and configs decide changes the speed only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .emit import Plan
from .group import FEW_TOKENS, FEW_TOKENS_OF_NORMS, MANY_TOKENS
from .size import NAME, Span, Undecided

# The parts into which planning may cut a range.
LIMIT = 12
# Sizes at which fusion is asked: decode, mixed batches, prefill. What one kernel more or less saves lies between them.
# Those at which products of heads are cut anyway, so that no plan is made for either side only to be found alike.
# Not where products have cut off the sizes of decode: among those a launch outweighs what is moved.
ASKED = (FEW_TOKENS_OF_NORMS, FEW_TOKENS, MANY_TOKENS - 1)

Make = Callable[[Any], Plan]


@dataclass(frozen=True)
class Regime:
    """The sizes `lo` to `hi`.

    Args:
        plan: serves each of them; None: they are planned one by one.
        why: the reason for that.
    """

    lo: int
    hi: int
    plan: Plan | None = field(repr=False)
    why: str = ""

    def __str__(self) -> str:
        return f"{self.lo}" if self.lo == self.hi else f"{self.lo}-{self.hi}"


def regimes(make: Make, lo: int, hi: int) -> Iterator[Regime]:
    """The regimes of a range, each as soon as it is certain; the largest sizes first, whose kernels compile longest.

    Args:
        make: the plan for an integer or a `Size`; raises `Undecided` where a `Size` does not say enough.
        lo, hi: the range, both included.
    """
    for part in _decided(make, lo, hi, LIMIT):
        inside = [bound for bound in ASKED if part.lo <= bound < part.hi]
        if part.plan is None or part.hi <= FEW_TOKENS or not inside:
            yield part
            continue
        spans = pairwise([part.lo - 1, *inside, part.hi])
        found = sorted((r for a, b in spans for r in _decided(make, a + 1, b, LIMIT)), key=lambda r: r.lo)
        for alike in reversed(list(_alike(found))):
            first, last = alike[0], alike[-1]
            if (first.lo, last.hi) == (part.lo, part.hi):
                yield part
            elif len(alike) == 1:
                yield first
            else:
                yield from _decided(make, first.lo, last.hi, LIMIT)


def _decided(make: Make, lo: int, hi: int, cuts: int) -> Iterator[Regime]:
    """A span, cut wherever planning has to know on which side a size lies; the largest sizes first."""
    try:
        yield Regime(lo, hi, make(Span(lo, hi, hi).size()))
    except Undecided as why:
        if why.cut is None or not cuts:
            yield Regime(lo, hi, None, why.fact)
            return
        yield from _decided(make, why.cut, hi, cuts - 1)
        yield from _decided(make, lo, why.cut - 1, cuts - 1)
    except (TypeError, RuntimeError) as why:
        # Python and torch take no `Size`: whoever gave them one needs the number itself.
        yield Regime(lo, hi, None, f"a stage needs the size as a plain number: {why}")


def _alike(found: Sequence[Regime]) -> Iterator[list[Regime]]:
    """Runs of neighbours whose plans differ in configs alone, or that have none for the same reason."""
    run = [found[0]]
    for regime in found[1:]:
        if regime.why == run[-1].why and _structure(regime) == _structure(run[-1]):
            run.append(regime)
        else:
            yield run
            run = [regime]
    yield run


def _structure(regime: Regime) -> str:
    """Bodies and call of a regime's plan."""
    if regime.plan is None:
        return ""
    text = regime.plan.source.split('"""', 2)[2]
    text = re.sub(r"^launch_\w+ = (?:launch_\w+\n|.*?^\)\n)", "", text, flags=re.S | re.M)
    # Whether a launch looks its config up is no structure either.
    return re.sub(rf"(launch_\w+\(){NAME}, ", r"\1", re.sub(r"^from .*\n", "", text, flags=re.M))
