"""Stage 8: each group gets a kernel family and a config for these very sizes.

Enters: `Fused`. Leaves: `Selected`: kernels in running order, each one launch: a family, its config, why, and one group
or several independent ones as segments. The family follows from what the group is (a GEMM's operands and their strides,
rows with a reduction, plain elements), the config from the family's measured table or its formula. It stands after
fusion, as it needs to
know everything a kernel does, and chooses by the concrete size: one and the same trace gets other tiles at 1 and at
8192 tokens. It refuses nothing: the last family in line takes any problem. In a plan for a range of sizes (`Size`) a
kernel has a table of configs by size; what it has to know when it is compiled must be a plain integer, or the plan does
not serve the range (`Undecided`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch

from ..kernels.gemm import GemmProblem
from ..kernels.rows import LOOP_FROM
from ..kernels.segments import Problem
from .affine import Div, Indirect, Mod
from .choices import Table, at_size, by_size, choose
from .compose import compose
from .composer import Refused
from .cost import traffic
from .expr import varies
from .fuse import Fused
from .group import COL, FEW_TOKENS, Group
from .options import Options
from .size import Size, Undecided, alike, typical
from .values import Contract, Item, Values, View

MAX_SEGMENTS = 4
# Independent groups further apart than this in running order stay apart: joining them keeps buffers alive for long.
NEAR = 6


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Args:
        name: of the value it is known by.
        family: a module of `terrazzo.kernels`; '' for what launches nothing of ours (extern, item, empty).
        config, why: the family's config and the reason for it.
        segments: the groups that share the launch.
        problem: what the family was asked; sizes of a range stand in it as they are.
        pdl: launched with programmatic dependent launch.
        by_size: in a plan for a range, the choices by the largest size each serves, where there are several; family,
            config, why and pdl are then those of the largest size.
    """

    name: str
    family: str
    config: Any
    why: str
    segments: tuple[Group, ...]
    problem: Any = None
    pdl: bool = False
    by_size: Table = ()

    @property
    def group(self) -> Group:
        return self.segments[0]


@dataclass(frozen=True)
class Selected:
    """The kernels of a piece in running order."""

    fused: Fused
    kernels: tuple[Kernel, ...]

    @property
    def values(self) -> Values:
        return self.fused.values

    @property
    def vendors(self) -> frozenset[str]:
        """Products of cuBLAS at every size of the plan whose epilogue would be a kernel of its own."""
        ours = (k for k in self.kernels if k.family == "gemm_vendor" and not k.by_size and not k.problem.plain)
        return frozenset(k.group.contract.name for k in ours if k.group.contract is not None)

    def __str__(self) -> str:
        return "\n".join(
            f"{k.family or k.group.kind} {k.name}: {k.config or ''} {k.why}".rstrip() for k in self.kernels
        )


def in_vain(selected: Selected, options: Options) -> frozenset[str]:
    """Products of more than few tokens past which a scale was hoisted and that do not stream, as what was measured is
    another kind of product."""
    hoisted, found = selected.values.hoisted, set()
    for kernel in selected.kernels:
        product = kernel.group.contract
        if product is None or not kernel.group.parts_read or options.target.interpreted:
            continue
        families = kernel.by_size or ((at_size(kernel.problem).m, kernel),)
        if any(size > FEW_TOKENS and choice.family != "gemm_stream" for size, choice in families):
            found.add(hoisted[product.name])
    return frozenset(found)


def select(fused: Fused, options: Options, misaligned: Collection[str] = ()) -> Selected:
    """Families and configs.

    Args:
        fused: the groups.
        options: the target chosen for.
        misaligned: inputs whose memory does not start at a multiple of 16 bytes.
    """
    groups = [_cut(g, fused) for g in fused.groups]
    launches = _segments(groups, fused.values)
    return Selected(fused, tuple(_kernel(launch, fused, options, misaligned) for launch in launches))


def _cut(group: Group, fused: Fused) -> Group:
    """A pointwise group with its elements cut into rows where that spares index arithmetic."""
    if group.kind != "pointwise" or not group.rows or not group.cols:
        return group
    if not _index_work(group):
        return group
    best = group
    deps = fused.dependencies
    for cols in _widths(group, fused.values):
        try:
            cut = compose(group.members, [s.value for s in group.stores], fused.values, deps.inlined, cols)
        except Refused:
            continue
        if _index_work(cut) < _index_work(best):
            best = cut
    return best


