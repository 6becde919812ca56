"""TMA's descriptors of a GEMM's operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..lowering.errors import Unsupported
from .binary import LaidOutDescriptor, TensorDescriptor

# Of base and strides: what cuTensorMapEncodeTiled asks for.
TMA_ALIGNMENT_BYTES = 16
# Places of one operand that are remembered: a model's layers, and what activations get from the allocator.
MOST_PLACES = 256


class Descriptors:
    """An operand's descriptors, one for each place where it was found: one is looked up in a fraction of what it costs.

    Args:
        make: the descriptor of a tensor, which a call of this gives as well.
    """

    __slots__ = ("_known", "_make")

    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        self._make = make
        self._known: dict[tuple, Any] = {}

    def __call__(self, tensor: torch.Tensor) -> Any:
        if not tensor.is_cuda:
            return self._make(tensor)
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        made = self._known.get(place)
        if made is None:
            made = self._make(tensor)
            # What lies there next is described alike, and whoever frees the memory gets it back.
            made.base = Place(place[0], tensor.dtype)
            if len(self._known) >= MOST_PLACES:
                self._known.clear()
            self._known[place] = made
        return made


class Place:
    """A tensor as a descriptor needs it: its address and dtype, not its memory."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def descriptor(tensor: torch.Tensor, block: list[int], name: str, layout: Any = None) -> Any:
    """Describe a row-major matrix for TMA: a `TensorDescriptor`, or Gluon's where a layout is given.

    Args:
        tensor: 2-D, unit innermost stride; rows may be apart (a slice of a wider matrix).
        block: tile shape in the tensor's axis order.
        name: for the error.
        layout: of a tile in shared memory.

    Raises:
        Unsupported: base or row stride is not a multiple of 16 bytes, or the innermost stride is not 1.
    """
    rows, cols = tensor.shape
    # torch gives axes of length 1 any stride it likes; the descriptor must not see those.
    unit = TMA_ALIGNMENT_BYTES // tensor.itemsize
    row_stride = tensor.stride(0) if rows > 1 else -(-cols // unit) * unit
    inner = tensor.stride(1) if cols > 1 else 1
    if tensor.data_ptr() % TMA_ALIGNMENT_BYTES or row_stride * tensor.itemsize % TMA_ALIGNMENT_BYTES or inner != 1:
        raise Unsupported(
            f"TMA descriptor of {name}",
            f"address {tensor.data_ptr():#x}, strides {tuple(tensor.stride())} of {tensor.itemsize}-byte elements",
            stage="kernels.tma",
            remedy="Choose gemm_simple for operands that are not 16-byte aligned.",
        )
    # Without their own checks, which repeat these and cost a third of a launch.
    made = object.__new__(TensorDescriptor if layout is None else LaidOutDescriptor)
    made.base, made.shape, made.strides, made.block_shape = tensor, [rows, cols], [row_stride, 1], block
    if layout is not None:
        made.layout = layout
    return made
