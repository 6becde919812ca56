"""What equal pieces share: the trace, and the plans that were made from it, loaded.

A `Lowered` makes each plan once, whichever of its pieces asks first; who its tensors are is the piece's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from ..lowering.emit import Plan
from ..lowering.errors import Unsupported
from ..lowering.intake import Examples
from ..lowering.ir import Trace
from ..lowering.options import Options
from ..lowering.pipeline import plan as make_plan
from ..lowering.pipeline import trace as make_trace
from ..lowering.ranged import Regime, regimes
from ..lowering.size import Undecided, Whole
from ..lowering.specialize import failed_guard
from .cache import Shelf, key
from .load import load
from .stored import from_json, to_json
from .warm import Warming

Runner = Callable[..., Any]
# Told of a plan, its call, and the smallest and the largest size that it serves.
Told = Callable[[Plan, Runner, int, int], None]


@dataclass(frozen=True)
class Loaded:
    """A plan and its `call`."""

    plan: Plan
    call: Runner


@dataclass
class Lowered:
    """One of these for all pieces with the same fingerprint, in a process.

    Args:
        graph, examples: of the first of them.
        options: what is compiled for.
        digest, shelf: the fingerprint, and where plans for ranges are kept under it; either may be missing.
        symbolic, refusal: the trace for all sizes, or why there is none; neither until it was tried.
        plans: by sizes and misaligned inputs.
        ranges, warming, lost: the regimes of each range and misaligned inputs; their kernels, compiled or being
            compiled; or why there are none.
    """

    graph: fx.GraphModule
    examples: Examples
    options: Options
    digest: str | None = None
    shelf: Shelf | None = None
    symbolic: Trace | None = None
    refusal: Unsupported | None = None
    plans: dict[tuple[Any, ...], Loaded] = field(default_factory=dict)
    ranges: dict[tuple[Any, ...], tuple[tuple[Regime, Loaded | None], ...]] = field(default_factory=dict)
    warming: dict[tuple[Any, ...], Warming] = field(default_factory=dict)
    lost: dict[tuple[Any, ...], Unsupported] = field(default_factory=dict)

    def traced(self) -> Trace:
        """The trace for all sizes; a piece that cannot be traced is not tried twice."""
        if self.refusal is not None:
            raise self.refusal
        if self.symbolic is None:
            try:
                self.symbolic = make_trace(self.graph, self.examples)
            except Unsupported as cause:
                self.refusal = cause
                raise
        return self.symbolic

    def trace(self, binding: dict[sympy.Symbol, Whole]) -> tuple[Trace, dict[sympy.Symbol, Whole]]:
        """A trace that holds for these sizes, and the binding of its own symbols."""
        symbolic = self.traced()
        own = _rebind(symbolic, self.examples, binding)
        failed = failed_guard(symbolic, own)
        if failed is None:
            return symbolic, own
        if not all(isinstance(size, int) for size in binding.values()):
            raise Undecided(f"the trace holds for {failed} only")
        return make_trace(self.graph, self.examples, binding), {}  # type: ignore[arg-type]

    def loaded(self, sizes: tuple[int, ...], misaligned: frozenset[str]) -> Loaded:
        """The plan for these sizes and alignments."""
        key = sizes, misaligned
        if key not in self.plans:
            made = self.planned(sizes, ", ".join(map(str, sizes)) or "fixed", misaligned)
            self.plans[key] = Loaded(made, load(made))
        return self.plans[key]

    def planned(self, sizes: Sequence[Whole], said: str, misaligned: Collection[str]) -> Plan:
        """The plan for these sizes, one of which may stand for a range."""
        traced, own = self.trace(dict(zip(self.examples.symbols(), sizes, strict=True)))
        title = f"Piece of {len(self.graph.graph.nodes)} nodes, sizes {said}."
        return make_plan(traced, own, self.options, title=title, misaligned=misaligned)

    def regimes(
        self, lo: int, hi: int, misaligned: frozenset[str], told: Told = lambda *_: None
    ) -> tuple[tuple[Regime, Loaded | None], ...]:
        """The plans that serve a range, for these alignments; `told` of each before the next one is made. A range that
        cannot be planned is not tried twice."""
        asked = lo, hi, misaligned
        if asked in self.lost:
            raise self.lost[asked]
        if asked not in self.ranges:
            found: list[tuple[Regime, Loaded | None]] = []
            try:
                for regime in self._kept(*asked) or self._made(*asked):
                    loaded = Loaded(regime.plan, load(regime.plan)) if regime.plan else None
                    found.append((regime, loaded))
                    if loaded is not None:
                        told(loaded.plan, loaded.call, regime.lo, regime.hi)
            except Unsupported as cause:
                self.lost[asked] = cause
                raise
            self.ranges[asked] = tuple(sorted(found, key=lambda entry: entry[0].lo))
        return self.ranges[asked]

    def _made(self, lo: int, hi: int, misaligned: frozenset[str]) -> Iterator[Regime]:
        """The regimes, planned and, where there is a shelf, kept."""

        def make(size: Whole) -> Plan:
            if isinstance(size, int):
                return self.loaded((size,), misaligned).plan
            return self.planned((size,), f"{size.span.lo} to {size.span.hi}", misaligned)

        found: list[Regime] = []
        for regime in regimes(make, lo, hi):
            found.append(regime)
            yield regime
        if self.shelf is not None and self.digest is not None:
            said = to_json(found)
            if said is not None:
                self.shelf.write(self._key(lo, hi, misaligned), said)

    def _kept(self, lo: int, hi: int, misaligned: frozenset[str]) -> tuple[Regime, ...] | None:
        """The regimes as another process kept them."""
        if self.shelf is None or self.digest is None:
            return None
        said = self.shelf.read(self._key(lo, hi, misaligned))
        found = None if said is None else from_json(said)
        # Plans know their arguments by name, and an equal piece may have others.
        names = [n.name for n in self.graph.graph.nodes if n.op == "placeholder"]
        known = all([a.name for a in r.plan.facts.arguments] == names for r in found or () if r.plan is not None)
        return found if known else None

    def _key(self, lo: int, hi: int, misaligned: frozenset[str]) -> str:
        return key(self.digest, lo, hi, sorted(misaligned), self.options)


def planned_range(graph: fx.GraphModule, examples: Examples, lo: int, hi: int, options: Options) -> tuple[Regime, ...]:
    """The regimes of a piece over a range of sizes, planned and not compiled, for aligned inputs."""
    return tuple(regime for regime, _ in Lowered(graph, examples, options).regimes(lo, hi, frozenset()))


def _rebind(trace: Trace, examples: Examples, binding: dict[sympy.Symbol, Whole]) -> dict[sympy.Symbol, Whole]:
    """Sizes by the trace's own symbols, which stand at the same places of the arguments."""
    places = {place: binding[s] for s, place in examples.symbols().items()}
    return {s: places[place] for s, place in trace.symbols.items()}
