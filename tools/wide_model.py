"""A model run in fp64: what its result would be without rounding.

Weights, buffers and inputs are widened, and so is every floating dtype that the model's code names (`.float()`,
`.to(torch.float32)`, `dtype=`), so that no cast in the middle rounds. The twin of wide.py for what is no graph yet.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_TO_DOUBLE: Any = torch.Tensor.double
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


class _Wide(TorchFunctionMode):
    """Every floating dtype in a call is fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = _TO_DOUBLE if func in _CASTS else func
        args, kwargs = pytree.tree_map(_wide_dtype, (args, kwargs or {}))
        return func(*args, **kwargs)


def run_wide(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The model's result in fp64; the model and the inputs stay as they are."""
    wide: Any = copy.deepcopy(model).double()
    if getattr(wide, "_can_set_experts_implementation", bool)():
        # The grouped product that transformers takes otherwise has no fp64.
        wide.set_experts_implementation("eager")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), _Wide():
            return wide(**{k: _widen(v) for k, v in inputs.items()})
    finally:
        torch.set_default_dtype(before)


def _wide_dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _widen(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
