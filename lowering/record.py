"""The second half of intake: the graph that `make_fx` recorded, as a `Trace`.

Shapes and integers become integers or sympy expressions over the trace's symbols. A number that is only known when the
piece runs (`tensor.item()`, and so every float that `torch.compile(dynamic=True)` keeps dynamic) becomes a `Scalar`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from .errors import Unsupported
from .ir import Input, Node, Output, Ref, Scalar, Spec, Trace, iter_leaves, map_tree
from .writes import WRAPPED, Twice, as_called

STRIDED = (torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_copy.default)


@dataclass(frozen=True)
class Recorded:
    """What intake knows once a piece ran under `make_fx`.

    Args:
        graph: the recorded graph; its outputs are the piece's, then the new values of the mutated inputs.
        names: of the arguments, then of the tensors the module holds.
        examples: what stood in for them, before they became fake.
        fakes: the fake tensors and sizes that the piece ran on.
        constants: the tensors the module holds, by name.
        leaves, structure: what the piece returned when it ran unrecorded.
        mutated: positions of inputs written in place.
        writing: calls of ops that write arguments, in order.
        symbols, guards: as `Trace` has them.
    """

    graph: fx.Graph
    names: Sequence[str]
    examples: Sequence[Any]
    fakes: Sequence[Any]
    constants: Mapping[str, torch.Tensor]
    leaves: Sequence[Any]
    structure: Any
    mutated: Sequence[int]
    writing: Sequence[Twice]
    symbols: Mapping[sympy.Symbol, tuple[int, int | None]]
    guards: tuple[sympy.Basic, ...]

    def trace(self) -> Trace:
        """The recorded graph as a trace.

        Raises:
            Unsupported: a shape depends on data.
        """
        return _Conversion(self).trace()


class _Conversion:
    """Walks the recorded graph; holds what its nodes are called in the trace."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self.names: dict[fx.Node, str] = {}
        self.inputs: list[Input] = []
        self.nodes: list[Node] = []
        # Symbols of numbers known at run time, by the symbol that carries the name of the node that reads them.
        self.scalars: dict[sympy.Symbol, sympy.Symbol] = {}
        self.writing = _matched(recorded)

    def trace(self) -> Trace:
        recorded = self.recorded
        placeholders = [n for n in recorded.graph.nodes if n.op == "placeholder"]
        for node, name, fake, example in zip(
            placeholders, recorded.names, recorded.fakes, recorded.examples, strict=True
        ):
            self.names[node] = name
            self.inputs.append(_input(name, fake, example, recorded.constants))
        taken = {i.name for i in self.inputs}
        for node in recorded.graph.nodes:
            if node.op in ("get_attr", "call_function"):
                self.node(node, taken)
        results = pytree.tree_leaves(next(n for n in recorded.graph.nodes if n.op == "output").args[0])
        split = len(recorded.leaves)
        mutations = tuple(
            (self.inputs[i].name, self.names[v])
            for i, v in zip(recorded.mutated, results[split:], strict=True)
            if isinstance(v, fx.Node)
        )
        made = Trace(
            tuple(self.inputs),
            tuple(self.nodes),
            self.outputs(results[:split]),
            mutations,
            recorded.symbols,
            recorded.guards,
            recorded.structure,
            any(map(_from_storage, recorded.graph.nodes)),
        )
        _refuse_data_dependent(made)
        return made

    def node(self, node: fx.Node, taken: set[str]) -> None:
        value = node.meta.get("val")
        if node.op == "get_attr":
            name = self.names[node] = _unique(node.name, taken)
            tensor = attribute(node.graph.owning_module, str(node.target))
            spec = _spec(tensor if value is None else value)
            self.inputs.append(Input(name, "constant", spec, value=tensor, parameter=True))
            return
        if value is not None and _is_number(value):
            if node.target is not torch.ops.aten._local_scalar_dense.default:
                # Arithmetic on sizes: the expressions that use it hold it already.
                return
            name = _unique(node.name, taken)
            self.scalars[value.node.expr] = sympy.Symbol(name)
        else:
            name = _unique(node.name, taken)
        self.names[node] = name
        args, kwargs = map_tree(tuple(node.args), self.argument), map_tree(dict(node.kwargs), self.argument)
        made = Node(name, node.target, args, kwargs, _specs(value), _source(node))
        self.nodes.append(as_called(made, self.writing[node]) if node in self.writing else made)

    def argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            known = value.meta.get("val")
            return self.number(known) if _is_number(known) else Ref(self.names[value])
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.number(value)
        if isinstance(value, fx.immutable_collections.immutable_list):
            return tuple(map(self.argument, value))
        return value

    def number(self, value: Any) -> Any:
        """A number, an expression over sizes, or a `Scalar`."""
        found = _dim(value)
        if not isinstance(found, sympy.Basic) or not found.free_symbols & self.scalars.keys():
            return found
        expr = found.xreplace(self.scalars)
        return Scalar(expr, tuple(Ref(s.name) for s in self.scalars.values() if s in expr.free_symbols))

    def outputs(self, results: Sequence[Any]) -> tuple[Output, ...]:
        fakes, inputs = self.recorded.fakes, self.inputs
        storages = {f.untyped_storage()._cdata: i for i, f in enumerate(fakes) if isinstance(f, torch.Tensor)}
        groups: dict[int, int] = {}
        given: dict[int, set[int]] = {}
        found = []
        for leaf, result in zip(self.recorded.leaves, results, strict=True):
            if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                found.append(Output("symbol", value=self.argument(result)))
                continue
            if not isinstance(leaf, torch.Tensor):
                found.append(Output("const", value=leaf))
                continue
            same = next((i for i, f in enumerate(fakes) if f is leaf), None)
            key = leaf.untyped_storage()._cdata
            if same is not None:
                found.append(Output("input", inputs[same].name, _spec(leaf)))
            elif key in storages:
                if leaf.is_conj() or leaf.is_neg():
                    raise Unsupported(inputs[storages[key]].name, "it is returned conjugated in place", stage="intake")
                found.append(Output("alias", inputs[storages[key]].name, _spec(leaf)))
            else:
                storage = groups.setdefault(key, len(groups))
                another = bool(given.get(storage)) and id(leaf) not in given[storage]
                given.setdefault(storage, set()).add(id(leaf))
                found.append(Output("value", self.names[result], _spec(leaf), storage=storage, another=another))
        return tuple(found)


