"""What each stage promises, checked after it ran: a stage that breaks its promise is a defect, found here and not in a
kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx as nx
import sympy

from .depend import Dependencies, direct_reads
from .errors import InternalError
from .expr import Acc, RowScalar, walk
from .fuse import Fused
from .ir import Spec, Trace
from .schedule import Schedule
from .select import Selected, reads_and_writes
from .values import Values


def after(stage: str, result: Any) -> None:
    """Checks the result of the stage of that name.

    Raises:
        InternalError: an invariant does not hold.
    """
    check = CHECKS.get(stage)
    if check is not None:
        check(result)


def _fail(stage: str, what: str, fact: str) -> None:
    raise InternalError(what, fact, stage=stage, remedy="This is a defect of terrazzo; please report the piece.")


def _trace(trace: Trace) -> None:
    known = {i.name for i in trace.inputs}
    for node in trace.nodes:
        for name in node.refs():
            if name not in known:
                _fail("intake", node.name, f"it reads %{name}, which nothing before it defines")
        if node.name in known:
            _fail("intake", node.name, "the name is taken")
        known.add(node.name)
    for output in trace.outputs:
        if output.ref and output.ref not in known:
            _fail("intake", output.ref, "it is returned but not defined")


def _concrete(trace: Trace) -> None:
    _trace(trace)
    for name, spec in trace.specs().items():
        if isinstance(spec, Spec) and any(isinstance(d, sympy.Basic) for d in (*spec.shape, *spec.stride)):
            _fail("specialize", name, f"a size is still symbolic: {spec}")


def _values(values: Values) -> None:
    for name, view in values.views.items():
        if view.base in values.views:
            _fail("define", name, f"it is a view of the view %{view.base}")
        if view.base not in values.layouts:
            _fail("define", name, f"its base %{view.base} has no layout")


def _hoisted(values: Values) -> None:
    _values(values)
    known = {i.name for i in values.inputs}
    for name, made in values.definitions.items():
        for read in direct_reads(made, values):
            if read not in known:
                _fail("hoist", name, f"it reads %{read}, which nothing before it defines")
        known.add(name)


def _dependencies(deps: Dependencies) -> None:
    if not nx.is_directed_acyclic_graph(deps.graph):
        _fail("depend", "the graph", "it has a cycle")


def _fused(fused: Fused) -> None:
    made: set[str] = {i.name for i in fused.values.inputs}
    for group in fused.groups:
        reads, writes = reads_and_writes(group, fused.values)
        for name in reads - writes:
            if name not in made:
                _fail("fuse", group.name, f"it reads %{name}, which no earlier kernel stores")
        made |= writes
        _leaves(group)
    for name in fused.dependencies.pinned:
        if name not in made:
            _fail("fuse", name, "it must be in memory, but nothing stores it")


def _narrowed(fused: Fused) -> None:
    _fused(fused)
    for name in fused.narrowed:
        if name in fused.values.kept | fused.dependencies.pinned:
            _fail("narrow", name, "others see its memory, and it is in another dtype than they expect")


def _leaves(group: Any) -> None:
    reductions: set[str] = set()
    for reduction in group.reductions:
        for node in walk(reduction.expr):
            if isinstance(node, RowScalar) and node.value not in reductions:
                _fail("fuse", group.name, f"reduction %{node.value} is used before it is computed")
        reductions.add(reduction.value)
    for store in group.stores:
        for node in walk(store.expr):
            if isinstance(node, Acc) and group.contract is None:
                _fail("fuse", group.name, "an accumulator without a GEMM")


def _selected(selected: Selected) -> None:
    made: set[str] = {i.name for i in selected.values.inputs}
    for kernel in selected.kernels:
        effects = [reads_and_writes(g, selected.values) for g in kernel.segments]
        for reads, writes in effects:
            if reads - writes - made:
                _fail("select", kernel.name, f"it reads {sorted(reads - writes - made)} before they are stored")
        for _, writes in effects:
            made |= writes


def _schedule(schedule: Schedule) -> None:
    dropped: set[str] = set()
    for step in schedule.steps:
        for group in step.kernel.segments:
            reads, _ = reads_and_writes(group, schedule.values)
            if reads & dropped:
                _fail("schedule", step.kernel.name, f"it reads {sorted(reads & dropped)}, dropped earlier")
        dropped |= set(step.drops)
    kept = {schedule.values.base(o.ref) for o in schedule.outputs if o.kind == "value"}
    if kept & dropped:
        _fail("schedule", "the outputs", f"{sorted(kept & dropped)} are returned but dropped")


CHECKS: dict[str, Callable[[Any], None]] = {
    "intake": _trace,
    "canonicalize": _trace,
    "specialize": _concrete,
    "define": _values,
    "hoist": _hoisted,
    "depend": _dependencies,
    "fuse": _fused,
    "narrow": _narrowed,
    "select": _selected,
    "schedule": _schedule,
}
