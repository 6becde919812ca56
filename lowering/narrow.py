"""Stage 7b: what other kernels only read rounded is stored rounded.

Enters: `Fused`. Leaves: `Fused`, some of whose values lie in memory in a narrower dtype. A sum of a residual stream is
computed in fp32, and its own kernel goes on with that; where every other kernel rounds it first, fp32 in memory is
twice the bytes for the same result. It stands after fusion, as before nobody knows which readers are other kernels, and
refuses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from .expr import Apply, Expr, Load, children, walk
from .fuse import Fused
from .group import Group
from .values import Map


def narrow(fused: Fused) -> Fused:
    """The same groups over narrower memory; results are the same bit by bit."""
    values, wanted = fused.values, _wanted(fused.groups)
    fixed, layouts = values.kept | fused.dependencies.pinned, dict(values.layouts)
    for name, dtypes in wanted.items():
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        if dtype is None or name in fixed or not isinstance(values.definitions.get(name), Map):
            continue
        if _rounds(layouts[name].dtype, dtype):
            layouts[name] = replace(layouts[name], dtype=dtype)
    return replace(fused, dependencies=replace(fused.dependencies, values=replace(values, layouts=layouts)))


def _wanted(groups: tuple[Group, ...]) -> dict[str, set[torch.dtype | None]]:
    """Of every value that is read the dtypes it is rounded to before anything else; None where it is read as it is."""
    found: dict[str, set[torch.dtype | None]] = {}
    for group in groups:
        roots = [r.expr for r in group.reductions] + [s.expr for s in group.stores]
        for load, reader in _readers(roots):
            to = reader.dtype if isinstance(reader, Apply) and reader.fn == "cast" else None
            found.setdefault(load.value, set()).add(to)
    return found


def _readers(roots: list[Expr]) -> Iterator[tuple[Load, Expr | None]]:
    """Every read of memory with each expression that it stands in; None for what is stored or reduced itself."""
    yield from ((root, None) for root in roots if isinstance(root, Load))
    for node in walk(*roots):
        yield from ((child, node) for child in children(node) if isinstance(child, Load))


def _rounds(dtype: torch.dtype, to: torch.dtype) -> bool:
    """Whether the second is a narrower floating point dtype."""
    return dtype.is_floating_point and to.is_floating_point and to.itemsize < dtype.itemsize
