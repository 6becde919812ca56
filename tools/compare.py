"""Two results of one computation, ours and eager's: where they differ, in structure, geometry, shared memory and value.

Floats are right when they err at most twice as much as eager's, measured against fp64 (`oracle.py`); integers, bools,
NaN and infinities must be equal. Complex numbers are judged as the pairs they are, sparse tensors as dense ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from terrazzo.tools.oracle import judge

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WIDE = {**dict.fromkeys(FLOATS, torch.float64), torch.complex64: torch.complex128, torch.complex32: torch.complex128}


def copied(tree: Any, device: torch.device | None = None) -> Any:
    """The tree with its tensors in memory of their own: equal geometry, and what shared storage still does.

    Args:
        tree: nested as it comes.
        device: where the copies lie; None leaves each where it is.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.layout != torch.strided or value.is_neg() or value.is_conj():
            return value.detach().clone().to(device=device or value.device)
        key = value.untyped_storage()._cdata
        target = device or value.device
        if key not in storages:
            storages[key] = value.untyped_storage().clone().to(device=target)
        empty = torch.empty(0, dtype=value.dtype, device=target)
        placed = empty.set_(storages[key], value.storage_offset(), value.shape, value.stride())  # type: ignore[call-overload]
        return placed

    return pytree.tree_map(fresh, tree)


def widened(tree: Any) -> Any:
    """The tree with floating tensors and dtypes as fp64, complex ones as complex128; gaps in memory stay and are
    widened as well, for what reads across them."""
    memory: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def wide(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return WIDE.get(value, value)
        if not isinstance(value, torch.Tensor) or value.dtype not in WIDE:
            return value
        if value.layout != torch.strided or value.is_neg() or value.is_conj():
            return value.detach().to(WIDE[value.dtype])
        key = value.untyped_storage()._cdata, value.dtype
        if key not in memory:
            whole = value.untyped_storage().nbytes() // value.dtype.itemsize
            memory[key] = value.detach().as_strided((whole,), (1,), 0).to(WIDE[value.dtype])
        return memory[key].as_strided(value.shape, value.stride(), value.storage_offset())

    return pytree.tree_map(wide, tree)


def geometry(ours: torch.Tensor, theirs: torch.Tensor, strides: bool = True) -> str | None:
    """How dtype, device, shape, or the strides of dimensions with several elements differ."""
    if not isinstance(ours, torch.Tensor):
        return f"{ours!r} is no tensor"
    for what in ("dtype", "layout", "device", "shape"):
        if getattr(ours, what) != getattr(theirs, what):
            return f"{what} {getattr(ours, what)} is not {getattr(theirs, what)}"
    if strides and theirs.layout == torch.strided and theirs.numel():
        steps = [(i, j) for i, j, s in zip(ours.stride(), theirs.stride(), theirs.shape, strict=True) if s > 1]
        if any(i != j for i, j in steps):
            return f"strides {ours.stride()} are not {theirs.stride()}"
    return None


def values(
    ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor | None, *, zeros: bool = False, close: bool = False
) -> str | None:
    """How the numbers of two tensors of equal geometry differ, None when they are right.

    Args:
        ours, theirs: the tensors.
        exact: the same in fp64; without it floats must be equal.
        zeros: the signs of zeros must be equal as well.
        close: floats need only be close (`torch.testing.assert_close`): their rounding is another test's business.
    """
    ours, theirs = _plain(ours), _plain(theirs)
    if not zeros and _equal(ours, theirs):
        return None
    if close or exact is None or not theirs.is_floating_point():
        tolerance = None if close else 0
        try:
            torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=tolerance, atol=tolerance)
        except AssertionError as wrong:
            return " ".join(str(wrong).split())
        signs = zeros and theirs.is_floating_point()
        if signs and not torch.equal(ours.signbit() & ~ours.isnan(), theirs.signbit() & ~theirs.isnan()):
            return "signs of zero differ"
        return None
    # What eager cannot hold on its way is infinite or NaN in ours as well, or judged.
    lost = ~theirs.isfinite() & ((ours == theirs) | (ours.isnan() & theirs.isnan()))
    verdict = judge(ours, theirs, torch.where(lost, theirs.double(), _plain(exact)))
    return None if verdict.ok else str(verdict)


def _equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    same = x == y
    return bool((same | (x.isnan() & y.isnan()) if x.is_floating_point() else same).all())


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A strided tensor of real numbers, eight-bit floats as fp32, as torch compares none of them."""
    tensor = tensor.detach()
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()


def sharing(leaves: Sequence[Any]) -> list[int]:
    """For each leaf the first that has the same storage."""
    storages = [_storage(t) for t in leaves]
    return [storages.index(s) if s else i for i, s in enumerate(storages)]


def objects(leaves: Sequence[Any]) -> list[int]:
    """For each tensor the first leaf that is the same object."""
    seen: dict[int, int] = {}
    return [seen.setdefault(id(t), i) if isinstance(t, torch.Tensor) else i for i, t in enumerate(leaves)]


def _storage(value: Any) -> int | None:
    strided = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.numel()
    return value.untyped_storage()._cdata if strided else None


def difference(
    ours: Any, theirs: Any, exactly: Any = None, *, zeros: bool = False, close: bool = False, placing: bool = True
) -> str | None:
    """The first difference of two results, nested as they come, None when there is none.

    Args:
        ours, theirs: the results.
        exactly: the same in fp64; without it floats must be equal.
        zeros, close: as for `values`.
        placing: whether strides and shared memory are compared as well.
    """
    a, structure = pytree.tree_flatten(ours)
    b, other = pytree.tree_flatten(theirs)
    if structure != other:
        return f"{structure} is not {other}"
    c = pytree.tree_leaves(exactly) if exactly is not None else [None] * len(b)
    for position, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
        if isinstance(y, torch.Tensor):
            wrong = geometry(x, y, placing) or values(x, y, z, zeros=zeros, close=close)
        else:
            wrong = None if same_number(x, y, close) else f"{x!r} is not {y!r}"
        if wrong:
            return f"result {position}: {wrong}"
    # Not the other way round: what an op on fake tensors returns may be new where eager's is what it was given.
    if placing and any(b[first] is not b[i] for i, first in enumerate(objects(a))):
        return "leaves are one tensor that are several in eager"
    return "other leaves share memory than in eager" if placing and sharing(a) != sharing(b) else None


def placing(ours: Any, theirs: Any) -> str | None:
    """The first difference in geometry or shared memory: nothing is said about values.

    Args:
        ours, theirs: results, nested as they come; `theirs` may be fake.
    """
    a, b = pytree.tree_leaves(ours), pytree.tree_leaves(theirs)
    if len(a) != len(b):
        return f"{len(a)} results are not {len(b)}"
    for position, (x, y) in enumerate(zip(a, b, strict=True)):
        wrong = geometry(x, y) if isinstance(y, torch.Tensor) else None
        if wrong:
            return f"result {position}: {wrong}"
    return None if sharing(a) == sharing(b) else "other leaves share memory"


def same_number(x: Any, y: Any, close: bool = False) -> bool:
    """Whether two leaves that are no tensors are the same."""
    if type(x) is not type(y):
        return False
    if isinstance(y, float) and (close or math.isnan(y)):
        return (math.isnan(x) and math.isnan(y)) or math.isclose(x, y, rel_tol=1e-6)
    return bool(x == y)