def _widths(group: Group, values: Values) -> list[int]:
    """Lengths of the trailing dimensions of what is stored, from short to long."""
    widths = []
    for store in group.stores:
        shape, width = values.layouts[store.value].shape, 1
        for size in reversed(shape[1:]):
            width *= size
            if width > 1:
                widths.append(width)
    return list(dict.fromkeys(widths))


def _index_work(group: Group) -> int:
    """Divisions, remainders and indirect reads whose operand varies along the columns."""
    count = 0
    offsets = [load.offset for load in group.loads] + [s.offset for s in group.stores]
    seen = set()
    for offset in offsets:
        for atom in offset.atoms():
            if atom in seen:
                continue
            seen.add(atom)
            if isinstance(atom, (Div, Mod)) and atom.base.varies(COL):
                count += 1
            if isinstance(atom, Indirect) and varies(atom.value, COL):
                count += 1
    return count


def reads_and_writes(group: Group, values: Values) -> tuple[set[str], set[str]]:
    """Values in memory that a group's launch reads and writes."""
    reads = {load.value for load in group.loads}
    if group.contract is not None:
        reads |= {group.contract.a.base, group.contract.b.base}
    if group.foreign is not None:
        reads |= {values.base(r) for r in group.foreign.reads}
    for name in group.members:
        made = values.definitions[name]
        if isinstance(made, Item):
            reads.add(made.of)
    writes = {s.value for s in group.stores}
    if group.kind in ("extern", "item", "empty"):
        writes |= set(group.members)
    return reads, writes


def _segments(groups: list[Group], values: Values) -> list[tuple[Group, ...]]:
    """Launches in running order: independent groups of one kind and width joined."""
    graph = nx.DiGraph()
    owner: dict[str, int] = {}
    for number, group in enumerate(groups):
        graph.add_node(number)
        reads, writes = reads_and_writes(group, values)
        for name in reads:
            if name in owner:
                graph.add_edge(owner[name], number)
        owner.update(dict.fromkeys(writes, number))
    joined: dict[int, list[int]] = {n: [n] for n in graph}
    wide = [n for n in graph if groups[n].kind in ("pointwise", "row") and groups[n].rows and groups[n].cols]
    below = _reachable(graph)
    for a, b in itertools.combinations(wide, 2):
        if b - a > NEAR or a not in joined or b not in joined or below[a] >> b & 1 or below[b] >> a & 1:
            continue
        if _alike(groups[a], groups[b]) and len(joined[a]) + len(joined[b]) <= MAX_SEGMENTS:
            joined[a] += joined.pop(b)
            nx.contracted_nodes(graph, a, b, self_loops=False, copy=False)
            below = _reachable(graph)
    order = nx.lexicographical_topological_sort(graph, key=lambda n: n)
    return [tuple(groups[i] for i in joined[n]) for n in order]


def _reachable(graph: nx.DiGraph) -> dict[int, int]:
    """For each node the set of nodes below it, as bits."""
    below: dict[int, int] = {}
    for node in reversed(list(nx.topological_sort(graph))):
        below[node] = 0
        for successor in graph.successors(node):
            below[node] |= below[successor] | 1 << successor
    return below


def _alike(x: Group, y: Group) -> bool:
    """Whether two groups can be segments of one launch."""
    return x.kind == y.kind and alike(x.cols, y.cols) and (x.kind == "pointwise" or x.cols <= LOOP_FROM)


