"""What plans take for granted of a piece's arguments, and the check of it.

Plans hold the dtypes, the fixed sizes and the strides of the piece's examples; called with others they would read
memory that is not theirs. Dynamo and vLLM guard their calls themselves; whoever calls a piece directly is checked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..lowering.errors import UserError
from ..lowering.intake import Examples


@dataclass(frozen=True)
class _Tensor:
    """One tensor argument: its fixed sizes and strides by dimension."""

    position: int
    dtype: torch.dtype
    rank: int
    sizes: tuple[tuple[int, int], ...]
    strides: tuple[tuple[int, int], ...]

    @staticmethod
    def of(position: int, value: torch.Tensor) -> _Tensor:
        sizes = tuple((d, s) for d, s in enumerate(value.shape) if isinstance(s, int))
        strides = tuple((d, s) for d, s in enumerate(value.stride()) if isinstance(s, int))
        return _Tensor(position, value.dtype, value.dim(), sizes, strides)

    def wrong(self, given: Any) -> str:
        """What is wrong with an argument; '' when nothing is."""
        if not isinstance(given, torch.Tensor):
            return f"it is {type(given).__name__}, not a tensor"
        if given.dtype != self.dtype:
            return f"it is {given.dtype}, not {self.dtype}"
        shape = given.shape
        if len(shape) != self.rank or any(shape[d] != size for d, size in self.sizes):
            fixed = dict(self.sizes)
            wanted = ", ".join(str(fixed.get(d, "any")) for d in range(self.rank))
            return f"its shape is {tuple(shape)}, not ({wanted})"
        steps = given.stride()
        # A dimension of one element may have any stride: torch itself varies them.
        if given.numel() and any(shape[d] > 1 and steps[d] != step for d, step in self.strides):
            return f"its strides are {steps}, not those it was planned for"
        return ""


class Arguments:
    """The arguments of one piece."""

    def __init__(self, examples: Examples, held: Sequence[torch.Tensor]) -> None:
        self.count = len(examples.values)
        self._tensors = [_Tensor.of(i, v) for i, v in enumerate(examples.values) if isinstance(v, torch.Tensor)]
        self._held_needs_grad = any(tensor.requires_grad for tensor in held)

    def check(self, args: Sequence[Any]) -> None:
        """Cost: a few attribute reads per tensor.

        Raises:
            UserError: an argument is not what the piece was made for, or gradients would be needed.
        """
        if len(args) != self.count:
            self._refuse(f"{len(args)} were given, the piece takes {self.count}")
        for tensor in self._tensors:
            wrong = tensor.wrong(args[tensor.position])
            if wrong:
                self._refuse(f"of number {tensor.position}: {wrong}")
        if torch.is_grad_enabled() and (
            self._held_needs_grad or any(args[tensor.position].requires_grad for tensor in self._tensors)
        ):
            raise UserError(
                "the piece",
                "it would have to keep gradients, and terrazzo compiles for inference only",
                stage="runtime",
                remedy="Call it under torch.no_grad() or torch.inference_mode().",
            )

    def _refuse(self, fact: str) -> None:
        remedy = "Make a CompiledPiece of these, or one with symbolic sizes where they vary."
        raise UserError("the piece's arguments", fact, stage="runtime", remedy=remedy)
