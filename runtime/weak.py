"""Outputs that live in a CUDA graph's memory pool without holding it: `weak_ref`.

A captured piece writes its outputs to the same addresses at every replay. Holding the output tensors themselves would
keep those blocks out of the pool for good: one set per piece and size. A weak reference has the same address, sizes,
strides and dtype but owns nothing, so the pool hands the block to the next piece's capture once the last real reference
is gone. It is valid for as long as the graph's pool lives and until another graph of that pool reuses the block, which
the capture order makes safe (pieces replay in the order they were captured in).

Only CUDA tensors become weak. What lives elsewhere does not belong to the pool and is kept as it is, as is what a plain
strided view cannot express (tensor subclasses, sparse layouts, lazily conjugated or negated views).

Source of the idea: vLLM's `weak_ref_tensors`, which needs vLLM's compiled part; the way used here is the one by which
torch's own CUDA graph trees rebuild outputs from addresses.
"""

from __future__ import annotations

from typing import Any

import torch

# Tensor types without behaviour of their own; a subclass may carry more than memory and metadata.
_PLAIN = (torch.Tensor, torch.nn.Parameter)

# The kind of device whose memory a graph's pool owns.
_POOL_DEVICE = "cuda"


class _CudaBytes:
    """A range of device memory as the CUDA array interface describes it; owns nothing."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def weak_ref(value: Any) -> Any:
    """Give `value` with every CUDA tensor in it replaced by one that does not own its memory.

    Args:
        value: a tensor, or tuples, lists and dicts of tensors to any depth; anything else is passed through.

    Returns:
        The same structure. Tensors have the same address, sizes, strides and dtype; tensors that shared a storage still
        do. An empty tensor is returned as it is: it holds no memory.
    """
    return _weaken(value, {})


def _weaken(value: Any, storages: dict[tuple[int, int], torch.UntypedStorage]) -> Any:
    if isinstance(value, torch.Tensor):
        return _weak_tensor(value, storages) if _in_pool(value) else value
    if isinstance(value, list):
        return [_weaken(item, storages) for item in value]
    if isinstance(value, dict):
        return {key: _weaken(item, storages) for key, item in value.items()}
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        items = [_weaken(item, storages) for item in value]
        # A named tuple takes its fields one by one.
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _in_pool(tensor: torch.Tensor) -> bool:
    """Say whether `tensor` is plain strided device memory that a graph's pool may own."""
    plain = type(tensor) in _PLAIN and tensor.layout is torch.strided and not (tensor.is_conj() or tensor.is_neg())
    return plain and tensor.device.type == _POOL_DEVICE and tensor.numel() > 0


def _weak_tensor(tensor: torch.Tensor, storages: dict[tuple[int, int], torch.UntypedStorage]) -> torch.Tensor:
    owned = tensor.untyped_storage()
    key = owned.data_ptr(), owned.nbytes()
    if key not in storages:
        storages[key] = _borrow(owned.data_ptr(), owned.nbytes(), tensor.device)
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    with torch.no_grad():
        return empty.set_(storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())


def _borrow(address: int, nbytes: int, device: torch.device) -> torch.UntypedStorage:
    """Make a storage over device memory that someone else owns; launches nothing, so it may run inside a capture."""
    construct = getattr(torch._C, "_construct_storage_from_data_pointer", None)
    if construct is not None:
        return construct(address, device, nbytes)
    return torch.as_tensor(_CudaBytes(address, nbytes), device=device).untyped_storage()