def _kernel(segments: tuple[Group, ...], fused: Fused, options: Options, misaligned: Collection[str]) -> Kernel:
    group = segments[0]
    if group.kind in ("extern", "item", "empty"):
        why = group.foreign.why if group.foreign is not None else ""
        return Kernel(group.name, "", None, why, segments)
    if group.contract is not None:
        operand = fused.values.base(group.contract.b.base)
        given = operand in fused.values.given
        steady = given and options.steady and operand in fused.values.parameters
        itemsize = _widest_tile(group, fused.values)
        bare = group.contract.name in fused.dependencies.bare
        problem: Any = gemm_problem(group, group.contract, options, misaligned, itemsize, given, steady, bare)
        return _chosen(segments, "", problem, options)
    if group.kind == "row" and isinstance(group.cols, Size):
        raise Undecided(f"%{group.name} reduces rows of {group.cols} columns, and its tile has to hold one")
    family = _family(segments)
    elements = max(sum(typical(g.rows) for g in segments) * typical(group.cols), 1)
    moved = sum(traffic(g, fused.values) for g in segments)
    widest = _widest(segments, fused.values)
    problem = Problem(tuple(g.rows for g in segments), group.cols, widest, max(moved // elements, 1))
    return _chosen(segments, family, problem, options, looped=group.kind == "row" and group.cols > LOOP_FROM)


def _chosen(segments: tuple[Group, ...], family: str, problem: Any, options: Options, looped: bool = False) -> Kernel:
    table = by_size(family, problem, options, looped)
    own = table[-1][1] if table else choose(family, problem, options, looped)
    name = segments[0].name
    return Kernel(name, own.family, own.config, own.why, segments, problem, own.pdl, table if len(table) > 1 else ())


def _family(segments: tuple[Group, ...]) -> str:
    """The schedule that suits these rows: see the families' docstrings for why each exists."""
    group = segments[0]
    gathers = any(isinstance(a, Indirect) for load in group.loads for a in load.offset.atoms())
    if group.kind == "row":
        if len(segments) > 1 and group.cols <= 512:
            return "rope"
        if group.cols > LOOP_FROM:
            return "rows"
        sums = all(r.kind == "sum" for g in segments for r in g.reductions)
        return "norm" if sums and group.cols >= 1024 else "rows"
    if len(segments) > 1 and group.rows > 1 and not isinstance(group.cols, Size) and 32 <= group.cols <= 512:
        return "rope"
    if gathers and len(segments) == 1 and typical(group.rows) >= 1 and typical(group.cols) >= 256:
        return "gather"
    return "pointwise"


def _widest(segments: tuple[Group, ...], values: Values) -> torch.dtype:
    names = [s.value for g in segments for s in g.stores] + [load.value for g in segments for load in g.loads]
    dtypes = [values.layouts[n].dtype for n in names if typical(values.layouts[n].numel) > 1] or [torch.float32]
    return max(dtypes, key=lambda d: d.itemsize)


def is_looped(kernel: Kernel) -> bool:
    """Whether a launch walks its rows tile by tile instead of holding them."""
    return kernel.group.kind == "row" and kernel.group.cols > LOOP_FROM


def _widest_tile(group: Group, values: Values) -> int:
    """Bytes per element of the widest matrix that an epilogue reads or stores."""
    names = [s.value for s in group.stores if not s.summed] + [load.value for load in group.body_loads]
    layouts = [values.layouts[n] for n in names]
    vector = max(typical(group.cols), typical(group.rows))
    return max((v.dtype.itemsize for v in layouts if typical(v.numel) > vector), default=0)


def gemm_problem(
    group: Group,
    product: Contract,
    options: Options,
    misaligned: Collection[str] = (),
    widest: int = 0,
    given: bool = False,
    steady: bool = False,
    bare: bool = False,
) -> GemmProblem:
    """A GEMM group as its families see it.

    Args:
        widest: bytes per element of what its epilogue moves.
        given: the second operand is an argument of the piece that the piece leaves as it is.
        steady: and a parameter that was there before.
        bare: cuBLAS computes it and leaves what follows to another kernel.
    """
    x, w = product.a, product.b
    (sk, sn), (sm, sx) = w.layout.stride, x.layout.stride
    for number in (group.cols, product.k, group.pair, sk, sn, sm, sx, x.offset, w.offset):
        if isinstance(number, Size):
            raise Undecided(f"%{product.name} has {number} for an extent, stride or offset that decides its kernel")
    layout = "nk" if sk == 1 or product.k == 1 or sn != 1 else "kn"
    aligned = all(v.base not in misaligned and v.offset * v.layout.dtype.itemsize % 16 == 0 for v in (x, w))
    return GemmProblem(
        product.m,
        group.columns if group.half else group.cols,
        product.k,
        x.layout.dtype,
        layout,
        paired=group.pair is not None,
        pair_offset=group.pair or 0,
        halves=group.half,
        x_strides=(0, sm, sx),
        w_strides=(0, sn, sk),
        aligned=aligned,
        allow_tf32=options.allow_tf32,
        epilogue_itemsize=widest,
        plain=_plain(group, product),
        rounds=product.rounded,
        w_given=given,
        w_steady=steady,
        summed=group.summed,
        scaled=bool(group.parts_read),
        bare=bare,
    )


def _plain(group: Group, product: Contract) -> bool:
    """Whether all that is stored is the product itself, row by row."""
    dense = product.layout.stride == (product.n, 1) and group.cols == product.n
    return dense and [s.value for s in group.stores] == [product.name]


def operand(view: View, layout: str) -> View:
    """A GEMM's second operand as its family takes it: [N, K] or [K, N]."""
    if layout == "kn":
        return view
    old = view.layout
    return replace(view, layout=replace(old, shape=old.shape[::-1], stride=old.stride[::-1]))
