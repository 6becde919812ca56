"""Memory for what a plan computes on its way.

A launch that no graph holds waits for the host, and what a piece allocates is a good part of that: by the profile of a
served model on a slow host torch's dispatcher took 6.5 us a tensor, the allocator alone 2.3 (docs/perf-log.md).
Source of the short way: the code that torch's Inductor writes allocates by the same function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# shape, stride, dtype -> tensor
Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]

_DIRECT: Empty | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


def empty_on(device: torch.device) -> Empty:
    """Return what makes a tensor of undefined contents on a device: torch's `empty_strided`, or past its dispatcher,
    which knows the current GPU only and fills nothing where torch was told to leave no memory undefined."""
    if _DIRECT is not None and device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        if device.index == torch._C._cuda_getDevice():
            return _DIRECT

    def empty(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    return empty
