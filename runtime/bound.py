"""A plan's call as the callable of one piece: with the tensors that the piece holds, its result in the piece's own
structure, on the device of its tensors, and something else instead (the piece's graph) wherever the plan does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .lowered import Loaded, Runner
from .making import one_of_several
from .memory import span


def structured(loaded: Loaded, constants: tuple[torch.Tensor, ...]) -> Runner:
    """The plan's call with constants appended and its result in the piece's own structure."""
    call, structure = loaded.call, loaded.plan.facts.structure
    flat = structure == pytree.tree_structure((0,) * structure.num_leaves)
    if flat:
        return call if not constants else lambda *args: call(*args, *constants)
    if structure.is_leaf():
        return lambda *args: call(*args, *constants)[0]
    return lambda *args: pytree.tree_unflatten(list(call(*args, *constants)), structure)


def apart(run: Runner, instead: Runner, tensors: Sequence[int], written: Sequence[int]) -> Runner:
    """The plan, unless an input that it writes shares memory with another: what is read after the write depends on
    which addresses were passed then.

    Args:
        run, instead: of the plan, and what runs otherwise.
        tensors, written: positions of the arguments that are tensors, and of those that the plan writes.
    """

    def checked(*args: Any) -> Any:
        spans = {i: span(args[i]) for i in tensors}
        for i in written:
            start, end = spans[i]
            if any(start < e and s < end for j, (s, e) in spans.items() if j != i):
                return instead(*args)
        return run(*args)

    return checked


def at_start(run: Runner, instead: Runner, tensors: Sequence[int], constants: Sequence[torch.Tensor]) -> Runner:
    """The plan, unless a tensor does not begin where its storage does: the plan knows no more of a storage than its
    tensor, and the piece counts from the storage's start."""

    def checked(*args: Any) -> Any:
        given = [*(args[i] for i in tensors), *constants]
        return run(*args) if all(t.storage_offset() == 0 for t in given) else instead(*args)

    return checked


def on_device(run: Runner, device: torch.device) -> Runner:
    """The plan on the device of its tensors, whichever is current: a kernel is launched on the current one."""
    if not one_of_several(device):
        return run

    def there(*args: Any) -> Any:
        if torch.cuda.current_device() == device.index:
            return run(*args)
        with torch.cuda.device(device):
            return run(*args)

    return there
