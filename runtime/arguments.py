"""What plans take for granted of a piece's arguments, and the check of it.

Plans hold the dtypes, the fixed sizes, the strides and the plain numbers of the piece's examples; called with others
they would read memory that is not theirs, or compute with what was given first. Dynamo and vLLM guard their calls
themselves; whoever calls a piece directly is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from ..lowering.errors import UserError
from ..lowering.intake import Examples, held

# A size or a stride: fixed, or computed from the sizes.
Dim: TypeAlias = int | sympy.Expr
# What it is at a call; None where no argument says.
Number: TypeAlias = int | None
# Of a tensor: shape and strides.
Geometry = tuple[tuple[Number, ...], tuple[Number, ...]]


@dataclass(frozen=True)
class _Tensor:
    """One tensor argument."""

    position: int
    dtype: torch.dtype
    shape: tuple[Dim, ...]
    stride: tuple[Dim, ...]

    def at(self, sizes: Mapping[sympy.Symbol, int]) -> Geometry:
        """Shape and strides where the symbols are these sizes."""
        return tuple(_number(d, sizes) for d in self.shape), tuple(_number(d, sizes) for d in self.stride)

    def no_such(self, given: Any) -> str:
        """What is wrong with the kind of an argument; '' when nothing is."""
        if not isinstance(given, torch.Tensor):
            return f"it is {type(given).__name__}, not a tensor"
        if given.dtype != self.dtype:
            return f"it is {given.dtype}, not {self.dtype}"
        if given.dim() != len(self.shape):
            return f"its shape is {tuple(given.shape)}, not {_said(self.shape)}"
        return ""


@dataclass(frozen=True)
class _Plain:
    """One argument that is a number or a text: the plan holds it, or it is a size."""

    position: int
    value: Any

    def no_such(self, given: Any) -> str:
        """What is wrong with an argument; '' when nothing is."""
        whole = isinstance(given, Integral) and not isinstance(given, bool)
        if isinstance(self.value, sympy.Expr):
            return "" if whole else f"it is {type(given).__name__}, not an int"
        # NumPy's numbers, and members of enumerations, are the numbers they are of.
        plain = int(given) if whole else float(given) if isinstance(given, float) else given
        # As text not-a-number equals itself, and 0.0 is not -0.0.
        return "" if repr(plain) == repr(self.value) else f"it is {given!r}, not {self.value!r}"


class Arguments:
    """The arguments of one piece.

    Args:
        graph: the piece; a number that nothing in it reads may be any.
        examples: what they look like.
    """

    def __init__(self, graph: fx.GraphModule, examples: Examples) -> None:
        self.count = len(examples.values)
        self._tensors: list[_Tensor] = []
        self._plain: list[_Plain] = []
        placeholders = graph.graph.find_nodes(op="placeholder")
        for i, (node, value) in enumerate(zip(placeholders, examples.values, strict=True)):
            if isinstance(value, torch.Tensor):
                shape, stride = tuple(map(_dim, value.shape)), tuple(map(_dim, value.stride()))
                self._tensors.append(_Tensor(i, value.dtype, shape, stride))
            elif node.users and isinstance(value, (int, float, complex, str, torch.SymInt)):
                self._plain.append(_Plain(i, _dim(value)))
        self._arguments: list[_Tensor | _Plain] = [*self._tensors, *self._plain]
        self._places = examples.symbols()
        self._at = lru_cache(maxsize=1024)(self._wanted)
        self._held_needs_grad = any(tensor.requires_grad for tensor in held(graph).values())

    def check(self, args: Sequence[Any]) -> None:
        """Cost: a few attribute reads per tensor, and at sizes that are new an evaluation of each size and stride.

        Raises:
            UserError: an argument is not what the piece was made for, or gradients would be needed.
        """
        if len(args) != self.count:
            self._refuse(f"{len(args)} were given, the piece takes {self.count}")
        for argument in self._arguments:
            if wrong := argument.no_such(args[argument.position]):
                self._refuse(f"of number {argument.position}: {wrong}")
        shapes, numbers = self._at(tuple(args[p] if d is None else args[p].shape[d] for p, d in self._places.values()))
        for tensor, (shape, stride) in zip(self._tensors, shapes, strict=True):
            if wrong := _misplaced(args[tensor.position], shape, stride):
                self._refuse(f"of number {tensor.position}: {wrong}")
        for plain, number in zip(self._plain, numbers, strict=True):
            if number is not None and args[plain.position] != number:
                self._refuse(f"of number {plain.position}: it is {args[plain.position]}, not {number}")
        if torch.is_grad_enabled() and (
            self._held_needs_grad or any(args[tensor.position].requires_grad for tensor in self._tensors)
        ):
            raise UserError(
                "the piece",
                "it would have to keep gradients, and terrazzo compiles for inference only",
                stage="runtime",
                remedy="Call it under torch.no_grad() or torch.inference_mode().",
            )

    def _wanted(self, sizes: tuple[int, ...]) -> tuple[list[Geometry], list[Number]]:
        """At these sizes: shape and strides of each tensor, and each number that is computed from them."""
        bound = dict(zip(self._places, sizes, strict=True))
        numbers = [_number(p.value, bound) if isinstance(p.value, sympy.Expr) else None for p in self._plain]
        return [tensor.at(bound) for tensor in self._tensors], numbers

    def _refuse(self, fact: str) -> None:
        remedy = "Make a CompiledPiece of these, or one with symbolic sizes where they vary."
        raise UserError("the piece's arguments", fact, stage="runtime", remedy=remedy)


def _misplaced(given: torch.Tensor, shape: tuple[Number, ...], stride: tuple[Number, ...]) -> str:
    """What is wrong with a tensor's sizes or strides; '' when nothing is."""
    sizes, steps = given.shape, given.stride()
    if sizes != shape and any(wanted is not None and size != wanted for size, wanted in zip(sizes, shape, strict=True)):
        return f"its shape is {tuple(sizes)}, not {_said(shape)}"
    # A dimension of one element may have any stride: torch itself varies them.
    if steps != stride and given.numel():
        dims = zip(sizes, steps, stride, strict=True)
        if any(size > 1 and wanted is not None and step != wanted for size, step, wanted in dims):
            return f"its strides are {steps}, not {_said(stride)}, for which it was planned"
    return ""


def _dim(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else value


def _number(dim: Dim, sizes: Mapping[sympy.Symbol, int]) -> Number:
    if not isinstance(dim, sympy.Expr):
        return dim
    return int(dim.xreplace(sizes)) if dim.free_symbols <= sizes.keys() else None


def _said(dims: Sequence[Dim | None]) -> str:
    """Dimensions as a tuple is written; what varies is any."""
    texts = [str(d) if isinstance(d, int) else "any" for d in dims]
    return f"({', '.join(texts)}{',' * (len(texts) == 1)})"
