"""The memory of a tensor: which bytes are its, and the same bytes elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def misaligned(args: Sequence[Any], tensors: Iterable[int]) -> tuple[int, ...]:
    """Which of the arguments at these positions, tensors, do not start at a multiple of 16 bytes."""
    return tuple(i for i in tensors if args[i].data_ptr() & 15)


def copied(tensor: torch.Tensor, whole: bool) -> torch.Tensor:
    """A copy with the tensor's strides and alignment; `whole`: with all that its storage holds behind it as well."""
    start, end = span(tensor)
    size = tensor.dtype.itemsize
    count = tensor.untyped_storage().nbytes() // size - tensor.storage_offset() if whole else (end - start) // size
    shift = start % 16 // size
    memory = torch.empty(shift + count, dtype=tensor.dtype, device=tensor.device)
    memory[shift:].copy_(tensor.as_strided((count,), (1,)))
    return memory.as_strided(tensor.shape, tensor.stride(), shift)


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor and the one after its last."""
    if not tensor.numel():
        return 0, 0
    start = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
