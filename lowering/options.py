"""Everything a user or a test can choose about compilation, in one frozen value; stages read nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.target import Target


@dataclass(frozen=True)
class Options:
    """What to compile for and how.

    Args:
        target: the device compiled for.
        fuse: contract the graph into groups; off, every op is its own kernel (for finding a wrong fusion).
        pdl: launch kernels with programmatic dependent launch where the target has it.
        allow_tf32: fp32 matrix products may use tf32 (torch's own switch, read by the caller).
        steady: the caller's promise that no plan's result becomes a parameter of the piece, or a tensor that its module
            holds, while kernels run: those may be read before plans that ran earlier have ended. A server's weights are
            so.
    """

    target: Target
    fuse: bool = True
    pdl: bool = True
    allow_tf32: bool = False
    steady: bool = False
