"""What a kernel costs at least: the bytes it moves and the operations it does.

The fuser weighs groups by these numbers, the dump prints them, the benchmark sets times beside them. An element that
several reads of one kernel touch counts once: it comes from memory once and from a cache afterwards. In a plan for a
range of sizes all of it counts at the typical one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

from .affine import Affine, Atom, Indirect, Var
from .expr import Apply, Index, Load, walk
from .group import Group
from .size import typical
from .values import Layout, Values


def traffic(group: Group, values: Values) -> int:
    """Bytes the group's kernel moves: each distinct element read once, each store written once."""
    read: dict[str, list[Affine]] = {}
    for node in group.loads:
        read.setdefault(node.value, []).append(node.offset)
    total = sum(
        min(distinct(offsets), typical(_numel(values.layouts[name]))) * values.layouts[name].dtype.itemsize
        for name, offsets in read.items()
    )
    total += sum(typical(values.layouts[name].nbytes) for name in {s.value for s in group.stores})
    if group.contract is not None:
        product = group.contract
        total += typical(product.m * product.k + product.k * group.columns) * product.a.layout.dtype.itemsize
    if group.foreign is not None:
        read_whole = [values.layouts[b] for b in map(values.base, group.foreign.reads) if b in values.layouts]
        total += sum(typical(layout.nbytes) for layout in read_whole)
        total += sum(typical(layout.nbytes) for layout in group.foreign.layouts if layout is not None)
    return total


def flops(group: Group) -> int:
    """Floating-point operations: two per multiply-add of a GEMM, one per function and element otherwise."""
    if group.contract is not None:
        return 2 * typical(group.contract.m) * typical(group.columns) * typical(group.contract.k)
    count = sum(
        1 for n in walk(*(r.expr for r in group.reductions), *(s.expr for s in group.stores)) if isinstance(n, Apply)
    )
    return (count + len(group.reductions)) * typical(group.rows) * typical(group.cols)


def distinct(offsets: Sequence[Affine]) -> int:
    """Elements of one value that reads at these offsets touch, each counted once: halves of a row that a rotation reads
    for both of its results, a window and the same window shifted."""
    alone, runs = 0, dict[tuple[tuple[int, int], ...], list[tuple[int, int]]]()
    for offset in offsets:
        if any(isinstance(atom, Indirect) for atom in offset.atoms()):
            alone += footprint(offset)
            continue
        start, length, outer = _run(offset)
        runs.setdefault(outer, []).append((start, start + length))
    shared = sum(math.prod(size for _, size in outer) * _union(spans) for outer, spans in runs.items())
    return min(alone + shared, sum(map(footprint, offsets)))


def _run(offset: Affine) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """An offset as runs of neighbours: start and length of the first run, (step, count) of the dimensions that repeat
    it."""
    length, outer = 1, []
    for atom, step in sorted(offset.terms, key=lambda term: abs(typical(term[1]))):
        step, low, high = typical(step), *map(typical, atom.range)
        if abs(step) <= length:
            length += abs(step) * (high - low)
        else:
            outer.append((abs(step), high - low + 1))
    return typical(offset.range[0]), length, tuple(outer)


def _union(spans: Iterable[tuple[int, int]]) -> int:
    """Length of what intervals cover together."""
    covered, reached = 0, None
    for start, end in sorted(spans):
        begin = start if reached is None else max(start, reached)
        covered += max(0, end - begin)
        reached = end if reached is None else max(end, reached)
    return covered


@lru_cache(maxsize=1 << 14)
def footprint(offset: Affine) -> int:
    """Elements that one read at this offset touches, at most: as many as its variables take values together, and as its
    terms do. The row that each head of a token looks up is one and the same."""
    seen: dict[int, int] = {}
    stack = [offset]
    found = {offset}
    while stack:
        for atom in stack.pop().atoms():
            if isinstance(atom, Var):
                seen[atom.dim] = atom.size
            elif isinstance(atom, Indirect):
                fresh = [o for o in _looked_up(atom) if o not in found]
                found.update(fresh)
                stack += fresh
    return min(math.prod(map(typical, seen.values())), math.prod(_values(atom) for atom, _ in offset.terms))


def _values(atom: Atom) -> int:
    """How many values an atom takes, at most."""
    low, high = map(typical, atom.range)
    count = high - low + 1
    if isinstance(atom, Var):
        return count
    inner = _looked_up(atom) if isinstance(atom, Indirect) else [atom.base]
    return min(count, math.prod(map(footprint, inner)))


def _looked_up(atom: Indirect) -> list[Affine]:
    """Where an index is read from, or what it is computed from."""
    return [node.offset for node in walk(atom.value) if isinstance(node, (Load, Index))]


def _numel(layout: Layout) -> int:
    return max(layout.numel, 1) if layout.dtype != torch.bool else layout.numel
