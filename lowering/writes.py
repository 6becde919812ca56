"""Calls of ops that write their arguments, as functionalization leaves them in a trace.

It wraps such an op: what is written is copied, the op called on the copies, and both its results and the copies are
returned. As an op of its own that costs a call of Python many times what the op's takes; so plans call the op itself,
and copy only what something reads afterwards.
Source: `auto_functionalized_v2` of torch, whose keywords these are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .ir import Node, Ref, iter_refs

WRAPPED = torch.ops.higher_order.auto_functionalized_v2
# How the wrapper says which part of a base an argument is: keywords `_{argument}_{one of these}`.
PLACE = ("base_index", "alias", "slice_dim", "slice_start", "slice_end")


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
            An argument that it reads is among them where it is the very tensor that is written.
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
    if node.op is not WRAPPED or len(node.args) != 1:
        return None
    op, kwargs = node.args[0], dict(node.kwargs)
    bases = kwargs.pop("_all_bases", ())
    if not isinstance(op, torch._ops.OpOverload) or not all(isinstance(base, Ref) for base in bases):
        return None
    given: dict[str, Any] = {}
    written: dict[str, tuple[int, Slice | None] | None] = {}
    for argument in op._schema.arguments:
        name = argument.name
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if not writes and f"_{name}_base_index" not in kwargs:
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


@dataclass(frozen=True)
class Twice:
    """A call of an op that writes: by name of an argument that it reads, the one that it writes and that is the same
    tensor. Known of the piece's own nodes alone; where a function or a module that it calls writes as well, of none."""

    op: torch._ops.OpOverload
    same: Mapping[str, str]


def twice(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Twice | None:
    """Which arguments of a call are the same tensors; None for what is no op that writes."""
    op = getattr(op, "default", None) if isinstance(op, torch._ops.OpOverloadPacket) else op
    if not isinstance(op, torch._ops.OpOverload) or not op._schema.is_mutable:
        return None
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    writes = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    return Twice(op, {r: w for w in writes for r in tensors if r not in writes and tensors[r] is tensors.get(w)})


def as_called(node: Node, call: Twice) -> Node:
    """The wrapped call with arguments that are the same tensor as a written one given as that one is, where the wrapper
    would copy what is written and not what is read; the node as it is where it would not be understood."""
    kwargs = dict(node.kwargs)
    for read, written in call.same.items():
        kwargs.pop(read, None)
        places = {what: f"_{written}_{what}" for what in PLACE}
        kwargs |= {f"_{read}_{what}": node.kwargs[key] for what, key in places.items() if key in node.kwargs}
    changed = replace(node, kwargs=kwargs)
    return node if writing(changed) is None else changed
