"""What the runtime needs to know of a plan beside its text: few enough facts to be written down, and read back without
planning.

Leaves: `Facts`, of a schedule; as values of JSON, and from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .ir import Input
from .schedule import Schedule
from .show import dtype_name
from .size import Size, Span

# Sizes after which the divisibility by 16 of what is linear in the size repeats.
PERIOD = 16


@dataclass(frozen=True)
class Argument:
    """An argument of a plan's call.

    Args:
        name: the input's.
        dtype: of a tensor; None for anything else.
        shape, stride: of a tensor, in integers and `Size`s.
        value: of a size, an integer or a `Size`.
    """

    name: str
    dtype: torch.dtype | None = None
    shape: tuple[Any, ...] = ()
    stride: tuple[Any, ...] = ()
    value: Any = None


@dataclass(frozen=True)
class Facts:
    """What of a plan outlives its stages.

    Args:
        arguments: of its call, in order.
        mutated: names of those that are written.
        structure: of what the piece returns.
        kernels, foreign: launches that are ours, ops that run as themselves.
        once: one of the latter may do more than return what it computes, so it runs when it is called and never else.
        bounds: sizes up to which a launch has one config, for a plan that serves a range.
        period: sizes in a row that show every binary that a launch of one config needs.
        absolute: the plan holds for tensors that begin where their storage does.
    """

    arguments: tuple[Argument, ...]
    mutated: tuple[str, ...]
    structure: Any
    kernels: int
    foreign: int
    once: bool
    bounds: tuple[int, ...]
    period: int
    absolute: bool = False

    @staticmethod
    def of(schedule: Schedule) -> Facts:
        """The facts of a schedule."""
        launches, values = schedule.launches(), schedule.values
        linear = any(isinstance(g.cols, Size) for k in launches for g in k.segments)
        kernels = sum(bool(k.family) for k in launches)
        return Facts(
            tuple(map(_argument, values.inputs)),
            tuple(name for name, _ in values.mutations),
            values.structure,
            kernels,
            len(launches) - kernels,
            any(not _repeatable(k.group.foreign.node.op) for k in launches if k.group.foreign is not None),
            tuple(sorted({bound for k in launches for bound, _ in k.by_size})),
            PERIOD if linear else 1,
            values.absolute,
        )

    def to_json(self) -> dict[str, Any]:
        """Lists, strings and integers that say the same.

        Raises:
            NotImplementedError: what the piece returns is nested in types that torch cannot write down.
        """
        arguments = [
            [a.name, None if a.dtype is None else dtype_name(a.dtype), *map(_dims, (a.shape, a.stride))]
            + _dims((a.value,))
            for a in self.arguments
        ]
        structure = pytree.treespec_dumps(self.structure)
        return {**vars(self), "arguments": arguments, "structure": structure}

    @staticmethod
    def from_json(said: Mapping[str, Any]) -> Facts:
        """The facts that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it did not write this.
        """
        return Facts(
            tuple(
                Argument(name, dtype and getattr(torch, dtype), _sizes(shape), _sizes(stride), *_sizes([value]))
                for name, dtype, shape, stride, value in said["arguments"]
            ),
            tuple(said["mutated"]),
            pytree.treespec_loads(said["structure"]),
            int(said["kernels"]),
            int(said["foreign"]),
            bool(said["once"]),
            tuple(said["bounds"]),
            int(said["period"]),
            bool(said["absolute"]),
        )


def _repeatable(op: Any) -> bool:
    """Whether a call more of an op changes nothing but its results: it draws no random numbers, and is one of torch's
    own, of which that is known."""
    if not isinstance(op, torch._ops.OpOverload) or op.namespace not in ("aten", "prims"):
        return False
    return torch.Tag.nondeterministic_seeded not in op.tags


def _argument(given: Input) -> Argument:
    if given.spec is None:
        return Argument(given.name, value=given.value if isinstance(given.value, (int, Size)) else None)
    return Argument(given.name, given.spec.dtype, given.spec.shape, given.spec.stride)


def _dims(numbers: tuple[Any, ...]) -> list[Any]:
    """Integers as they are; a `Size` as its factor, its constant and the ends of its span."""
    return [[n.factor, n.const, n.span.lo, n.span.hi] if isinstance(n, Size) else n for n in numbers]


def _sizes(numbers: Any) -> tuple[Any, ...]:
    return tuple(Size(n[0], n[1], Span(n[2], n[3], n[3])) if isinstance(n, list) else n for n in numbers)
