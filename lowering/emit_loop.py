"""Bodies for rows too wide for registers: one pass over the row per reduction, one more to store.

The four functions of `kernels.rows.Looped`, generated from a row group: `init` starts pass p's accumulator, `partial`
takes in a tile of columns, `finish` reduces the accumulator's lanes, `store` writes. What a pass needs of earlier ones
it finds in `scalars`. Each pass computes its values anew from memory: the row does not fit anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .emit_expr import Body, neutral_text
from .expr import RowScalar, walk
from .functions import TYPES, atomic, register
from .group import Group, Reduction

STEPS = {
    "sum": "acc + tl.where(mask, {0}, 0)",
    "prod": "acc * tl.where(mask, {0}, 1)",
    "max": "maximum(acc, tl.where(mask, {0}, {1}))",
    "min": "minimum(acc, tl.where(mask, {0}, {1}))",
    "any": "acc | (mask & {0}).to(tl.int32)",
    "all": "acc & ((~mask) | {0}).to(tl.int32)",
}


def looped_body(
    name: str, group: Group, tensors: Sequence[str], dtypes: Mapping[str, torch.dtype], names: Mapping[str, str]
) -> str:
    """Source of the four functions and of the `Looped` that holds them.

    Args:
        name: prefix of the functions.
        group: a row group.
        tensors: values in memory, in the order of the tuple `t`.
        dtypes, names: of values.
    """
    init, partial, finish = [], [], []
    for number, reduction in enumerate(group.reductions):
        dtype = accumulator(reduction)
        start = neutral_text(reduction.kind, dtype)
        init.append((number, [f"return {_start(reduction, start, dtype)}"]))
        body = Body(group, dtypes, names, epilogue=False)
        value = body.operand(reduction.expr)
        lines = _pointers(
            tensors, names, [n.value for n in walk(reduction.expr) if hasattr(n, "offset") and hasattr(n, "value")]
        )
        lines += _scalars(group, names, [n.value for n in walk(reduction.expr) if isinstance(n, RowScalar)])
        partial.append((number, [*lines, *body.lines, *_step(reduction, value, start, dtype)]))
        finish.append((number, _finish(reduction)))
    store = Body(group, dtypes, names, epilogue=False)
    for item in group.stores:
        store.store(item)
    used = [n.value for s in group.stores for n in walk(s.expr) if isinstance(n, RowScalar)]
    stored = _pointers(tensors, names, list(tensors)) + _scalars(group, names, used) + store.lines
    parts = [
        _function(f"{name}_init(PASS: tl.constexpr, R: tl.constexpr, C: tl.constexpr)", init),
        _function(
            f"{name}_partial(PASS: tl.constexpr, SEGMENT: tl.constexpr, row, col, mask, t, acc, scalars)", partial
        ),
        _function(f"{name}_finish(PASS: tl.constexpr, acc)", finish),
        _function(f"{name}_store(SEGMENT: tl.constexpr, row, col, mask, t, scalars)", [(None, stored)]),
        f"{name} = rows.Looped({len(group.reductions)}, {name}_init, {name}_partial, {name}_finish, {name}_store)",
    ]
    return "\n\n\n".join(parts)


def accumulator(reduction: Reduction) -> torch.dtype:
    """The dtype a reduction is accumulated in."""
    return torch.int32 if reduction.kind in ("any", "all") else register(reduction.expr.dtype)


def _start(reduction: Reduction, neutral: str, dtype: torch.dtype) -> str:
    if reduction.kind in ("any", "all"):
        return f"tl.full((R, C), {int(reduction.kind == 'all')}, tl.int32)"
    start = f"tl.full((R, C), {neutral}, {TYPES[dtype]})"
    return f"({start}, tl.zeros((R, C), tl.int64))" if reduction.kind.startswith("arg") else start


def _step(reduction: Reduction, value: str, neutral: str, dtype: torch.dtype) -> list[str]:
    if not reduction.kind.startswith("arg"):
        return [f"return {STEPS[reduction.kind].format(value if atomic(value) else f'({value})', neutral)}"]
    better = ">" if reduction.kind == "argmax" else "<"
    return [
        "best, place = acc",
        f"value = tl.where(mask, {value}, {neutral})",
        f"better = (value {better} best) | ((value != value) & (best == best))",
        "return tl.where(better, value, best), tl.where(better, col.to(tl.int64), place)",
    ]


def _finish(reduction: Reduction) -> list[str]:
    if reduction.kind in ("any", "all"):
        return [f"return row_{reduction.kind}(acc != 0)"]
    if not reduction.kind.startswith("arg"):
        return [f"return row_{reduction.kind}(acc)"]
    side = "max" if reduction.kind == "argmax" else "min"
    return [
        "best, place = acc",
        f"top = row_{side}(best)",
        "held = (best == top) | ((best != best) & (top != top))",
        "return row_min(tl.where(held, place, 9223372036854775807))",
    ]


def _pointers(tensors: Sequence[str], names: Mapping[str, str], used: Sequence[str]) -> list[str]:
    return [f"{names[n]}_ptr = t[{i}]" for i, n in enumerate(tensors) if n in used]


def _scalars(group: Group, names: Mapping[str, str], used: Sequence[str]) -> list[str]:
    return [f"{names[r.value]} = scalars[{i}]" for i, r in enumerate(group.reductions) if r.value in used]


def _function(head: str, cases: Sequence[tuple[int | None, list[str]]]) -> str:
    lines = ["@triton.jit", f"def {head}:"]
    for number, body in cases:
        indent = "    " if number is None else "        "
        if number is not None:
            lines.append(f"    if PASS == {number}:")
        lines += [indent + line for line in body]
    return "\n".join(lines)
