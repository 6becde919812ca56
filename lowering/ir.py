"""The values that travel between the first stages: a functional ATen trace, symbolic or concrete.

A `Trace` is what `intake` makes of a piece: nodes in order, each an op with `Ref`s to earlier nodes; the shapes hold
sympy expressions over the piece's symbols until `specialize` binds them. Everything is immutable and prints itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch

from .show import dtype_name
from .size import integer

Dim: TypeAlias = int | sympy.Expr


@dataclass(frozen=True)
class Ref:
    """The result of the node (or the graph input) of that name."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Scalar:
    """A number known only when the piece runs: an expression over the results of nodes that read one out of a tensor.

    Args:
        expr: its symbols carry the names of those nodes, or are sizes.
        refs: those nodes.
    """

    expr: sympy.Expr
    refs: tuple[Ref, ...]

    def __str__(self) -> str:
        return str(self.expr)


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor: shape and strides in elements, offset of its first element in its storage."""

    shape: tuple[Dim, ...]
    stride: tuple[Dim, ...]
    offset: Dim
    dtype: torch.dtype
    device: torch.device

    @property
    def numel(self) -> Dim:
        out: Dim = 1
        for s in self.shape:
            out = out * s
        return out

    def sizes(self) -> tuple[int, ...]:
        """The shape as integers; only after `specialize`."""
        return tuple(integer(s) for s in self.shape)

    def strides(self) -> tuple[int, ...]:
        return tuple(integer(s) for s in self.stride)

    def nbytes(self) -> int:
        return integer(self.numel) * self.dtype.itemsize

    def __str__(self) -> str:
        dtype = dtype_name(self.dtype)
        return f"{dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Input:
    """One argument of the piece, in order.

    Args:
        name: the placeholder's name.
        kind: 'tensor', 'symbol' (an int that may be symbolic), 'constant' (a tensor the module holds), 'opaque'
            (anything else: passed through).
        spec: of a tensor.
        value: of a symbol its expression; of a constant the tensor; of an opaque argument nothing.
        parameter: a weight or buffer, which no kernel writes.
    """

    name: str
    kind: str
    spec: Spec | None = None
    value: Any = None
    parameter: bool = False


@dataclass(frozen=True)
class Node:
    """One op: `op(*args, **kwargs)`, its tensors as `Ref`s, its sizes as integers or sympy expressions, its
    run-time numbers as `Scalar`s.

    `op` is an `OpOverload`, a higher-order op or `operator.getitem`.
    """

    name: str
    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    spec: Spec | tuple[Spec | None, ...] | None
    source: str = ""

    def refs(self) -> list[str]:
        """Names of the values read, in order, without repetition."""
        return list(dict.fromkeys(r.name for r in iter_refs((self.args, dict(self.kwargs)))))

    @property
    def target(self) -> str:
        return op_name(self.op)

    def __str__(self) -> str:
        args = ", ".join([*map(_show, self.args), *(f"{k}={_show(v)}" for k, v in self.kwargs.items())])
        return f"%{self.name}: {_show_spec(self.spec)} = {self.target}({args})"


@dataclass(frozen=True)
class Output:
    """One leaf of what the piece returns.

    Args:
        kind: 'value' (the tensor of a node), 'alias' (a view of input `ref`), 'input' (input `ref` itself), 'symbol',
            'const'.
        ref: name of the node or input.
        spec: geometry of the tensor, relative to its storage.
        value: of a symbol its expression or `Scalar`, of a constant the constant.
        storage: outputs with the same number share their storage in eager execution.
        another: than the earlier ones of them, whose geometry it may have: another tensor object.
    """

    kind: str
    ref: str = ""
    spec: Spec | None = None
    value: Any = None
    storage: int = -1
    another: bool = False


@dataclass(frozen=True)
class Trace:
    """A piece as functional ATen.

    Args:
        inputs: the piece's arguments, then the constants it holds.
        nodes: in an order in which they can run.
        outputs: leaves of the result; `structure` puts them together again.
        mutations: (input, value): after the piece ran, the input holds the value.
        symbols: symbol to (input position, dimension, or None for the integer itself).
        guards: what the trace took for granted about the symbols.
        structure: rebuilds the piece's return value from the list of leaves.
        absolute: some op names a place by its distance from the start of the storage: the trace holds for inputs that
            begin where their storage does.
    """

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]
    mutations: tuple[tuple[str, str], ...]
    symbols: Mapping[sympy.Symbol, tuple[int, int | None]] = field(default_factory=dict)
    guards: tuple[sympy.Basic, ...] = ()
    structure: Any = None
    absolute: bool = False

    def spec_of(self, name: str) -> Spec:
        spec = self.specs()[name]
        if not isinstance(spec, Spec):
            raise KeyError(f"{name} is not one tensor")
        return spec

    def specs(self) -> dict[str, Any]:
        return {**{i.name: i.spec for i in self.inputs}, **{n.name: n.spec for n in self.nodes}}

    def __str__(self) -> str:
        lines = [f"%{i.name}: {i.kind} {_show_spec(i.spec) if i.spec else _show(i.value)}" for i in self.inputs]
        lines += [str(n) for n in self.nodes]
        lines += [f"{i} <- %{v}" for i, v in self.mutations]
        lines += [f"return {', '.join(f'{o.kind} {o.ref or o.value}' for o in self.outputs)}"]
        if self.guards:
            lines.append(f"guards: {', '.join(map(str, self.guards))}")
        return "\n".join(lines)


def op_name(op: Callable[..., Any]) -> str:
    """`aten.add.Tensor`, `vllm.moe_forward.default`, or a Python function's name."""
    if isinstance(op, torch._ops.OpOverload):
        return str(op)
    return getattr(op, "__name__", str(op))


def iter_refs(tree: Any) -> Iterator[Ref]:
    """Every `Ref` in nested tuples, lists and dicts, those of scalars included."""
    for leaf in iter_leaves(tree):
        if isinstance(leaf, Ref):
            yield leaf
        elif isinstance(leaf, Scalar):
            yield from leaf.refs


def iter_leaves(tree: Any) -> Iterator[Any]:
    """Everything in nested tuples, lists and dicts that is none of them."""
    if isinstance(tree, (tuple, list)):
        for part in tree:
            yield from iter_leaves(part)
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from iter_leaves(part)
    else:
        yield tree


def map_tree(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """The tree with `leaf` applied to everything that is no tuple, list or dict."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tree(t, leaf) for t in tree) if type(tree) in (tuple, list) else leaf(tree)
    if isinstance(tree, dict):
        return {k: map_tree(v, leaf) for k, v in tree.items()}
    return leaf(tree)


def _show(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_show, value)) + "]"
    if isinstance(value, torch.Tensor):
        return f"tensor{list(value.shape)}"
    return str(value) if not isinstance(value, Ref) else repr(value)


def _show_spec(spec: Any) -> str:
    return "(" + ", ".join(map(_show_spec, spec)) + ")" if isinstance(spec, tuple) else str(spec)
