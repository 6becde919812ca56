"""Stage 1: a piece, in whichever dialect it comes, becomes a functional ATen trace with symbolic sizes.

Enters: a `GraphModule` in Dynamo's torch-level dialect or in ATen, and what is known of its arguments (fake tensors,
tensors, integers, opaque objects). Leaves: a `Trace`. The graph is run twice under fake tensors of our own:
once as it is, to see what it returns (which outputs are inputs, views of inputs, or share storage), and once under
functionalization and `make_fx`, to record it as ATen without mutation. What is written in place is known from the
functional tensors themselves, so from the ops' schemas, and stands in `Trace.mutations`.

Symbols are our own too: the piece's expressions are carried over into a fresh `ShapeEnv`, so that the guards that this
trace relies on are exactly the trace's, and are checked for every size by `specialize`. With a `binding` the sizes are
integers from the start (a size whose guards failed, and sizes 0 and 1).

Refuses (Unsupported): changes of metadata of inputs, sizes that depend on data, and whatever cannot be traced.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._functorch._aot_autograd.functional_utils import from_fun, has_data_mutation, to_fun
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from .decompositions import table
from .dialect import meaning
from .errors import TerrazzoError, Unsupported, UserError
from .ir import Dim, Trace
from .record import Recorded, attribute
from .writes import Twice, twice


@dataclass(frozen=True)
class Examples:
    """What a piece's arguments look like: for each a tensor (fake or real), an int, a SymInt or anything else."""

    values: tuple[Any, ...]

    @staticmethod
    def of(graph: fx.GraphModule, given: Sequence[Any] | None) -> Examples:
        """From the placeholders' own metadata; where there is none, from the inputs given.

        Raises:
            UserError: there are neither.
        """
        found = []
        for position, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder"):
            value = node.meta.get("example_value", node.meta.get("val"))
            if value is None and given is not None:
                value = given[position]
            elif value is None and not {"example_value", "val"} & node.meta.keys() and node.users:
                raise UserError("the piece's arguments", f"nothing says what {node.name} looks like", stage="intake",
                                remedy="Give example_inputs.")  # fmt: skip
            found.append(value)
        return Examples(tuple(found))

    def symbols(self) -> dict[sympy.Symbol, tuple[int, int | None]]:
        """Each free symbol and where its value can be read: an integer argument, or a dimension of a tensor."""
        found: dict[sympy.Symbol, tuple[int, int | None]] = {}
        for position, value in enumerate(self.values):
            if isinstance(value, torch.SymInt) and isinstance(_expr(value), sympy.Symbol):
                found.setdefault(_expr(value), (position, None))
        for position, value in enumerate(self.values):
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt) and isinstance(_expr(size), sympy.Symbol):
                        found.setdefault(_expr(size), (position, dim))
        return found


def intake(graph: fx.GraphModule, examples: Examples, binding: Mapping[sympy.Symbol, int] | None = None) -> Trace:
    """The piece as a functional ATen trace.

    Args:
        graph: the piece.
        examples: its arguments' shapes, dtypes and devices, in order.
        binding: sizes for every symbol; None keeps them symbolic.

    Returns:
        A `Trace` whose inputs are the piece's arguments followed by the tensors the module holds.

    Raises:
        Unsupported: the piece cannot be traced, or changes an input in a way no plan can repeat.
    """
    world = _World(examples, binding)
    constants = held(graph)
    try:
        return _trace(graph, world, constants)
    except TerrazzoError:
        raise
    except Exception as cause:
        raise Unsupported("the piece", f"tracing it failed: {type(cause).__name__}: {cause}", stage="intake") from cause


