"""Stage 6: values are contracted into kernels, by what it saves.

Enters: `Dependencies`. Leaves: `Fused`: groups in an order in which they can run, and for every pair that was
considered and not fused the reason. The walk is greedy: of all edges between groups the one whose fusion saves most
microseconds (bytes that no longer pass through memory at the target's bandwidth, and one launch) is contracted, until
none saves anything. A contraction is refused when it would close a cycle, when `compose` finds no common domain, or
when it would cost more than it saves. No operator is known by name here. Last, independent kernels of the same shape
become segments of one launch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import networkx as nx

from .depend import Dependencies
from .group import Group, Refused, compose, traffic
from .options import Options
from .values import Contract, Empty, Extern, Item, Values

# What one more kernel costs inside a CUDA graph beyond its bytes, in µs: the tail of one and the ramp of the next.
LAUNCH_US = 2.0


@dataclass(frozen=True)
class Refusal:
    """Why `producer` and `consumer` do not share a kernel."""

    producer: str
    consumer: str
    reason: str


@dataclass(frozen=True)
class Fused:
    """The groups of a piece in running order, and why there are not fewer."""

    dependencies: Dependencies
    groups: tuple[Group, ...]
    refusals: tuple[Refusal, ...] = ()

    @property
    def values(self) -> Values:
        return self.dependencies.values

    def __str__(self) -> str:
        lines = [f"{g.kind} {g.name}: {', '.join(g.members)}" for g in self.groups]
        return "\n".join(lines + [f"not fused: {r.producer} + {r.consumer}: {r.reason}" for r in self.refusals])


@dataclass
class _State:
    """Groups while they grow: members by group number, and the graph between groups."""

    deps: Dependencies
    options: Options
    members: dict[int, frozenset[str]] = field(default_factory=dict)
    owner: dict[str, int] = field(default_factory=dict)
    graph: nx.DiGraph = field(default_factory=nx.DiGraph)
    composed: dict[tuple[frozenset[str], frozenset[str]], Group | str] = field(default_factory=dict)

    def needed(self, members: Collection[str]) -> frozenset[str]:
        """Members that something outside reads, or that must be in memory."""
        return frozenset(
            m
            for m in members
            if m in self.deps.pinned or any(r not in members for r in self.readers[m]) or not self.readers[m]
        )

    def compose(self, members: frozenset[str]) -> Group | str:
        """The group of these members, or why there is none."""
        needed = self.needed(members)
        key = members, needed
        if key not in self.composed:
            try:
                self.composed[key] = compose(members, needed, self.deps.values, self.deps.inlined)
            except Refused as reason:
                self.composed[key] = str(reason)
        return self.composed[key]

    def __post_init__(self) -> None:
        definitions = self.deps.values.definitions
        kept = [n for n in definitions if n not in self.deps.inlined or n in self.deps.pinned]
        reads = {n: self.deps.reads(n) for n in kept}
        self.readers: dict[str, set[str]] = {n: set() for n in kept}
        for name, sources in reads.items():
            for source in sources:
                if source in self.readers:
                    self.readers[source].add(name)
        kept = self._alive(kept)
        for number, name in enumerate(kept):
            self.members[number] = frozenset([name])
            self.owner[name] = number
            self.graph.add_node(number)
        for name in kept:
            for source in reads[name]:
                if source in self.owner:
                    self.graph.add_edge(self.owner[source], self.owner[name])

    def _alive(self, kept: list[str]) -> list[str]:
        """Without values that nothing in memory depends on any more, because all their readers inline them."""
        alive: list[str] = []
        for name in reversed(kept):
            made = self.deps.values.definitions[name]
            used = self.readers[name] & set(alive)
            acts = isinstance(made, Extern) and (not made.layouts or made.layouts == (None,))
            self.readers[name] = used
            if used or name in self.deps.pinned or acts:
                alive.append(name)
        return alive[::-1]

    def cycle(self, a: int, b: int) -> bool:
        """Whether another path than the direct edge leads from a to b."""
        return any(s != b and nx.has_path(self.graph, s, b) for s in self.graph.successors(a))

    def merge(self, a: int, b: int) -> None:
        self.members[a] |= self.members.pop(b)
        for name in self.members[a]:
            self.owner[name] = a
        nx.contracted_nodes(self.graph, a, b, self_loops=False, copy=False)


def fuse(deps: Dependencies, options: Options) -> Fused:
    """The piece's values as kernels.

    Args:
        deps: what depends on what.
        options: `fuse=False` leaves every value its own kernel; the target gives bandwidth.
    """
    state = _State(deps, options)
    refusals: dict[tuple[int, int], str] = {}
    if options.fuse:
        while (best := _best_edge(state, refusals)) is not None:
            state.merge(*best)
            for pair in [p for p in refusals if best[0] in p or best[1] in p]:
                del refusals[pair]
    order = list(nx.lexicographical_topological_sort(state.graph, key=lambda n: n))
    groups = []
    for number in order:
        group = state.compose(state.members[number])
        assert isinstance(group, Group), group
        groups.append(group)
    named = {n: g.name for n, g in zip(order, groups, strict=True)}
    reasons = tuple(
        Refusal(named[a], named[b], why) for (a, b), why in sorted(refusals.items()) if a in named and b in named
    )
    return Fused(deps, tuple(groups), tuple(r for r in reasons if r.reason))


def _best_edge(state: _State, refusals: dict[tuple[int, int], str]) -> tuple[int, int] | None:
    """The edge whose contraction saves most, recording why the others are refused."""
    best, most = None, 0.0
    for a, b in state.graph.edges:
        if (a, b) in refusals and not refusals[a, b].startswith("saves"):
            continue
        if _silent(state, a) or _silent(state, b):
            refusals[a, b] = ""
            continue
        saved = _saving(state, a, b)
        if isinstance(saved, str):
            refusals[a, b] = saved
        elif saved > most and not _closes_cycle(state, a, b, refusals):
            best, most = (a, b), saved
    return best


def _closes_cycle(state: _State, a: int, b: int, refusals: dict[tuple[int, int], str]) -> bool:
    """Cycles can open up again as groups merge, so the reason is noted but looked at anew."""
    if state.cycle(a, b):
        refusals[a, b] = "saves traffic, but another kernel between the two needs the first and feeds the second"
        return True
    return False


def _silent(state: _State, number: int) -> bool:
    """Groups that no fusion concerns: ops as themselves, their results, and bare memory."""
    names = state.members[number]
    return len(names) == 1 and isinstance(state.deps.values.definitions[next(iter(names))], (Extern, Item, Empty))


def _saving(state: _State, a: int, b: int) -> float | str:
    """Microseconds saved by contracting an edge, or why it cannot be."""
    first, second = state.compose(state.members[a]), state.compose(state.members[b])
    both = state.compose(state.members[a] | state.members[b])
    if isinstance(both, str):
        if isinstance(state.deps.values.definitions.get(_only(state, b)), Contract):
            return f"the operands of %{_only(state, b)} are read from memory by its copy engine"
        return both
    values = state.deps.values
    spared = sum(traffic(g, values) for g in (first, second) if isinstance(g, Group)) - traffic(both, values)
    saved = spared / state.options.target.bandwidth_bytes_s * 1e6 + LAUNCH_US
    return saved if saved > 0 else f"saves nothing: {-spared} bytes more would be moved"


def _only(state: _State, number: int) -> str:
    names = state.members[number]
    return next((n for n in names if isinstance(state.deps.values.definitions[n], Contract)), next(iter(names)))
