"""PyTorch's own operator database as cases: every operator, every sample input, as given and with gaps in memory.

The database is part of torch's tests (`torch.testing._internal`). Importing it needs `expecttest`, for a base class of
test cases that nothing here uses; where it is missing, a stand-in of that name is put in its place.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

# Memory whose content nobody asked for: there is nothing to compare but its geometry.
UNFILLED = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}

# Functions that CUDA source is compiled into: they pass the dispatcher by, so that nothing can trace them.
UNTRACEABLE = "jiterator_"

VARIANTS = ("given", "gaps", "inplace")


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Args:
        number: of the sample in the database.
        variant: 'given', 'gaps' (its tensors not contiguous) or 'inplace' (the operator's in-place twin).
        fn: the operator, a function of `args` and `kwargs`.
        args, kwargs: the call's arguments, tensors without gradients.
    """

    number: int
    variant: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def size(self) -> int:
        """Elements of its largest tensor."""
        return max((t.numel() for t in pytree.tree_leaves((self.args, self.kwargs)) if _is_tensor(t)), default=0)

    def __str__(self) -> str:
        shown = [_shown(a) for a in self.args] + [f"{k}={_shown(v)}" for k, v in self.kwargs.items()]
        return ", ".join(shown)


@functools.cache
def operators() -> dict[str, Any]:
    """Every operator that can be traced, by name; variants of one operator as `name/variant`."""
    if importlib.util.find_spec("expecttest") is None:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stand_in
    from torch.testing._internal.common_methods_invocations import op_db

    found: dict[str, Any] = {}
    for op in op_db:
        name = f"{op.name}/{op.variant_test_name}" if op.variant_test_name else op.name
        if not name.startswith(UNTRACEABLE):
            found[name] = op
    return found


def supports(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the database says that the operator takes this dtype on this device."""
    return dtype in operators()[name].supported_dtypes(device.type)


def cases(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The operator's samples, each in the variants there are."""
    op = operators()[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, sample in enumerate(op.sample_inputs(device, dtype, requires_grad=False)):
            given = _call(sample)
            yield Case(number, "given", op.op, *given)
            gaps = _call(sample.noncontiguous())
            if _strides(gaps) != _strides(given):
                yield Case(number, "gaps", op.op, *gaps)
            twin = op.inplace_variant
            if twin is not None and not sample.broadcasts_input and _is_tensor(sample.input):
                yield Case(number, "inplace", twin, *_call(sample))


def _call(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def leaf(value: Any) -> Any:
        return value.detach() if _is_tensor(value) else value

    return pytree.tree_map(leaf, ((sample.input, *sample.args), dict(sample.kwargs)))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _strides(tree: Any) -> list[Any]:
    return [t.stride() for t in pytree.tree_leaves(tree) if _is_tensor(t) and t.layout == torch.strided]


def _shown(value: Any) -> str:
    if _is_tensor(value):
        dtype = str(value.dtype).removeprefix("torch.")
        strided = value.layout == torch.strided
        gaps = "" if not strided or value.is_contiguous() else f"/{list(value.stride())}"
        return f"{dtype}{list(value.shape)}{gaps}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return repr(value)
