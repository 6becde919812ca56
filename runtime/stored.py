"""Plans for a range as values of JSON, for the cache (cache.py).

What is kept is a plan's text and its facts: with them it is loaded and run without being planned. A plan that holds
what cannot be written down (objects beside the text, tensors of the piece's own) keeps its range out of the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ..lowering.emit import Plan
from ..lowering.facts import Facts
from ..lowering.ranged import Regime

log = logging.getLogger("terrazzo")


def to_json(regimes: Sequence[Regime]) -> list[Any] | None:
    """The regimes of a range as lists, dicts, strings and integers; None where that cannot say all."""
    if any(r.plan is not None and (r.plan.objects or r.plan.constants) for r in regimes):
        return None
    try:
        return [[r.lo, r.hi, r.why, r.plan and [r.plan.source, r.plan.facts.to_json()]] for r in regimes]
    except NotImplementedError:
        return None


def from_json(said: Any) -> tuple[Regime, ...] | None:
    """The regimes that `to_json` wrote; None, with a line, for anything else."""
    try:
        return tuple(
            Regime(lo, hi, None if kept is None else Plan(str(kept[0]), Facts.from_json(kept[1])), why)
            for lo, hi, why, kept in said
        )
    except (KeyError, TypeError, ValueError, AttributeError, NotImplementedError) as cause:
        log.warning("a cache entry is not what was written and is made anew: %s: %s", type(cause).__name__, cause)
        return None
