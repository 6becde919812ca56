"""The device a kernel is chosen for, as the few numbers that the choices use.

`Target.current()` reads a CUDA device, `Target.named()` gives one that need not be here (selecting and compiling for
another machine), `Target.interpreter()` stands for Triton's interpreter on the CPU. Nothing else in `kernels/` asks the
driver about the hardware.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

from ..lowering.errors import UserError


@dataclass(frozen=True)
class Target:
    """One device.

    Attributes:
        arch: compute capability as one number: 80, 90, 100.
        sm_count: streaming multiprocessors.
        l2_bytes: size of the L2 cache.
        bandwidth_bytes_s: what a large device-to-device copy reaches, bytes read plus bytes written per second.
        smem_bytes: shared memory that one block may opt in to.
        interpreted: kernels run in Triton's interpreter.
        name: for the dumps.
    """

    arch: int
    sm_count: int
    l2_bytes: int
    bandwidth_bytes_s: float
    smem_bytes: int
    interpreted: bool
    name: str

    @property
    def pdl(self) -> bool:
        """Whether a launch may start before its predecessor ends (Hopper and later, never the interpreter)."""
        return self.arch >= 90 and not self.interpreted

    @staticmethod
    def current(device: torch.device | int | None = None) -> Target:
        """The CUDA device `device` (default: the current one), or the interpreter when that is on.

        Raises:
            UserError: no CUDA device and no interpreter.
        """
        if triton.knobs.runtime.interpret:
            return Target.interpreter()
        if not torch.cuda.is_available():
            raise UserError(
                "target",
                "torch sees no CUDA device",
                stage="kernels.target",
                remedy="Run on a CUDA machine, or set TRITON_INTERPRET=1 before triton is imported.",
            )
        index = device.index if isinstance(device, torch.device) else device
        return _read(torch.cuda.current_device() if index is None else index)

    @staticmethod
    def interpreter() -> Target:
        """Hopper's limits with a single multiprocessor: choices then favour few, large programs."""
        return replace(NAMED["h200"], sm_count=1, interpreted=True, name="interpreter")

    @staticmethod
    def named(name: str) -> Target:
        """A device of the table below, whether or not it is here.

        Raises:
            UserError: the name is not in the table.
        """
        target = NAMED.get(name.lower())
        if target is None:
            raise UserError("target", f"no device named {name!r}", stage="kernels.target",
                            remedy=f"Known: {', '.join(NAMED)}.")  # fmt: skip
        return target


# Bandwidths of H100 and H200 were measured: 2.1 GB copied device to device on an NVIDIA H100 80GB HBM3, 2026-11-25, and
# 8.6 GB on an NVIDIA H200, 2026-10-28, whose L2 was read from the driver. The other rows are the vendor's datasheets,
# so their bandwidth is a few per cent above what a copy reaches.
# smem_bytes is the limit per block in CUDA's table of compute capabilities: 163 KB for 8.0, 227 KB for 9.0 and 10.0.
NAMED = {
    "a100": Target(80, 108, 40 << 20, 2.04e12, 163 << 10, False, "a100"),
    "h100": Target(90, 132, 50 << 20, 3.03e12, 227 << 10, False, "h100"),
    "h200": Target(90, 132, 60 << 20, 4.30e12, 227 << 10, False, "h200"),
    "b200": Target(100, 148, 126 << 20, 8.00e12, 227 << 10, False, "b200"),
}


@cache
def _read(index: int) -> Target:
    """The CUDA device `index`; its bandwidth from `NAMED` where the name matches, else from memory clock and bus."""
    props = torch.cuda.get_device_properties(index)
    known = next((t for key, t in NAMED.items() if key in props.name.lower()), None)
    if known is not None:
        bandwidth = known.bandwidth_bytes_s
    else:
        # Two transfers per clock (kHz), bus width in bits: the peak, which a copy does not quite reach.
        bandwidth = 2e3 * getattr(props, "memory_clock_rate", 0) * getattr(props, "memory_bus_width", 0) / 8 or 1e12
    return Target(
        arch=props.major * 10 + props.minor,
        sm_count=props.multi_processor_count,
        l2_bytes=props.L2_cache_size,
        bandwidth_bytes_s=bandwidth,
        smem_bytes=getattr(props, "shared_memory_per_block_optin", 48 << 10),
        interpreted=False,
        name=props.name,
    )
