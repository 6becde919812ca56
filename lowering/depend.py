"""Stage 6: who needs whom, as a networkx graph with bytes on its edges.

Enters: `Values`. Leaves: `Dependencies`: the graph over values (an edge from each value to each that reads it, with the
bytes that pass), which values must be in memory whatever is fused (returned, operands of GEMMs and of ops that run as
themselves), and which are so cheap that each reader computes them for itself. It stands between definition and fusion
because it is the last place where nothing has been decided yet. It refuses nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import networkx as nx

from .affine import Affine
from .cost import distinct, footprint
from .expr import Apply, Const, Load, loads, walk
from .group import BODY_LIMIT, EXPENSIVE
from .size import typical
from .values import Contract, Definition, Extern, Item, Map, Reduce, Values

# A value that reads at most this much more than it would occupy is computed by each reader.
CHEAP_BYTES = 1.0625
# A value that only moves elements (a gather, a cat) may cost its readers this many bytes more: what a launch costs in
# time (2 µs) at 4.3 TB/s, shared between the readers one expects, about four.
MOVE_BYTES = 2_000_000
MOVES = ("where", "cast", "keep")
# ... if that takes no more operations than this.
CHEAP_OPERATIONS = 12
# ... and if it takes no longer a body than this, with everything that it inlines itself: a chain of scatters into
# slices, each cheap, would else end in one body that holds them all.
INLINED_LENGTH = BODY_LIMIT // 4


@dataclass(frozen=True)
class Dependencies:
    """Args:
    graph: values as nodes, `bytes` on edges; inputs included.
    pinned: values that must be in memory.
    inlined: values that readers compute for themselves.
    bare: products that nothing joins.
    """

    values: Values
    graph: nx.DiGraph
    pinned: frozenset[str]
    inlined: frozenset[str]
    bare: frozenset[str] = frozenset()

    def reads(self, name: str) -> set[str]:
        """What computing this value reads, seen through inlined values; a GEMM and an op that runs as itself read
        memory only."""
        if not isinstance(self.values.definitions[name], (Map, Reduce)):
            return set(self.graph.predecessors(name))
        found: set[str] = set()
        stack = list(self.graph.predecessors(name))
        seen = set(stack)
        while stack:
            value = stack.pop()
            if value in self.inlined:
                fresh = [p for p in self.graph.predecessors(value) if p not in seen]
                seen.update(fresh)
                stack.extend(fresh)
            else:
                found.add(value)
        return found

    def __str__(self) -> str:
        lines = [f"{u} -> {v}: {data['bytes']} bytes" for u, v, data in self.graph.edges(data=True)]
        return "\n".join([*lines, f"in memory: {sorted(self.pinned)}", f"inlined: {sorted(self.inlined)}"])


def barring(deps: Dependencies, products: Collection[str]) -> Dependencies:
    """The same with these products by themselves in memory, because what computes them leaves nothing else to do there:
    their readers are free for other kernels."""
    return replace(deps, pinned=deps.pinned | frozenset(products), bare=deps.bare | frozenset(products))


def direct_reads(made: Definition, values: Values) -> list[str]:
    """Values whose memory or element this definition reads, before any inlining."""
    if isinstance(made, (Map, Reduce)):
        return list(dict.fromkeys(n.value for n in loads(made.expr)))
    if isinstance(made, Contract):
        return [made.a.base, made.b.base]
    if isinstance(made, Extern):
        return list(dict.fromkeys(values.base(r) for r in made.reads))
    return [made.of] if isinstance(made, Item) else []


def depend(values: Values) -> Dependencies:
    """The dependency graph of a piece's values."""
    graph = nx.DiGraph()
    for entry in values.inputs:
        graph.add_node(entry.name)
    pinned = set(values.kept)
    # Whose memory others than kernels look at: ops that run as themselves, and whoever gave the inputs. Later kernels
    # that compare with what those say (the largest of some, say) must read what they read.
    seen = {values.base(name) for _, name in values.mutations}
    for made in values.definitions.values():
        graph.add_node(made.name)
        for name in direct_reads(made, values):
            size = typical(values.layouts[name].nbytes) if name in values.layouts else 0
            graph.add_edge(name, made.name, bytes=size)
            if isinstance(made, (Contract, Extern)):
                pinned.add(name)
            if isinstance(made, Extern):
                seen.add(name)
    names = {i.name for i in values.inputs}
    inlined: set[str] = set()
    lengths: dict[str, int] = {}
    for made in values.definitions.values():
        if isinstance(made, (Map, Reduce)):
            lengths[made.name] = _shortened(made, lengths, inlined)
        if not isinstance(made, Map) or (made.name in seen and loads(made.expr)):
            continue
        if lengths[made.name] <= INLINED_LENGTH and _cheap(made, values, inlined):
            inlined.add(made.name)
    return Dependencies(values, graph, frozenset(pinned - names), frozenset(inlined))


def _shortened(made: Map | Reduce, lengths: dict[str, int], inlined: set[str]) -> int:
    """How long this value's body is with everything inlined; what makes it too long is inlined no more."""
    reads = [n.value for n in loads(made.expr)]
    total = sum(1 for _ in walk(made.expr))
    inner = {name: reads.count(name) * lengths[name] for name in set(reads) & inlined}
    for name in sorted(inner, key=lambda n: (-inner[n], n)):
        if total + sum(inner.values()) <= BODY_LIMIT:
            break
        inlined.remove(name)
        del inner[name]
    return total + sum(inner.values())


def _slow(operation: Apply) -> bool:
    """Whether an operation takes many instructions; a division by a number, as of means, is not worth a value."""
    if operation.fn == "div":
        return not isinstance(operation.args[1], Const)
    return operation.fn in EXPENSIVE or operation.fn in ("rsqrt", "sqrt")


def _cheap(made: Map, values: Values, inlined: set[str]) -> bool:
    """Whether readers should compute this value rather than read it."""
    nodes = list(walk(made.expr))
    operations = [n for n in nodes if isinstance(n, Apply)]
    if len(operations) > CHEAP_OPERATIONS or any(_slow(n) for n in operations):
        return False
    read: dict[str, list[Affine]] = {}
    for node in nodes:
        if isinstance(node, Load):
            product = values.definitions.get(node.value)
            if isinstance(product, Contract) and (
                typical(made.layout.nbytes) <= typical(product.layout.nbytes) or product.m <= product.few
            ):
                return False
            read.setdefault(node.value, []).append(node.offset)
    cost = sum(
        min(distinct(offsets), typical(values.layouts[v].numel)) * _source_itemsize(v, values, inlined)
        for v, offsets in read.items()
    )
    moves = all(n.fn in MOVES or not n.args[0].dtype.is_floating_point for n in operations)
    return cost <= CHEAP_BYTES * typical(made.layout.nbytes) + (MOVE_BYTES if moves else 0)


def _source_itemsize(name: str, values: Values, inlined: Collection[str]) -> float:
    """Bytes per element that reading `name` costs, when it is itself computed by its readers."""
    made = values.definitions.get(name)
    if name not in inlined or not isinstance(made, Map) or not made.layout.numel:
        return values.layouts[name].dtype.itemsize
    cost = 0.0
    for node in loads(made.expr):
        size = min(footprint(node.offset), typical(values.layouts[node.value].numel))
        cost += size / typical(made.layout.numel) * _source_itemsize(node.value, values, inlined)
    return cost
