"""`torch.compile(model, backend="terrazzo")`: the front door for PyTorch users; inference only.

Dynamo hands over one graph per frame, with symbolic sizes where shapes are dynamic. Each graph becomes a
`CompiledPiece`: one trace, one plan per concrete size, made at that size's first call. Floats that Dynamo made
arguments become constants of the graph (floats.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..lowering.errors import UserError
from .compiled import CompiledPiece
from .floats import ByFloats, float_arguments


def terrazzo(graph: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """The Dynamo backend (entry point `torch_dynamo_backends`).

    Args:
        graph: torch-level FX.
        example_inputs: tensors (fake or real) and sizes.
        options: none are taken.

    Raises:
        UserError: gradients would be needed, or options were given.
    """
    if options:
        # torch.compile hands over its own `mode` and `options` under those names.
        given = ", ".join(f"{name}={value!r}" for name, value in sorted(options.items()))
        raise UserError(
            "torch.compile(backend='terrazzo')",
            f"it was given {given} and takes no options",
            stage="backend",
            remedy="Leave mode and options out.",
        )
    needs_grad = [i for i, v in enumerate(example_inputs) if isinstance(v, torch.Tensor) and v.requires_grad]
    if needs_grad and torch.is_grad_enabled():
        raise UserError(
            "torch.compile(backend='terrazzo')",
            f"{len(needs_grad)} inputs require gradients and terrazzo compiles for inference only",
            stage="backend",
            remedy="Call the compiled module under torch.no_grad() or torch.inference_mode().",
        )
    floats = float_arguments(graph, example_inputs)
    if floats:
        return ByFloats(graph, floats, lambda bound: CompiledPiece(bound, example_inputs, guarded=True))
    return CompiledPiece(graph, example_inputs, guarded=True)