def _matched(recorded: Recorded) -> dict[fx.Node, Twice]:
    """Which node is a call that gave a tensor twice; none where they are not the same calls in the same order."""
    nodes = [node for node in recorded.graph.nodes if node.target is WRAPPED]
    wrapped = {node.args[0] for node in nodes}
    calls = [call for call in recorded.writing if call.op in wrapped]
    same = [call.op for call in calls] == [node.args[0] for node in nodes]
    return {node: call for node, call in zip(nodes, calls, strict=True) if call.same} if same else {}


def _from_storage(node: fx.Node) -> bool:
    """Whether an op names a place by its distance from the start of the storage."""
    named = len(node.args) > 3 and node.args[3] is not None or node.kwargs.get("storage_offset") is not None
    return node.target in STRIDED and named


def _refuse_data_dependent(trace: Trace) -> None:
    """Raises Unsupported for sizes that are no function of the arguments' sizes."""
    given = set(trace.symbols)
    for name, spec in trace.specs().items():
        for part in iter_leaves(spec):
            dims = (*part.shape, *part.stride, part.offset) if isinstance(part, Spec) else ()
            for dim in dims:
                if isinstance(dim, sympy.Basic) and dim.free_symbols - given:
                    raise Unsupported(name, f"its shape {part} depends on data", stage="intake")


def _input(name: str, fake: Any, example: Any, constants: Mapping[str, torch.Tensor]) -> Input:
    if name in constants:
        return Input(name, "constant", _spec(fake), value=constants[name], parameter=True)
    if isinstance(fake, torch.Tensor):
        return Input(name, "tensor", _spec(fake), parameter=isinstance(example, torch.nn.Parameter))
    if isinstance(fake, (int, torch.SymInt)) and not isinstance(fake, bool):
        return Input(name, "symbol", value=_dim(fake))
    return Input(name, "opaque", value=fake)


def attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _is_number(value: Any) -> bool:
    """Whether a node's value is a number rather than tensors."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float))


def _dim(value: Any) -> Any:
    """An integer, or the expression of a symbolic number."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        expr = value.node.expr
        return int(expr) if isinstance(expr, (sympy.Integer, int)) else expr
    return value


def _spec(tensor: torch.Tensor) -> Spec:
    return Spec(
        tuple(_dim(s) for s in tensor.shape),
        tuple(_dim(s) for s in tensor.stride()) if tensor.layout == torch.strided else (),
        _dim(tensor.storage_offset()) if isinstance(tensor, FakeTensor) else 0,
        tensor.dtype,
        tensor.device,
    )


def _specs(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _spec(value)
    if isinstance(value, (tuple, list)):
        return tuple(_specs(v) for v in value)
    return None


def _source(node: fx.Node) -> str:
    """`file.py:120` of the line of the model that this op came from."""
    for line in reversed((node.meta.get("stack_trace") or "").splitlines()):
        line = line.strip()
        if line.startswith('File "'):
            path, _, rest = line[6:].partition('"')
            return f"{path.rsplit('/', 1)[-1]}:{rest.split('line ')[-1].split(',')[0].strip()}"
    return ""


def _unique(name: str, taken: set[str]) -> str:
    base, count = name, 1
    while name in taken:
        name, count = f"{base}_{count}", count + 1
    taken.add(name)
    return name
