"""Stage 3: the symbols of a trace are bound to integers, or to a `Size` that stands for a range of them.

Enters: a canonical trace with sympy expressions, and a size for each symbol. Leaves: the same trace with integers in
every shape, stride and argument. The guards that the trace took for granted are evaluated first: `failed_guard` names
the first that does not hold for these sizes, and the caller then traces the piece again for them. One trace serves
every size whose guards hold. Expressions over numbers only known at run time (a 0-d input read as a scalar) stay.
With a `Size` every guard must hold over its whole span, and every number must be linear in it (`Undecided` otherwise).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import sympy

from .ir import Scalar, Spec, Trace, map_tree
from .size import Size, Undecided, Whole, evaluated


def failed_guard(trace: Trace, binding: Mapping[sympy.Symbol, Whole]) -> str | None:
    """The first guard that does not hold for these sizes, as text; None when all hold.

    Raises:
        Undecided: it holds at a part of a range.
    """
    bound = _bound(binding)
    return next((str(guard) for guard in trace.guards if bound(guard) not in (True, sympy.true)), None)


def specialize(trace: Trace, binding: Mapping[sympy.Symbol, Whole]) -> Trace:
    """The trace for these sizes.

    Args:
        trace: symbolic or already concrete.
        binding: a size for every symbol of the trace.

    Raises:
        Undecided: a number is not linear in a range of sizes.
    """
    bound = _bound(binding)
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
            return replace(value, expr=sympy.sympify(bound(value.expr)))
        if not isinstance(value, sympy.Basic):
            return value
        if value not in known:
            known[value] = bound(value)
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


def _bound(binding: Mapping[sympy.Symbol, Whole]) -> Callable[[sympy.Basic], Any]:
    """An expression with the sizes put in: a number or truth value of Python's where nothing else is left."""
    values = {s: sympy.Integer(v) for s, v in binding.items() if not isinstance(v, Size)}
    sizes = {s: v for s, v in binding.items() if isinstance(v, Size)}

    def bound(expr: sympy.Basic) -> Any:
        expr = expr.xreplace(values)
        if expr.free_symbols & sizes.keys():
            if expr.free_symbols - sizes.keys():
                raise Undecided(f"{expr} joins the size with a number known at run time only")
            return evaluated(expr, sizes)
        if expr in (sympy.true, sympy.false):
            return bool(expr)
        return int(expr) if expr.is_Integer else float(expr) if expr.is_Float else expr

    return bound
