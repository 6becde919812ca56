"""Stage 7: values are contracted into kernels, by what it saves.

Enters: `Dependencies`. Leaves: `Fused`: groups in an order in which they can run, and for every pair that was
considered and not fused the reason. The walk is greedy: of all pairs of groups, joined by an edge or reading the same
memory, the one whose fusion saves most microseconds (bytes that no longer pass through memory at the target's
bandwidth, and one launch) is contracted, until none saves anything. A contraction is refused when it would close a
cycle, when `compose` finds no common domain, or when it would cost more than it saves. No operator is known by name
here. Last, independent kernels of the same shape become segments of one launch.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import torch

from .compose import compose
from .composer import Refused
from .cost import traffic
from .depend import Dependencies
from .elements import Elements
from .errors import InternalError
from .group import Group
from .options import Options
from .size import typical
from .values import Contract, Empty, Extern, Item, Map, Parts, Reduce, Values

# What one more kernel costs inside a CUDA graph beyond its bytes, in µs: the tail of one and the ramp of the next.
LAUNCH_US = 2.0
# Readers of one value that are no neighbours in the graph are fused for the bytes they share, if those are so many:
# half a microsecond at an H200's bandwidth. Below it, readers that could share a launch become its segments.
SHARED_BYTES = 2_000_000
# Where only one of two reduces rows they could not, and are fused for the launch: a residual is stored by the norm
# beside it. Not where so many read the value that weighing each against each takes long, nor rows longer than a hidden
# state: more programs do the rest faster than the one that holds such a row, whose registers would not hold both.
MOST_READERS = 8
LONGEST_ROW = 8192


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

    @property
    def narrowed(self) -> dict[str, torch.dtype]:
        """Values that lie in memory in another dtype than they are computed in (narrow.py)."""
        layouts = self.values.layouts
        maps = (d for d in self.values.definitions.values() if isinstance(d, Map) and d.name in layouts)
        return {d.name: layouts[d.name].dtype for d in maps if layouts[d.name].dtype != d.layout.dtype}

    @cached_property
    def stranded(self) -> frozenset[str]:
        """Products past which a scale was hoisted in vain: what they take or what scales them became another kernel."""
        owner = {name: group for group in self.groups for name in group.members}
        hoisted, made = self.values.hoisted, self.values.definitions
        parts = {n for n, d in made.items() if isinstance(d, Parts) and n in owner and owner[n].contract is None}

        def joined(name: str) -> bool:
            group, product = owner[name], made[name]
            assert isinstance(product, Contract)
            scaled = group is owner.get(hoisted[name]) and parts.isdisjoint(load.value for load in group.parts_read)
            return scaled and bool(group.parts_read) and owner[product.a.base].contract is not None

        return frozenset(hoisted[name] for name in hoisted if not joined(name))

    def __str__(self) -> str:
        lines = [f"{g.kind} {g.name}: {', '.join(g.members)}" for g in self.groups]
        lines += [f"%{name} lies in memory as {dtype}" for name, dtype in self.narrowed.items()]
        return "\n".join(lines + [f"not fused: {r.producer} + {r.consumer}: {r.reason}" for r in self.refusals])


class _State:
    """Groups while they grow: members by number, the graph between groups, what each contraction would save."""

    def __init__(self, deps: Dependencies, options: Options) -> None:
        self.deps, self.options = deps, options
        self.members: dict[int, frozenset[str]] = {}
        self.version: dict[int, int] = {}
        self.graph = nx.DiGraph()
        # Groups stay here, so their identity names them.
        self.composed: dict[frozenset[str], Group | str] = {}
        self.moved: dict[int, int] = {}
        self.elements_reduced: dict[frozenset[str], int] = {}
        self.refusals: dict[tuple[int, int], str] = {}
        self.heap: list[tuple[float, int, int, int, int]] = []
        definitions = deps.values.definitions
        self.elements = Elements()
        for made in definitions.values():
            self.elements.add(made, list(deps.graph.predecessors(made.name)))
        kept = [n for n in definitions if n not in deps.inlined or n in deps.pinned]
        self.reads = reads = {n: deps.reads(n) for n in kept}
        self.readers: dict[str, set[str]] = {n: set() for n in kept}
        for name, sources in reads.items():
            for source in sources & self.readers.keys():
                self.readers[source].add(name)
        kept = self._alive(kept)
        self.owner = owner = {name: number for number, name in enumerate(kept)}
        self.sharing: dict[str, set[str]] = {}
        for name in kept:
            for source in reads[name]:
                self.sharing.setdefault(source, set()).add(name)
        for number, name in enumerate(kept):
            self.members[number], self.version[number] = frozenset([name]), 0
            self.graph.add_node(number)
        for name in kept:
            self.graph.add_edges_from((owner[s], owner[name]) for s in reads[name] if s in owner)

    def _alive(self, kept: list[str]) -> list[str]:
        """Without values that nothing in memory depends on any more, because all their readers inline them."""
        alive: list[str] = []
        seen: set[str] = set()
        for name in reversed(kept):
            made = self.deps.values.definitions[name]
            self.readers[name] &= seen
            acts = isinstance(made, Extern) and (not made.layouts or made.layouts == (None,))
            if self.readers[name] or name in self.deps.pinned or acts:
                alive.append(name)
                seen.add(name)
        return alive[::-1]

    def needed(self, members: Collection[str]) -> frozenset[str]:
        """Members that something outside reads, or that must be in memory."""
        pinned, readers = self.deps.pinned, self.readers
        return frozenset(m for m in members if m in pinned or not readers[m] or not readers[m] <= set(members))

    def compose(self, members: frozenset[str]) -> Group | str:
        """The group of these members, or why there is none."""
        if members not in self.composed:
            try:
                self.composed[members] = self.composition(members, self.elements)
            except Refused as reason:
                self.composed[members] = str(reason)
        return self.composed[members]

    def composition(self, members: frozenset[str], elements: Elements | None = None) -> Group:
        """The group of these members.

        Raises:
            Refused: there is none.
        """
        needed, deps = self.needed(members), self.deps
        if len(members) > 1 and (bare := deps.bare & members):
            raise Refused(f"cuBLAS computes %{min(bare)}, and stores nothing else")
        kept = {deps.values.base(made) for _, made in deps.values.mutations}
        returned = {n for n in needed - kept if self.readers[n] <= set(members)}
        return compose(members, needed, deps.values, deps.inlined, elements=elements, returned=returned)

    def silent(self, number: int) -> bool:
        """Groups that no fusion concerns: ops as themselves, their results, and bare memory."""
        names = self.members[number]
        return len(names) == 1 and isinstance(self.deps.values.definitions[next(iter(names))], (Extern, Item, Empty))

    def consider(self, a: int, b: int) -> None:
        """Puts the contraction of an edge up for choice, or notes why it is none."""
        if self.silent(a) or self.silent(b):
            return
        saved = self.saving(a, b)
        if isinstance(saved, str):
            self.refusals[a, b] = saved
        else:
            heapq.heappush(self.heap, (-saved, a, b, self.version[a], self.version[b]))

    def siblings(self, number: int) -> dict[int, float]:
        """Groups that read what this one reads, and are no neighbours of it, with what fusing them has to save at
        least; GEMMs keep to their own tiles."""
        near = {number, *self.graph.predecessors(number), *self.graph.successors(number)}
        found: dict[int, float] = {}
        for value in {v for n in self.members[number] for v in self.reads[n]}:
            layout, readers = self.deps.values.layouts[value], self.sharing[value]
            large, few = typical(layout.nbytes) >= SHARED_BYTES, len(readers) <= MOST_READERS
            for other in {self.owner[r] for r in readers} - near if large or few else ():
                if self.product(other) is not None or self.silent(other):
                    continue
                none, some = sorted((self.reduced(number), self.reduced(other)))
                if few and none == 0 < some <= typical(layout.numel):
                    found[other] = 0.0
                elif large:
                    found.setdefault(other, self.us(SHARED_BYTES) + LAUNCH_US)
        return dict(sorted(found.items()))

    def reduced(self, number: int) -> int:
        """Elements of the rows that a group reduces: 0 where it reduces none, -1 where they are long, or no rows of
        memory."""
        members = self.members[number]
        if members not in self.elements_reduced:
            made = [d for n in members if isinstance(d := self.deps.values.definitions[n], Reduce)]
            held = all(0 < typical(d.cols) <= LONGEST_ROW and _last(d) for d in made)
            self.elements_reduced[members] = -1 if not held else typical(made[0].rows * made[0].cols) if made else 0
        return self.elements_reduced[members]

    def consider_siblings(self, number: int) -> None:
        """Puts contractions with readers of the same memory up for choice."""
        if self.silent(number) or self.product(number) is not None:
            return
        for other, least in self.siblings(number).items():
            a, b = sorted((number, other))
            saved = self.saving(a, b)
            if not isinstance(saved, str) and saved >= least:
                heapq.heappush(self.heap, (-saved, a, b, self.version[a], self.version[b]))

    def best(self) -> tuple[int, int] | None:
        """The contraction that saves most among those that close no cycle."""
        while self.heap:
            _, a, b, version_a, version_b = heapq.heappop(self.heap)
            if (self.version.get(a), self.version.get(b)) != (version_a, version_b):
                continue
            joined = self.graph.has_edge(a, b)
            # No path leads against an edge; siblings may have one either way.
            if not self.cycle(a, b) and (joined or not self.cycle(b, a)):
                return a, b
            if joined:
                # A path between the two can only vanish into one of them, and that brings the edge up again.
                self.refusals[a, b] = "another kernel between the two reads the first and feeds the second"
        return None

    def cycle(self, a: int, b: int) -> bool:
        """Whether another path than the direct edge leads from a to b."""
        stack = [s for s in self.graph.successors(a) if s != b]
        seen = set(stack)
        while stack:
            for successor in self.graph.successors(stack.pop()):
                if successor == b:
                    return True
                if successor not in seen:
                    seen.add(successor)
                    stack.append(successor)
        return False

    def merge(self, a: int, b: int) -> None:
        """Contracts b into a and considers the edges of the result anew."""
        self.members[a] |= self.members.pop(b)
        self.version[a] += 1
        del self.version[b]
        nx.contracted_nodes(self.graph, a, b, self_loops=False, copy=False)
        for pair in [p for p in self.refusals if a in p or b in p]:
            del self.refusals[pair]
        self.owner.update(dict.fromkeys(self.members[a], a))
        for u, v in [*self.graph.in_edges(a), *self.graph.out_edges(a)]:
            self.consider(u, v)
        self.consider_siblings(a)

    def saving(self, a: int, b: int) -> float | str:
        """Microseconds saved by contracting an edge, or why it cannot be."""
        both = self.compose(self.members[a] | self.members[b])
        if isinstance(both, str):
            return both if self.product(b) is None else f"the operands of %{self.product(b)} are read from memory"
        parts = [self.compose(self.members[n]) for n in (a, b)]
        spared = sum(self.traffic(g) for g in parts if isinstance(g, Group)) - self.traffic(both)
        saved = self.us(spared) + LAUNCH_US
        return saved if saved > 0 else f"it saves nothing: {-spared} bytes more would be moved"

    def traffic(self, group: Group) -> int:
        """Bytes that a group's kernel moves; it is weighed against every neighbour."""
        if id(group) not in self.moved:
            self.moved[id(group)] = traffic(group, self.deps.values)
        return self.moved[id(group)]

    def us(self, count: int) -> float:
        """Microseconds that so many bytes take."""
        return count / self.options.target.bandwidth_bytes_s * 1e6

    def product(self, number: int) -> str | None:
        """The matrix product among a group's members."""
        return next((n for n in self.members[number] if isinstance(self.deps.values.definitions[n], Contract)), None)


def _last(made: Reduce) -> bool:
    """Whether the last dimensions are reduced."""
    kept = len(made.domain) - len(made.reduced)
    return made.reduced == tuple(range(kept, len(made.domain)))


def fuse(deps: Dependencies, options: Options) -> Fused:
    """The piece's values as kernels.

    Args:
        deps: what depends on what.
        options: `fuse=False` leaves every value its own kernel; the target gives bandwidth.
    """
    state = _State(deps, options)
    if options.fuse:
        for a, b in list(state.graph.edges):
            state.consider(a, b)
        for number in list(state.graph):
            state.consider_siblings(number)
        while (best := state.best()) is not None:
            state.merge(*best)
    order = list(nx.lexicographical_topological_sort(state.graph, key=lambda n: n))
    groups = []
    for number in order:
        try:
            groups.append(state.composition(state.members[number]))
        except Refused as reason:
            raise InternalError(", ".join(sorted(state.members[number])), str(reason), stage="fuse") from reason
    named = {n: g.name for n, g in zip(order, groups, strict=True)}
    reasons = tuple(Refusal(named[a], named[b], why) for (a, b), why in sorted(state.refusals.items()))
    return Fused(deps, tuple(groups), reasons)
