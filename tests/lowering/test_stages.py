"""Every stage's result prints, a broken one is caught by `verify`, and the journal tells what ran and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from terrazzo.kernels.target import Target
from terrazzo.lowering import verify
from terrazzo.lowering.depend import Dependencies
from terrazzo.lowering.emit import Plan
from terrazzo.lowering.errors import InternalError
from terrazzo.lowering.expr import Acc, RowScalar
from terrazzo.lowering.fuse import Fused
from terrazzo.lowering.intake import Examples
from terrazzo.lowering.ir import Ref, Trace
from terrazzo.lowering.options import Options
from terrazzo.lowering.pipeline import Journal, plan, trace
from terrazzo.lowering.schedule import Schedule
from terrazzo.lowering.select import Selected
from terrazzo.lowering.values import Map, Values
from terrazzo.tools.dump_plan import STAGES

from .equal import odd, traced


@cache
def journal() -> Journal:
    """A small piece through all stages: a product, a view, a reduction, an op as itself."""

    def fn(x: Any, w: Any) -> Any:
        h = torch.relu(x @ w)
        return torch.softmax(h, -1).view(-1), torch.sort(h)[0].exp()

    args, kept = [odd(4, 6), odd(6, 6)], Journal()
    made = trace(traced(fn, 2), Examples.of(traced(fn, 2), args), journal=kept)
    plan(made, {}, Options(Target.named("h200")), title="a title", journal=kept)
    return kept


MENTIONED = {
    "intake": ["%x0", "aten.mm.default", "aten.relu.default", "return"],
    "canonicalize": ["%x0", "aten.mm.default", "aten.relu.default", "return"],
    "specialize": ["%x0", "float32[4, 6]", "aten.sort"],
    "define": ["contract %mm", "map %relu", "extern %sort", "view"],
    "hoist": ["contract %mm", "map %relu", "extern %sort", "view"],
    "depend": ["x0 -> mm", "bytes", "in memory", "inlined"],
    "fuse": ["gemm relu", "row div", "extern sort", "not fused: relu + div"],
    "narrow": ["gemm relu", "row div", "extern sort"],
    "select": ["gemm_", "relu", "rows div", "extern sort"],
    "schedule": ["makes relu", "drops"],
    "emit": ["div_body", "def call(x0, x1)"],
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_result_prints_what_it_holds(stage: str) -> None:
    made = journal().result(stage)
    text = made.source if isinstance(made, Plan) else str(made)
    for words in MENTIONED[stage]:
        assert words in text, f"{words} is not in\n{text}"


def test_the_journal_holds_every_stage_once_with_its_time() -> None:
    start = time.perf_counter()
    journal.cache_clear()
    stages = journal().stages
    wall = time.perf_counter() - start
    assert [name for name, _, _ in stages] == list(STAGES)
    assert all(seconds > 0 for _, _, seconds in stages)
    assert sum(seconds for _, _, seconds in stages) < wall
    with pytest.raises(StopIteration):
        journal().result("nothing")


def test_a_stage_that_raises_leaves_the_ones_before_it_in_the_journal() -> None:
    kept = Journal()
    made = trace(traced(torch.sin, 1), Examples((odd(3),)), journal=kept)
    broken = replace(made, nodes=(replace(made.nodes[0], args=(Ref("nobody"),)),))
    with pytest.raises(InternalError, match="%nobody"):
        plan(broken, {}, Options(Target.named("h200")), journal=kept)
    assert [name for name, _, _ in kept.stages] == ["intake", "canonicalize", "specialize"]


@pytest.mark.parametrize("stage", STAGES)
def test_whole_results_pass(stage: str) -> None:
    verify.after(stage, journal().result(stage))


def reads_what_nobody_defines(t: Trace) -> Trace:
    return replace(t, nodes=(replace(t.nodes[0], args=(Ref("nobody"), Ref("x1"))), *t.nodes[1:]))


def reads_what_comes_later(t: Trace) -> Trace:
    return replace(t, nodes=t.nodes[::-1])


def takes_a_name_twice(t: Trace) -> Trace:
    return replace(t, nodes=(*t.nodes, t.nodes[0]))


def returns_what_nobody_defines(t: Trace) -> Trace:
    return replace(t, outputs=(replace(t.outputs[0], ref="nobody"),))


def keeps_a_symbol(t: Trace) -> Trace:
    entry = t.inputs[0]
    assert entry.spec is not None
    symbolic = replace(entry, spec=replace(entry.spec, shape=(sympy.Symbol("s"), 6)))
    return replace(t, inputs=(symbolic, *t.inputs[1:]))


def views_a_view(v: Values) -> Values:
    name, view = next(iter(v.views.items()))
    return replace(v, views={**v.views, "above": replace(view, base=name)})


def views_nothing(v: Values) -> Values:
    name, view = next(iter(v.views.items()))
    return replace(v, views={name: replace(view, base="nobody")})


def defines_too_late(v: Values) -> Values:
    return replace(v, definitions=dict(reversed(v.definitions.items())))


def runs_in_a_circle(d: Dependencies) -> Dependencies:
    graph = d.graph.copy()
    graph.add_edge("relu", "mm", bytes=0)
    return replace(d, graph=graph)


def groups_in_the_wrong_order(f: Fused) -> Fused:
    return replace(f, groups=f.groups[::-1])


def stores_less_than_is_needed(f: Fused) -> Fused:
    return replace(f, groups=tuple(g for g in f.groups if g.kind != "row"))


def uses_a_sum_before_it_is_complete(f: Fused) -> Fused:
    row = next(g for g in f.groups if g.kind == "row")
    early = replace(row.reductions[0], expr=RowScalar(torch.float32, value=row.reductions[-1].value))
    wrong = replace(row, reductions=(early, *row.reductions[1:]))
    return replace(f, groups=tuple(wrong if g is row else g for g in f.groups))


def reads_an_accumulator_without_a_product(f: Fused) -> Fused:
    row = next(g for g in f.groups if g.kind == "row")
    store = replace(row.stores[0], expr=Acc(torch.float32, value="mm", which=0))
    return replace(f, groups=tuple(replace(g, stores=(store,)) if g is row else g for g in f.groups))


def kernels_in_the_wrong_order(s: Selected) -> Selected:
    return replace(s, kernels=s.kernels[::-1])


def segments_that_need_each_other(s: Selected) -> Selected:
    row = next(k for k in s.kernels if k.family == "rows")
    first = next(k for k in s.kernels if k.group.contract is not None)
    joined = replace(first, segments=(*first.segments, *row.segments))
    return replace(s, kernels=tuple(joined if k is first else k for k in s.kernels if k is not row))


def drops_what_is_read_later(s: Schedule) -> Schedule:
    return replace(s, steps=(replace(s.steps[0], drops=("relu",)), *s.steps[1:]))


def drops_what_is_returned(s: Schedule) -> Schedule:
    returned = next(s.values.base(o.ref) for o in s.outputs if o.kind == "value")
    return replace(s, steps=(*s.steps[:-1], replace(s.steps[-1], drops=(returned,))))


def returns_another_dtype(fused: Fused) -> Fused:
    values = fused.values
    name = next(n for n in values.kept if isinstance(values.definitions.get(n), Map))
    layouts = {**values.layouts, name: replace(values.layouts[name], dtype=torch.float16)}
    return replace(fused, dependencies=replace(fused.dependencies, values=replace(values, layouts=layouts)))


BROKEN: list[tuple[str, Callable[[Any], Any], str]] = [
    ("intake", reads_what_nobody_defines, "%nobody, which nothing before it defines"),
    ("intake", reads_what_comes_later, "which nothing before it defines"),
    ("intake", takes_a_name_twice, "the name is taken"),
    ("intake", returns_what_nobody_defines, "returned but not defined"),
    ("canonicalize", reads_what_comes_later, "which nothing before it defines"),
    ("specialize", keeps_a_symbol, "still symbolic"),
    ("define", views_a_view, "a view of the view"),
    ("define", views_nothing, "%nobody has no layout"),
    ("hoist", defines_too_late, "which nothing before it defines"),
    ("depend", runs_in_a_circle, "cycle"),
    ("fuse", groups_in_the_wrong_order, "which no earlier kernel stores"),
    ("fuse", stores_less_than_is_needed, "nothing stores it"),
    ("fuse", uses_a_sum_before_it_is_complete, "used before it is computed"),
    ("fuse", reads_an_accumulator_without_a_product, "an accumulator without a GEMM"),
    ("narrow", returns_another_dtype, "others see its memory"),
    ("select", kernels_in_the_wrong_order, "before they are stored"),
    ("select", segments_that_need_each_other, "before they are stored"),
    ("schedule", drops_what_is_read_later, "dropped earlier"),
    ("schedule", drops_what_is_returned, "returned but dropped"),
]


@pytest.mark.parametrize(("stage", "damage", "fact"), BROKEN)
def test_a_broken_result_is_caught(stage: str, damage: Callable[[Any], Any], fact: str) -> None:
    with pytest.raises(InternalError, match=fact) as caught:
        verify.after(stage, damage(journal().result(stage)))
    assert caught.value.stage == ("intake" if stage == "canonicalize" else stage)
    assert "defect of terrazzo" in str(caught.value)


def test_every_stage_but_the_last_is_verified() -> None:
    assert set(verify.CHECKS) == set(STAGES) - {"emit"}
    assert {stage for stage, _, _ in BROKEN} == set(verify.CHECKS)


def test_what_lies_on_another_device_runs_as_itself() -> None:
    with FakeTensorMode():
        args = [torch.empty(4, 8, device="cuda"), torch.empty((), device="cpu")]
    graph = fx.symbolic_trace(lambda x, scale: ((x + 1) * scale, scale.neg()))
    made = plan(trace(graph, Examples.of(graph, args)), {}, Options(Target.named("h200")), title="two devices")
    reasons = {k.name: k.why for k in made.schedule.launches() if not k.family}
    assert len(reasons) == 2 and all("kernels run on cuda:0" in why for why in reasons.values()), reasons
    assert "device = x.device" in made.source
