"""Where a tool runs and writes: the GPU, or without one Triton's interpreter on the CPU; a console.

Triton decides when it is imported whether it interprets, so importing this module decides. It comes before every import
that brings triton in (`terrazzo.tools.models` does, through torch's tracer); in sorted imports it does.
"""

from __future__ import annotations

import os
import sys

import torch
from rich.console import Console

from terrazzo.lowering.errors import UserError


def _pick() -> torch.device:
    """The first CUDA device; without one the CPU, with Triton told to interpret.

    Raises:
        UserError: there is no GPU and triton was imported without its interpreter.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("the device", "no GPU is here, and triton is already imported as a compiler", stage="tools",
                        remedy="Set TRITON_INTERPRET=1 before triton is imported.")  # fmt: skip
    os.environ["TRITON_INTERPRET"] = "1"
    return torch.device("cpu")


def timing() -> torch.device:
    """Where a tool takes times.

    Raises:
        UserError: there is no GPU.
    """
    if HERE.type != "cuda":
        raise UserError("times", "torch sees no CUDA device, and the interpreter's say nothing", stage="tools",
                        remedy="Run it on a machine with a GPU.")  # fmt: skip
    return HERE


def screen() -> Console:
    """Standard output; 120 columns where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 120)


HERE = _pick()
