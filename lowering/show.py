"""Expressions as text, for people.

    keep(float32(%_to_copy_3[4096 i0 + i1]) * float32(%weight[i1]))

`i0`, `i1`, … are indices, `%x[…]` is the element of x so many elements after its first one, a dtype's name is a cast to
it, and `keep` a value that is rounded to its dtype when it is stored and not before. Long expressions are cut.
"""

from __future__ import annotations

import torch

from .affine import Affine, Atom, Bounded, Div, Indirect, Mod, Var
from .expr import Acc, Apply, Const, Expr, Index, Load, Masked, RowScalar

INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
}  # fmt: skip
# An expression may share its parts, so that its text can be exponentially longer than it.
LONGEST = 240


def expression(expr: Expr) -> str:
    """An expression, cut where it is long."""
    text = _text(expr, LONGEST, inside=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _text(expr: Expr, room: int, inside: bool = True) -> str:
    """No more of it than there is room for, and a little beyond; `inside` another operator."""
    if room < 0:
        return "…"
    match expr:
        case Load():
            return f"%{expr.value}[{_offset(expr.offset, room)}]"
        case Const():
            return str(expr.value)
        case Index():
            return _offset(expr.offset, room)
        case RowScalar() | Acc():
            return f"%{expr.value}"
        case Masked():
            cond = _text(expr.cond, room, inside=False)
            return f"({_text(expr.body, room - len(cond))} where {cond})"
        case Apply():
            return _call(expr, room, inside)
    return type(expr).__name__.lower()


def _call(expr: Apply, room: int, inside: bool) -> str:
    infix = INFIX.get(expr.fn) if len(expr.args) == 2 else None
    parts = []
    for arg in expr.args:
        parts.append(_text(arg, room - 1, inside=infix is not None))
        room -= len(parts[-1]) + 2
    if infix is not None:
        text = f"{parts[0]} {infix} {parts[1]}"
        return f"({text})" if inside else text
    name = dtype_name(expr.dtype) if expr.fn == "cast" else expr.fn
    return f"{name}({', '.join(parts)})"


def _offset(offset: Affine, room: int) -> str:
    if room < 0:
        return "…"
    terms = []
    for atom, coefficient in offset.terms:
        terms.append(_atom(atom, room - 1) if coefficient == 1 else f"{coefficient} {_atom(atom, room - 1)}")
        room -= len(terms[-1])
    text = " + ".join(terms)
    if not isinstance(offset.const, int):
        # A size that is known at run time: comparing it would decide it.
        return f"{text} + {offset.const}" if terms else str(offset.const)
    if not terms or not offset.const:
        return text or str(offset.const)
    return f"{text} - {-offset.const}" if offset.const < 0 else f"{text} + {offset.const}"


def _atom(atom: Atom, room: int) -> str:
    match atom:
        case Var():
            return f"i{atom.dim}"
        case Div():
            return f"(({_offset(atom.base, room)}) // {atom.divisor})"
        case Mod():
            return f"(({_offset(atom.base, room)}) % {atom.divisor})"
        case Bounded():
            base = _offset(atom.base, room)
            return f"({base})" if " " in base else base
        case Indirect():
            return _text(atom.value, room)


def dtype_name(dtype: torch.dtype) -> str:
    """As it is written after `torch.`."""
    return str(dtype).removeprefix("torch.")
