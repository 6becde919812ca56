"""Stage 2: the trace without what says nothing.

Enters: a functional ATen trace. Leaves: the same with ops that hand on their argument (`alias`, `detach`, a copy to the
dtype it has) replaced by it, `getitem`s of views resolved to views, and nodes that nothing reads gone. It stands before
`specialize`, so that it is done once for all sizes. It refuses nothing.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch

from .ir import Node, Ref, Spec, Trace, iter_refs, map_tree

aten = torch.ops.aten

HANDS_ON = {aten.alias.default, aten.detach.default, aten.lift_fresh.default, aten.lift.default}


def canonicalize(trace: Trace) -> Trace:
    """The trace without aliases, no-ops and dead nodes."""
    same: dict[str, str] = {}
    specs = trace.specs()

    def leaf(value: object) -> object:
        return Ref(same.get(value.name, value.name)) if isinstance(value, Ref) else value

    kept: list[Node] = []
    for node in trace.nodes:
        node = replace(node, args=map_tree(node.args, leaf), kwargs=map_tree(dict(node.kwargs), leaf))
        if _hands_on(node, specs):
            same[node.name] = node.args[0].name
        else:
            kept.append(node)
    outputs = tuple(replace(o, ref=same.get(o.ref, o.ref)) for o in trace.outputs)
    mutations = tuple((i, same.get(v, v)) for i, v in trace.mutations)
    needed = {o.ref for o in outputs} | {v for _, v in mutations}
    needed |= {r.name for o in outputs for r in iter_refs(o.value)}
    live: list[Node] = []
    for node in reversed(kept):
        if node.name in needed or _acts(node):
            needed.update(node.refs())
            live.append(node)
    return replace(trace, nodes=tuple(reversed(live)), outputs=outputs, mutations=mutations)


def _hands_on(node: Node, specs: dict[str, object]) -> bool:
    """Whether the node's result is its first argument, bit for bit and in the same memory."""
    if not node.args or not isinstance(node.args[0], Ref):
        return False
    if node.op in HANDS_ON:
        return True
    before, after = specs[node.args[0].name], node.spec
    if node.op in (aten.view.default, aten._unsafe_view.default, aten.expand.default) and isinstance(after, Spec):
        return isinstance(before, Spec) and before.shape == after.shape and before.stride == after.stride
    return False


def _acts(node: Node) -> bool:
    """Whether the node does something besides computing its result (an op that returns nothing)."""
    if node.op is operator.getitem or not isinstance(node.op, torch._ops.OpOverload):
        return False
    schema = node.op._schema
    return not schema.returns or schema.is_mutable
