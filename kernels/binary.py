"""A compiled kernel and how it is launched: by the C function that Triton's own launcher calls in the end.

Between the two lie, in Python, memory for kernels that ask for scratch (none here does) and the encoding of TMA
descriptors, which is done once for each here. Where Triton's launcher is not what is expected, it is called instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.nvidia import driver as nvidia
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as LaidOutDescriptor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

DESCRIPTORS = (TensorDescriptor, LaidOutDescriptor)


class Binary:
    """Triton's `CompiledKernel`, loaded.

    Args:
        compiled: with its handles initialised.

    Attributes:
        metas: per descriptor what it is encoded by; None where the C function cannot be called directly.
    """

    __slots__ = ("_head", "_raw", "compiled", "metas")

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        run = compiled.run
        self._raw, self.metas = _raw(run)
        if self._raw is not None:
            # Neither scratch, nor what hooks get, nor hooks.
            fixed = (run.launch_cooperative_grid, run.launch_pdl, None, None)
            self._head = (compiled.function, *fixed, compiled.packed_metadata, None, None, None)

    def __call__(self, grid: tuple[int, int, int], stream: int, bound: tuple, hooks: Any) -> None:
        """Launch on a stream; `bound` are all parameters in order, constexprs included."""
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        compiled = self.compiled
        if enter.calls or leave.calls:
            metadata = compiled.launch_metadata(grid, stream, *bound)
            compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *bound)
        elif self.metas is None:
            compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *bound)
        else:
            self.launch(grid, stream, _flat(bound, self.metas))

    def launch(self, grid: tuple[int, int, int], stream: int, flat: Sequence[Any]) -> None:
        """Launch with parameters as the C function takes them; no hook hears of it."""
        self._raw(*grid, stream, *self._head, *flat)


def _raw(run: Any) -> tuple[Any, tuple | None]:
    """The C function under a launcher of Triton, and per descriptor what it is encoded by; None where it cannot be
    called directly."""
    launch = getattr(run, "launch", None)
    # What it takes is Triton's own affair, and another in 3.7.
    known = triton.__version__.split(".")[:2] == ["3", "6"]
    if not known or launch is None or run.global_scratch_size or run.profile_scratch_size:
        return None, None
    if not inspect.isfunction(launch):
        return launch, ()
    # Triton wraps it in a closure where there are descriptors.
    held = inspect.getclosurevars(launch).nonlocals
    metas = tuple(held.get("tensordesc_meta") or ())
    if "launcher" not in held or not metas or None in metas:
        return None, None
    return held["launcher"], metas


def _flat(bound: tuple, metas: tuple) -> list:
    """The parameters with each descriptor as the C function takes it: encoded, and its shape and strides."""
    flat: list = []
    encodings = iter(metas)
    for value in bound:
        if type(value) in DESCRIPTORS:
            flat += _encoded(value, next(encodings))
        else:
            flat.append(value)
    return flat


def _encoded(descriptor: Any, meta: dict[str, Any]) -> list:
    """A descriptor for the kernel whose tiles `meta` describes; made at its first use and kept with it."""
    known = descriptor.__dict__.get("encoded")
    if known is not None and known[0] is meta:
        return known[1]
    shape, strides = descriptor.shape, descriptor.strides
    encode = partial(
        driver.active.utils.fill_tma_descriptor,
        descriptor.base.data_ptr(),
        meta["swizzle"],
        meta["elem_size"],
        nvidia.TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]],
        meta["block_size"],
        shape,
        strides,
        1 if descriptor.padding == "nan" else 0,
    )
    try:
        made = encode()
    except RuntimeError as error:
        if "context" not in str(error):
            raise
        # A thread that has not asked the GPU for anything yet has none, and this gives it one.
        torch.cuda.mem_get_info()
        made = encode()
    flat = [made, *shape, *strides]
    descriptor.encoded = meta, flat
    return flat
