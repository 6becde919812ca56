"""Stage 3: the symbols of a trace are bound to integers.

Enters: a canonical trace with sympy expressions, and a size for each symbol. Leaves: the same trace with integers in
every shape, stride and argument. The guards that the trace took for granted are evaluated first: `failed_guard` names
the first that does not hold for these sizes, and the caller then traces the piece again for them. One trace serves
every size whose guards hold. Expressions over numbers only known at run time (a 0-d input read as a scalar) stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy

from .ir import Scalar, Spec, Trace, map_tree


def failed_guard(trace: Trace, binding: Mapping[sympy.Symbol, int]) -> str | None:
    """The first guard that does not hold for these sizes, as text; None when all hold."""
    values = {s: sympy.Integer(v) for s, v in binding.items()}
    for guard in trace.guards:
        if guard.xreplace(values) != sympy.true:
            return str(guard)
    return None


def specialize(trace: Trace, binding: Mapping[sympy.Symbol, int]) -> Trace:
    """The trace for these sizes.

    Args:
        trace: symbolic or already concrete.
        binding: a size for every symbol of the trace.
    """
    values = {s: sympy.Integer(v) for s, v in binding.items()}
    known: dict[sympy.Basic, Any] = {}

    def leaf(value: Any) -> Any:
        if isinstance(value, Spec):
            return replace(
                value,
                shape=tuple(map(leaf, value.shape)),
                stride=tuple(map(leaf, value.stride)),
                offset=leaf(value.offset),
            )
        if isinstance(value, Scalar):
            return replace(value, expr=value.expr.xreplace(values))
        if not isinstance(value, sympy.Basic):
            return value
        if value not in known:
            bound = value.xreplace(values)
            known[value] = int(bound) if bound.is_Integer else float(bound) if bound.is_Float else bound
            if bound in (sympy.true, sympy.false):
                known[value] = bool(bound)
        return known[value]

    return replace(
        trace,
        inputs=tuple(replace(i, spec=leaf(i.spec), value=leaf(i.value)) for i in trace.inputs),
        nodes=tuple(
            replace(n, args=map_tree(n.args, leaf), kwargs=map_tree(dict(n.kwargs), leaf), spec=map_tree(n.spec, leaf))
            for n in trace.nodes
        ),
        outputs=tuple(replace(o, spec=leaf(o.spec), value=leaf(o.value)) for o in trace.outputs),
        symbols={},
        guards=(),
    )
