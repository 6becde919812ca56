"""A function compiled by terrazzo against the same function in eager: values, geometry, aliasing, mutation.

Floats are right when they err at most twice as much as eager does, measured against fp64 (`tests/kernels/oracle.py`);
integers, bools, NaN, infinities and, for ops that round nothing, the sign of zero must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from terrazzo.runtime.compiled import CompiledPiece

from ..kernels.oracle import check

Function = Callable[..., Any]
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
    storages: dict[int, torch.UntypedStorage] = {}

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        key = value.untyped_storage()._cdata
        if key not in storages:
            storages[key] = value.untyped_storage().clone().to(device=DEVICE)
        storage = storages[key]
        empty = torch.empty(0, dtype=value.dtype, device=DEVICE)
        return empty.set_(storage, value.storage_offset(), value.shape, value.stride())  # type: ignore[call-overload]

    return [fresh(a) for a in args]


def doubled(args: list[Any]) -> list[Any]:
    """The arguments with every float tensor in fp64, in place of the originals."""
    for i, value in enumerate(args):
        if isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float16, torch.bfloat16):
            args[i] = value.double()
    return args


def compare(ours: Any, theirs: Any, exactly: Any = None, *, zeros: bool = False, close: bool = False) -> None:
    """Asserts that two results are the same in structure, geometry, aliasing and value.

    Args:
        ours, theirs: results, nested as they come.
        exactly: the same in fp64; without it floats must be equal.
        zeros: so must the signs of zeros.
        close: floats need only be close (`torch.testing.assert_close`): their rounding is another test's business.
    """
    a, structure = pytree.tree_flatten(ours)
    b, other = pytree.tree_flatten(theirs)
    assert structure == other, f"{structure} is not {other}"
    c = pytree.tree_leaves(exactly) if exactly is not None else b
    for position, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
        if not isinstance(y, torch.Tensor):
            assert (x == y or (close and math.isclose(x, y, rel_tol=1e-6))) and type(x) is type(y), (
                f"{x!r} is not {y!r}"
            )
            continue
        assert x.dtype == y.dtype and x.shape == y.shape, f"{position}: {x.dtype} {x.shape} is not {y.dtype} {y.shape}"
        steps = [(i, j) for i, j, s in zip(x.stride(), y.stride(), y.shape, strict=True) if s > 1 and y.numel()]
        assert all(i == j for i, j in steps), f"{position}: strides {x.stride()} are not {y.stride()}"
        if close:
            torch.testing.assert_close(x, y, equal_nan=True)
        elif exactly is None or not y.dtype.is_floating_point:
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
            if zeros and y.dtype.is_floating_point:
                assert torch.equal(x.signbit() & ~x.isnan(), y.signbit() & ~y.isnan()), f"{position}: signs differ"
        else:
            check(x, y, z, what=f"result {position}")
    assert _sharing(a) == _sharing(b), "other leaves share memory than in eager"


def _sharing(leaves: Sequence[Any]) -> list[int]:
    """For each leaf the first that has the same storage."""
    storages = [t.untyped_storage().data_ptr() if isinstance(t, torch.Tensor) and t.numel() else None for t in leaves]
    return [storages.index(s) if s else i for i, s in enumerate(storages)]


def odd(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random numbers of both signs; integers in [-9, 9], bools half and half."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    low = 0 if dtype == torch.uint8 else -9
    return torch.randint(low, 10, shape, generator=generator).to(dtype)
