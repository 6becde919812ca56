"""Calls of ops that write their arguments, as functionalization leaves them in a trace.

It wraps such an op: what is written is copied, the op called on the copies, and both its results and the copies are
returned. As an op of its own that costs a call of Python many times what the op's takes; so plans call the op itself,
and copy only what something reads afterwards.
Source: `auto_functionalized_v2` of torch, whose keywords these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .ir import Node, Ref, iter_refs


@dataclass(frozen=True)
class Slice:
    """A range of a base along one dimension."""

    dim: Any
    start: Any
    end: Any


@dataclass(frozen=True)
class Writing:
    """A call.

    Args:
        op: what is called.
        given: arguments that it only reads, by name.
        written: by name of an argument that it writes, the base (a number) and which part of it; None for no argument.
        bases: what is written, each returned after the op's own results.
    """

    op: torch._ops.OpOverload
    given: Mapping[str, Any]
    written: Mapping[str, tuple[int, Slice | None] | None]
    bases: tuple[Ref, ...]

    @property
    def read(self) -> set[str]:
        """Values that it only reads."""
        return {ref.name for ref in iter_refs(tuple(self.given.values()))}


def writing(node: Node) -> Writing | None:
    """What the node calls; None for another node, and where it writes lists of tensors or other parts than slices."""
    if node.op is not torch.ops.higher_order.auto_functionalized_v2 or len(node.args) != 1:
        return None
    op, kwargs = node.args[0], dict(node.kwargs)
    bases = kwargs.pop("_all_bases", ())
    if not isinstance(op, torch._ops.OpOverload) or not all(isinstance(base, Ref) for base in bases):
        return None
    given: dict[str, Any] = {}
    written: dict[str, tuple[int, Slice | None] | None] = {}
    for argument in op._schema.arguments:
        name = argument.name
        if argument.alias_info is None or not argument.alias_info.is_write:
            if name in kwargs:
                given[name] = kwargs.pop(name)
            continue
        if isinstance(argument.type, torch.ListType) or argument.is_out or f"_{name}_base_index" not in kwargs:
            return None
        base = kwargs.pop(f"_{name}_base_index")
        kwargs.pop(f"_{name}_alias", None)
        part = [kwargs.pop(f"_{name}_slice_{what}", None) for what in ("dim", "start", "end")]
        written[name] = None if base is None else (base, None if part[0] is None else Slice(*part))
    # What is left describes a part in another way.
    return None if kwargs else Writing(op, given, written, tuple(bases))
