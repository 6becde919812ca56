"""A piece's graph run in fp64: what its result would be without rounding.

Floating inputs and held tensors are widened, and so is every floating dtype the graph names (`.to(torch.bfloat16)`,
`.float()`, `dtype=`), so that no cast in the middle rounds. Opaque ops are called with the wide tensors too.

Memory that the graph leaves uninitialised is recognised in the result: nothing can be said about it. Where the graph
chooses the largest of several scores (`topk`, as a router does), scores closer than the arithmetic's error may be
ranked either way, and everything after depends on it: those rows are `undecided`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

_EMPTY = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
_CASTS = {"float", "half", "bfloat16"}
_ARITHMETIC = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Outcome:
    """What a run of a piece gave.

    Args:
        outputs: the leaves of its result, in order.
        inputs: its arguments as the run left them.
        empties: memory that the run allocated without filling it.
        scores: for every `topk`, what it chose from and how many.
    """

    outputs: tuple[Any, ...]
    inputs: tuple[Any, ...]
    empties: tuple[torch.Tensor, ...] = ()
    scores: tuple[tuple[torch.Tensor, int], ...] = ()

    def unfilled(self, output: torch.Tensor) -> torch.Tensor | None:
        """Which elements of an output nothing has written, None if all have been. Only after a wide run."""
        storages = {e.untyped_storage().data_ptr() for e in self.empties if e.numel()}
        if not output.numel() or output.untyped_storage().data_ptr() not in storages:
            return None
        return output.isnan() if output.is_floating_point() else output == _poison(output.dtype)


def run_wide(graph: fx.GraphModule, args: Sequence[Any]) -> Outcome:
    """The graph in fp64, on widened copies of its arguments."""
    copies: dict[int, torch.Tensor] = {}
    return _run(graph, tuple(_widen_once(a, copies) for a in args), wide=True)


def run_eager(graph: fx.GraphModule, args: Sequence[Any]) -> Outcome:
    """The graph as it is, on these very arguments."""
    return _run(graph, tuple(args), wide=False)


def undecided(eager: Outcome, oracle: Outcome) -> torch.Tensor | None:
    """Rows whose `topk` may come out either way, None without a `topk`.

    A result may err by twice eager's error plus the floor, and two scores may move towards each other: where two
    neighbours among the chosen and the first not chosen are no further apart than twice that, either order is right.
    """
    rows = None
    for (rounded, count), (exact, _) in zip(eager.scores, oracle.scores, strict=True):
        error = (rounded.double() - exact).abs().max() if exact.numel() else exact.new_zeros(())
        allowed = 2 * (2 * error + _ARITHMETIC * exact.abs().max()) if exact.numel() else error
        best = exact.topk(min(count + 1, exact.shape[-1]), dim=-1).values
        close = (best[..., :-1] - best[..., 1:]).amin(-1) <= allowed
        rows = close if rows is None else rows | close
    return rows


def _run(graph: fx.GraphModule, args: tuple[Any, ...], wide: bool) -> Outcome:
    runner = _Runner(graph, wide)
    with torch.no_grad():
        result = runner.run(*args)
    return Outcome(tuple(pytree.tree_leaves(result)), args, tuple(runner.empties), tuple(runner.scores))


class _Runner(fx.Interpreter):
    """Runs a graph, widening on the way, and keeps what `Outcome` needs."""

    def __init__(self, graph: fx.GraphModule, wide: bool) -> None:
        super().__init__(graph)
        self.wide = wide
        self.empties: list[torch.Tensor] = []
        self.scores: list[tuple[torch.Tensor, int]] = []

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return _widen(value) if self.wide else value

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.wide and target in _CASTS:
            target = "double"
        return self._call(super().call_method, target, target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._call(super().call_function, _name(target), target, args, kwargs)

    def _call(self, call: Any, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.wide:
            args, kwargs = pytree.tree_map(_wide_dtype, (args, kwargs))
        if self.wide and name == "_scaled_mm":
            call, target = super().call_function, _scaled_mm
        if name == "topk":
            self.scores.append((args[0], kwargs["k"] if "k" in kwargs else args[1]))
        result = call(target, args, kwargs)
        if name in _EMPTY:
            if self.wide:
                result.fill_(_poison(result.dtype))
            self.empties.append(result)
        return result


def _scaled_mm(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, bias: Any = None, *_: Any, **__: Any
) -> torch.Tensor:
    """torch's product of eight-bit floats, which knows no others."""
    made = (a @ b) * scale_a * scale_b
    return made if bias is None else made + bias


def _name(target: Any) -> str:
    """'topk' for `torch.topk` and for `aten.topk.default`."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def _poison(dtype: torch.dtype) -> Any:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return True if dtype is torch.bool else torch.iinfo(dtype).max


def _wide_dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _widen(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().to(torch.float64, copy=True) if floating else value


def _widen_once(value: Any, copies: dict[int, torch.Tensor]) -> Any:
    """A wide copy; the same tensor given twice stays one. Integers are copied as well, since a graph may write them."""
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) not in copies:
        copies[id(value)] = _widen(value) if value.is_floating_point() else value.clone()
    return copies[id(value)]
