"""Scratch memory of split-K GEMMs: fp32 partial sums and arrival counters, per device and slot.

A kernel finds its counters at zero and leaves them at zero (the last program to arrive resets them), so nothing has to
be cleared between launches. Kernels that follow one another in stream order share a slot, with programmatic dependent
launch as well, because each of them waits for its predecessor before it writes here. Kernels that may run at the same
time (side streams, two graphs replayed at once) must be prepared with different slots.

Buffers are never freed: a captured CUDA graph may hold the address of one that was since replaced by a larger.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from ..lowering.errors import UserError

# First allocation: partials of 132 programs with four 128x128 fp32 tiles each are 34.6 MB, so most plans never grow it.
INITIAL_PARTIALS = 132 * 4 * 128 * 128
INITIAL_COUNTERS = 4096
# Without a device (the interpreter) sizes are tiny and start from nothing.
CPU_INITIAL_PARTIALS = 1 << 12


@dataclass(frozen=True)
class Workspace:
    """Scratch of one device and slot.

    Args:
        partials: fp32, flat, contents undefined.
        counters: int32, flat, all zero between launches.
    """

    partials: torch.Tensor
    counters: torch.Tensor


_current: dict[tuple[torch.device, int], Workspace] = {}
_replaced: list[Workspace] = []
_lock = threading.Lock()


def get(device: torch.device, partials: int, counters: int, slot: int = 0) -> Workspace:
    """Return scratch with at least that many fp32 partials and int32 counters.

    Args:
        device: where the kernel runs.
        partials: fp32 elements needed.
        counters: int32 elements needed.
        slot: kernels that may run at the same time use different slots.

    Raises:
        UserError: larger scratch is needed while a CUDA graph is being captured.
    """
    held = _current.get((device, slot))
    if held is not None and held.partials.numel() >= partials and held.counters.numel() >= counters:
        return held
    with _lock:
        return _grow(device, partials, counters, slot)


def for_splits(device: torch.device, tiles: int, split_k: int, sums: int, slot: int = 0) -> Workspace:
    """Return scratch for `split_k` programs that share each of so many tiles of `sums` sums; without a split, any."""
    need = tiles if split_k > 1 else 0
    return get(device, need * split_k * sums, need, slot)


def _grow(device: torch.device, partials: int, counters: int, slot: int) -> Workspace:
    held = _current.get((device, slot))
    if held is not None:
        partials = max(partials, held.partials.numel())
        counters = max(counters, held.counters.numel())
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise UserError(
            "split-K workspace",
            f"{partials * 4} bytes are needed on {device}, slot {slot}, while a CUDA graph is being captured",
            stage="kernels.workspace",
            remedy="Run the plan once at its largest size before the capture.",
        )
    partials = max(partials, INITIAL_PARTIALS if on_gpu else CPU_INITIAL_PARTIALS)
    fresh = Workspace(
        torch.empty(partials, dtype=torch.float32, device=device),
        torch.zeros(max(counters, INITIAL_COUNTERS), dtype=torch.int32, device=device),
    )
    if on_gpu:
        # Another stream may launch next: the zeros must be there before anyone holds the pointer.
        torch.cuda.current_stream(device).synchronize()
    if held is not None:
        _replaced.append(held)
    _current[(device, slot)] = fresh
    return fresh


def reserve(device: torch.device, like: torch.device, slot: int = 0) -> None:
    """Make the scratch of a device as large as another's: what kernels on tensors without memory asked for, say."""
    held = _current.get((like, slot))
    if held is not None:
        get(device, held.partials.numel(), held.counters.numel(), slot)
