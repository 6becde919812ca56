"""When two pieces are the same: equal ops on equal arguments, whatever their nodes are called.

The 32 layers of a model differ in names alone; they share one trace and its plans.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import sympy
import torch
from torch import fx

from ..lowering.intake import Examples


def fingerprint(graph: fx.GraphModule, examples: Examples) -> str | None:
    """A digest of what the piece computes on which kinds of arguments; None when something in it cannot be written
    down.

    Args:
        graph: the piece.
        examples: its arguments; symbols count by order of appearance.
    """
    symbols: dict[sympy.Symbol, sympy.Symbol] = {}
    inputs = [_argument(value, symbols) for value in examples.values]
    tensors: dict[int, int] = {}
    try:
        lines = [_surroundings(), *_lines(graph, inputs, tensors)]
    except _Unknown:
        return None
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _surroundings() -> str:
    """What ops ask torch for where nobody told them: the default dtype and device, and what is cast on its own."""
    casts = [f"{d} {torch.get_autocast_dtype(d)}" for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    return " ".join([str(torch.get_default_dtype()), str(torch.get_default_device()), *casts])


def _lines(graph: fx.GraphModule, inputs: Sequence[str], tensors: dict[int, int]) -> list[str]:
    """A line per node.

    Args:
        graph: the piece, or the body of one of its higher-order ops.
        inputs: what is known of the arguments of the piece; nothing of a body's.
        tensors: numbers of the tensors that are held, by identity, so that tied ones show.
    """
    names: dict[fx.Node, str] = {}
    known = iter(inputs)
    lines = []
    for node in graph.graph.nodes:
        names[node] = f"n{len(names)}"
        if node.op == "placeholder":
            lines.append(f"placeholder {next(known, '')}")
        elif node.op == "get_attr":
            value = _attribute(graph, node.target)
            if isinstance(value, fx.GraphModule):
                lines += ["body", *_lines(value, (), tensors), "end"]
            elif isinstance(value, torch.Tensor) and inputs:
                lines.append(f"get_attr {tensors.setdefault(id(value), len(tensors))} {_argument(value, {})}")
            else:
                raise _Unknown
        else:
            target = _target(node)
            lines.append(f"{node.op} {target} {_tree(node.args, names)} {_tree(dict(node.kwargs), names)}")
    return lines


class _Unknown(Exception):
    """A value that has no text that says all of it."""


def _argument(value: Any, symbols: dict[sympy.Symbol, sympy.Symbol]) -> str:
    if isinstance(value, torch.Tensor):
        dims = [_dim(d, symbols) for d in (*value.shape, "|", *value.stride())]
        return f"{value.dtype} {value.device} {' '.join(dims)} {isinstance(value, torch.nn.Parameter)}"
    if isinstance(value, (int, torch.SymInt)):
        return _dim(value, symbols)
    if isinstance(value, (float, str, complex)):
        return repr(value)
    return f"opaque {_named(type(value))}"


def _dim(value: Any, symbols: dict[sympy.Symbol, sympy.Symbol]) -> str:
    if not isinstance(value, torch.SymInt):
        return str(value)
    expr = value.node.expr
    for symbol in sorted(expr.free_symbols, key=str):
        symbols.setdefault(symbol, sympy.Symbol(f"size{len(symbols)}"))
    return str(expr.xreplace(symbols))


def _target(node: fx.Node) -> str:
    if node.op == "call_module":
        # What a module does hangs on more than its type and its tensors.
        raise _Unknown
    target = node.target
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _schemas(target)
    if isinstance(target, (str, torch._ops.HigherOrderOperator)):
        return str(target)
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if name is None:
        raise _Unknown
    if isinstance(target, (types.FunctionType, type)) and _found(module, name) is not target:
        # A lambda or a function inside a function: others have its name.
        raise _Unknown
    return f"{module}.{name}"


@cache
def _schemas(op: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> str:
    """An op with what it takes, writes and returns, which whoever registers it may change."""
    overloads = [op] if isinstance(op, torch._ops.OpOverload) else [getattr(op, name) for name in op.overloads()]
    return " ".join([str(op), *(str(overload._schema) for overload in overloads)])


def _found(module: Any, name: str) -> Any:
    """What the name leads to."""
    value = sys.modules.get(module)
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _tree(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        return _named(type(value)) + "(" + " ".join(_tree(v, names) for v in value) + ")"
    if isinstance(value, dict):
        return _named(type(value)) + "{" + " ".join(f"{k}:{_tree(v, names)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({_tree((value.start, value.stop, value.step), names)})"
    if (
        value is None
        or value is Ellipsis
        or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.layout))
    ):
        return f"{type(value).__name__}:{value!r}"
    if isinstance(value, torch.memory_format):
        return str(value)
    raise _Unknown


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module