class _World:
    """Fake versions of a piece's arguments in a `ShapeEnv` of our own."""

    def __init__(self, examples: Examples, binding: Mapping[sympy.Symbol, int] | None) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.sources = examples.symbols()
        self.binding = binding
        self.examples = examples
        self.ours: dict[sympy.Symbol, Dim] = {}
        for symbol in self._free_symbols(examples):
            if binding is not None:
                self.ours[symbol] = binding[symbol]
            else:
                self.ours[symbol] = self._symbol(symbol)
        self.inputs = [self._fake(v) for v in examples.values]

    def _symbol(self, symbol: sympy.Symbol) -> sympy.Symbol:
        """A symbol of ours: a size, 2 or more, or an integer of which nothing is known."""
        size = any(isinstance(v, torch.Tensor) and symbol in _free(v.shape) for v in self.examples.values)
        create = self.env.create_symbol if size else self.env.create_unspecified_symbol
        hint = _hint(self.examples, symbol)
        source = ConstantSource(str(symbol))
        return create(max(hint, 2) if size else hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)

    def _free_symbols(self, examples: Examples) -> list[sympy.Symbol]:
        known = self.sources
        for value in examples.values:
            parts = [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]
            for symbol in _free(parts) - known.keys():
                raise Unsupported("the piece's arguments", f"no argument holds {symbol} itself", stage="intake")
        return list(known)

    def _int(self, value: Any) -> Any:
        """An int or SymInt of the piece, in our own world."""
        if not isinstance(value, torch.SymInt):
            return value
        expr = _expr(value)
        if self.binding is not None:
            return int(expr.xreplace({s: sympy.Integer(v) for s, v in self.binding.items()}))
        ours = expr.xreplace(self.ours)
        hint = value.node.hint if value.node.has_hint() else None
        return self.env.create_symintnode(ours, hint=hint)

    def _fake(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            with self.mode:
                return torch.empty_strided(
                    [self._int(s) for s in value.shape],
                    [self._int(s) for s in value.stride()],
                    dtype=value.dtype,
                    device=value.device,
                )
        return self._int(value)


def _trace(graph: fx.GraphModule, world: _World, constants: Mapping[str, torch.Tensor]) -> Trace:
    names = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    with world.mode:
        fakes = [*world.inputs, *(world.mode.from_tensor(t, static_shapes=True) for t in constants.values())]
    before = [(tuple(f.shape), f.stride()) if isinstance(f, torch.Tensor) else None for f in fakes]
    with world.mode, enable_python_dispatcher(), world.env.ignore_fresh_unbacked_symbols():
        returned = _plain(_run(graph, constants, fakes, []))
    leaves, structure = pytree.tree_flatten(returned)

    mutated: list[int] = []
    writing: list[Twice] = []

    def functional(*arguments: Any) -> list[Any]:
        wrapped = [to_fun(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        outputs = pytree.tree_leaves(_run(graph, constants, wrapped, writing))
        mutated.extend(i for i, w in enumerate(wrapped) if isinstance(w, FunctionalTensor) and has_data_mutation(w))
        values = [from_fun(o) if isinstance(o, torch.Tensor) else o for o in outputs]
        return values + [from_fun(wrapped[i]) for i in mutated]

    fresh = world.env.ignore_fresh_unbacked_symbols()
    with _tracing(), world.mode, enable_python_dispatcher(), FunctionalTensorMode(), fresh:
        traced = make_fx(functional, decomposition_table=table())(*fakes)
    for geometry, fake in zip(before, fakes, strict=True):
        if geometry is not None and geometry != (tuple(fake.shape), fake.stride()):
            raise Unsupported("the piece", "it changes the shape of an input", stage="intake")
    for i in mutated:
        if any(size > 1 and step == 0 for size, step in zip(fakes[i].shape, fakes[i].stride(), strict=True)):
            raise Unsupported([*names, *constants][i], "it is written, and its elements share memory", stage="intake")
    symbols = {world.ours[s]: place for s, place in world.sources.items() if isinstance(world.ours[s], sympy.Symbol)}
    return Recorded(
        graph=traced.graph,
        names=[*names, *constants],
        examples=[*world.examples.values, *constants.values()],
        fakes=fakes,
        constants=constants,
        leaves=leaves,
        structure=structure,
        mutated=mutated,
        writing=writing,
        symbols=symbols,
        guards=_guards(world),
    ).trace()


def _run(
    graph: fx.GraphModule, constants: Mapping[str, torch.Tensor], arguments: Sequence[Any], writing: list[Twice]
) -> Any:
    """The piece run on these arguments (constants last), node by node, so that metadata reaches the trace. Calls of ops
    that write are noted in `writing`."""
    split = len(arguments) - len(constants)
    given = {id(t): a for t, a in zip(constants.values(), arguments[split:], strict=True)}
    with torch.no_grad(), torch.fx.traceback.preserve_node_meta():
        return _Interpreter(graph, given, writing).run(*arguments[:split])


def _plain(value: Any) -> Any:
    """A result with the lists and dicts that the graph's own code returns, where its nodes hold FX's immutable ones."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return tuple(_plain(v) for v in value) if type(value) is tuple else value


class _Interpreter(fx.Interpreter):
    """Runs a graph with the tensors it holds replaced by the ones given, by identity: a name may be one of several."""

    def __init__(self, graph: fx.GraphModule, given: Mapping[int, Any], writing: list[Twice]) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.given, self.writing = given, writing

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is operator.getitem and isinstance(args[0], torch.Tensor):
            return _indexed(*args)
        op = meaning(target) or target
        if (call := twice(op, args, kwargs)) is not None:
            self.writing.append(call)
        return super().call_function(op, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        state = {name: self.given[id(tensor)] for name, tensor in _state(module)}
        return torch.func.functional_call(module, state, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.given.get(id(value), value)


def _indexed(given: torch.Tensor, key: Any) -> torch.Tensor:
    """`given[key]` through ATen where the key is basic: torch's own indexing initialises the device of a fake
    tensor."""
    keys = key if isinstance(key, tuple) else (key,)
    if not all(k is None or k is Ellipsis or isinstance(k, slice) or _whole(k) for k in keys):
        return given[key]
    tensor, at = given, 0
    for place, k in enumerate(keys):
        if k is Ellipsis:
            at = tensor.dim() - sum(1 for later in keys[place + 1 :] if later is not None)
        elif k is None:
            tensor, at = tensor.unsqueeze(at), at + 1
        elif isinstance(k, slice):
            if k != slice(None):
                tensor = torch.ops.aten.slice.Tensor(tensor, at, k.start, k.stop, 1 if k.step is None else k.step)
            at += 1
        else:
            tensor = tensor.select(at, k)
    return torch.ops.aten.alias.default(given) if tensor is given else tensor


def _whole(key: Any) -> bool:
    return isinstance(key, (int, torch.SymInt)) and not isinstance(key, bool)


def held(graph: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The tensors that a piece holds, in the order in which its nodes come to them; what has several names is held
    once, under the first."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for node in graph.graph.nodes:
        reached: list[tuple[str, Any]] = []
        if node.op == "get_attr":
            reached = [(str(node.target), attribute(graph, node.target))]
        elif node.op == "call_module":
            reached = [(f"{node.target}.{name}", t) for name, t in _state(graph.get_submodule(node.target))]
        for name, value in reached:
            if isinstance(value, torch.Tensor):
                found.setdefault(id(value), ("held_" + name.replace(".", "_"), value))
    return dict(found.values())


def _state(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """A module's tensors under all their names."""
    parameters, buffers = (f(remove_duplicate=False) for f in (module.named_parameters, module.named_buffers))
    return [*parameters, *buffers]


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """Functionalization by Python mode alone, as its C++ twin would hide the ops from the tracer."""
    guard = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
    try:
        with torch.no_grad():
            yield
    finally:
        del guard


def _hint(examples: Examples, symbol: sympy.Symbol) -> int:
    """A size to trace with: the one the piece was captured with, else a number that is nothing special."""
    for value in examples.values:
        for part in [value] if isinstance(value, torch.SymInt) else getattr(value, "shape", ()):
            if isinstance(part, torch.SymInt) and _expr(part) == symbol and part.node.has_hint():
                return int(part.node.hint)
    return 4099


def _guards(world: _World) -> tuple[sympy.Basic, ...]:
    """What the trace relies on: recorded guards, and the range each symbol was assumed to lie in (2 and up)."""
    guards = [g.expr for g in world.env.guards]
    for symbol in world.ours.values():
        lower = world.env.var_to_range[symbol].lower if isinstance(symbol, sympy.Symbol) else None
        if isinstance(lower, sympy.Integer):
            guards.append(sympy.Ge(symbol, lower))
    return tuple(guards)


def _free(sizes: Sequence[Any]) -> set[sympy.Basic]:
    """The symbols in sizes."""
    return {s for size in sizes if isinstance(size, torch.SymInt) for s in _expr(size).free_symbols}


def _expr(value: Any) -> sympy.Expr:
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.sympify(value)
