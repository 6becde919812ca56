"""A function compiled by terrazzo against the same function in eager: values, geometry, aliasing, mutation.

Floats are right when they err at most twice as much as eager does, measured against fp64 (`tools/compare.py`);
integers, bools, NaN, infinities and, for ops that round nothing, the sign of zero must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools import compare as tools_compare

Function = Callable[..., Any]
MANY = 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def same(fn: Function, *args: Any, itself: bool = False, exact: bool = False, zeros: bool = False) -> CompiledPiece:
    """Asserts that `fn(*args)` compiled is `fn(*args)` in eager, and that inputs written in place end up equal.

    Args:
        fn: what `fx.symbolic_trace` can read.
        args: tensors and numbers.
        itself: whether some op has no rule and runs as itself; otherwise every launch must be a kernel of ours.
        exact: equal numbers are asked for, whatever the dtype.
        zeros: the sign of zero is asked for as well.

    Returns:
        The compiled piece, for whoever wants to look further.
    """
    ours, theirs, exactly = (copied(args) for _ in range(3))
    piece = CompiledPiece(traced(fn, len(args)), ours)
    got = piece(*ours)
    compare((got, ours), (fn(*theirs), theirs), None if exact else (fn(*doubled(exactly)), exactly), zeros=zeros)
    assert piece.plans, "it fell back to the graph it was"
    launches = [k for loaded in piece.plans.values() for k in loaded.plan.schedule.launches()]
    externs = [f"{k.name}: {k.why}" for k in launches if not k.family]
    assert bool(externs) == itself, externs
    return piece


def traced(fn: Function, count: int) -> fx.GraphModule:
    """The function as a torch-level graph of `count` arguments."""
    tracer, names = fx.Tracer(), [f"x{i}" for i in range(count)]
    root = eval(f"lambda {', '.join(names)}: fn({', '.join(names)})", {"fn": fn})
    return fx.GraphModule(torch.nn.Module(), tracer.trace(root))


def copied(args: Sequence[Any]) -> list[Any]:
    """The arguments on the device in memory of their own: equal geometry, and what shared storage still does."""
    return [*tools_compare.copied(tuple(args), DEVICE)]


def doubled(args: list[Any]) -> list[Any]:
    """The arguments with every float tensor in fp64, in place of the originals."""
    for i, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            args[i] = tools_compare.widened(value)
    return args


def compare(ours: Any, theirs: Any, exactly: Any = None, *, zeros: bool = False, close: bool = False) -> None:
    """Asserts that two results are the same in structure, geometry, aliasing and value.

    Args:
        ours, theirs: results, nested as they come.
        exactly: the same in fp64; without it floats must be equal.
        zeros: so must the signs of zeros.
        close: floats need only be close (`torch.testing.assert_close`): their rounding is another test's business.
    """
    wrong = tools_compare.difference(ours, theirs, exactly, zeros=zeros, close=close)
    assert wrong is None, wrong
    floats = (x for x in tree_leaves(theirs) if isinstance(x, torch.Tensor) and x.is_floating_point())
    # A few may be asked for; many that are all lost compare nothing.
    assert not any(x.numel() > MANY and x.isnan().all() for x in floats), "eager has no number to compare with"


def odd(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random numbers of both signs; integers in [-9, 9], bools half and half."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    low = 0 if dtype == torch.uint8 else -9
    return torch.randint(low, 10, shape, generator=generator).to(dtype)
