"""Sizes that may be symbolic, and the fake values that go with them.

A *dim* is a size as data: an int, a symbol's name, or a list of an operator and dims, as in `["mul", 2, "s0"]`. It
can be written to JSON, turned into a `SymInt` for tracing and into an int for running.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.functions import FloorDiv

from terrazzo.lowering.errors import Unsupported, UserError
from terrazzo.tools.models.fill import ACTIVATION, INDICES, Fill

Dim = Any

# The token count symbols are traced with: a prime, so that no guard such as `tokens % 8 == 0` is true by accident,
# and larger than any size a model treats specially.
HINT = 1031


@dataclass(frozen=True)
class TensorSpec:
    """A tensor input: shape and stride in dims (elements), dtype, device, how it is drawn, and whether it is one of the
    model's parameters."""

    shape: tuple[Dim, ...]
    stride: tuple[Dim, ...]
    dtype: torch.dtype
    device: torch.device
    fill: Fill = ACTIVATION
    parameter: bool = False


@dataclass(frozen=True)
class SizeSpec:
    """An integer input."""

    value: Dim


Spec = TensorSpec | SizeSpec


def to_dim(size: int | torch.SymInt) -> Dim:
    """A size as data.

    Raises:
        Unsupported: the expression has an operator other than + * // and symbols.
    """
    return size if isinstance(size, int) else _expression(size.node.expr)


def _expression(e: sympy.Expr) -> Dim:
    if e.is_Integer:
        return int(e)
    if e.is_Symbol:
        return e.name
    if e.is_Pow and e.exp.is_Integer and e.exp > 0:
        return ["mul", *[_expression(e.base)] * int(e.exp)]
    name = {sympy.Add: "add", sympy.Mul: "mul", FloorDiv: "floordiv"}.get(e.func)
    if name is None:
        raise Unsupported(f"size {e}", f"{e.func.__name__} has no place in a stored size", stage="models")
    return [name, *(_expression(a) for a in e.args)]


def from_dim(dim: Dim, symbols: Mapping[str, Any]) -> Any:
    """The size with its symbols replaced: an int if `symbols` holds ints, a SymInt if it holds SymInts.

    Raises:
        UserError: the dim is malformed or names a symbol that is not there.
    """
    match dim:
        case int():
            return dim
        case str() if dim in symbols:
            return symbols[dim]
        case ["add", *terms]:
            return sum(from_dim(t, symbols) for t in terms)
        case ["mul", *terms]:
            return math.prod(from_dim(t, symbols) for t in terms)
        case ["floordiv", a, b]:
            return from_dim(a, symbols) // from_dim(b, symbols)
    raise UserError(f"size {dim!r}", f"not a size over {sorted(symbols)}", stage="models")


def symbols_of(dim: Dim) -> set[str]:
    """The names in a dim."""
    if isinstance(dim, str):
        return {dim}
    return set().union(*(symbols_of(d) for d in dim[1:])) if isinstance(dim, list) else set()


def spec_of(node: fx.Node) -> Spec:
    """What a placeholder's fake value says, with the rule of its `meta['fill']` if there is one."""
    value = node.meta["example_value"]
    if isinstance(value, torch.Tensor):
        shape, stride = (tuple(map(to_dim, sizes)) for sizes in (value.shape, value.stride()))
        usual = ACTIVATION if value.dtype.is_floating_point else INDICES
        fill, parameter = node.meta.get("fill", usual), isinstance(value, torch.nn.Parameter)
        return TensorSpec(shape, stride, value.dtype, value.device, fill, parameter)
    if isinstance(value, int | torch.SymInt):
        return SizeSpec(to_dim(value))
    raise Unsupported(f"input {node.name}", f"{type(value).__name__} is neither a tensor nor a size", stage="models")


def with_fakes(graph: fx.GraphModule, specs: list[Spec]) -> fx.GraphModule:
    """Gives every node `meta['example_value']`: fake tensors over one new `ShapeEnv`. Returns the same module.

    Placeholders get what their specs say, in order; every other value follows by running the graph on them, which
    allocates nothing and, for a CUDA device, needs none.
    """
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    dims = [d for s in specs for d in ([s.value] if isinstance(s, SizeSpec) else [*s.shape, *s.stride])]
    symbols = {name: _new_symbol(env, name) for name in sorted(set().union(*map(symbols_of, dims)))}
    with torch.no_grad(), mode:
        _Recorder(graph).run(*(_fake(s, symbols) for s in specs))
    for node, spec in zip(placeholders(graph), specs, strict=True):
        if isinstance(spec, TensorSpec):
            node.meta["fill"] = spec.fill
    return graph


def placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    """The graph's inputs in order."""
    return graph.graph.find_nodes(op="placeholder")


def retarget(graph: fx.GraphModule, device: torch.device) -> None:
    """Replaces every device written in the graph's calls."""
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
        node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
    graph.recompile()


def _new_symbol(env: ShapeEnv, name: str) -> int | torch.SymInt:
    source = ConstantSource(name)
    return env.create_symintnode(env.create_symbol(HINT, source, DimDynamic.DYNAMIC), hint=HINT, source=source)


def _fake(spec: Spec, symbols: Mapping[str, int | torch.SymInt]) -> torch.Tensor | torch.SymInt | int:
    if isinstance(spec, SizeSpec):
        return from_dim(spec.value, symbols)
    shape, stride = ([from_dim(d, symbols) for d in sizes] for sizes in (spec.shape, spec.stride))
    fake = torch.empty_strided(shape, stride, dtype=spec.dtype, device=spec.device)
    return torch.nn.Parameter(fake, requires_grad=False) if spec.parameter else fake


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps each node's value as its example."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            n.meta["example_value"] = value
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is operator.getitem and isinstance(args[0], torch.Tensor):
            return _index(*args)
        return super().call_function(target, args, kwargs)


def _index(x: torch.Tensor, key: Any) -> torch.Tensor:
    """`x[key]` by ops alone: torch's own indexing asks for a CUDA guard, which a build without CUDA lacks."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(k is Ellipsis for k in keys):
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        taken = sum(k is not None for k in keys) - 1
        keys[at : at + 1] = [slice(None)] * (x.dim() - taken)
    dim = 0
    for k in keys:
        match k:
            case None:
                x = x.unsqueeze(dim)
            case slice():
                x = torch.ops.aten.slice.Tensor(x, dim, k.start, k.stop, k.step or 1)
            case int() | torch.SymInt():
                x = x.select(dim, k)
                continue
            case _:
                raise Unsupported(f"index {key!r}", "indexing by a tensor has no fake value here", stage="models")
        dim += 1
    return x
