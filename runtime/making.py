"""Planning and compiling: one thread at a time, on the device of the piece, collecting no garbage."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from typing import Any

import torch

_one_thread = RLock()


def _forked() -> None:
    """A fork has none of the threads that might hold the lock."""
    global _one_thread
    _one_thread = RLock()


os.register_at_fork(after_in_child=_forked)


@contextmanager
def making(device: torch.device) -> Iterator[None]:
    """Inside, this thread alone plans, compiles and loads, on this device."""
    with _one_thread, _uncollected(), entered(device):
        yield


def entered(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, the device is the current one, where there are several."""
    return torch.cuda.device(device) if one_of_several(device) else nullcontext()


def one_of_several(device: torch.device) -> bool:
    """Whether another device may be the current one."""
    return device.type == "cuda" and device.index is not None and torch.cuda.device_count() > 1


@contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, no garbage is collected: planning makes millions of objects that live on, and every full collection among
    them walks all that the process holds, vLLM's models and tokenizers included."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
