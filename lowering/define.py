"""Stage 4: every node becomes a definition over indices.

Enters: a concrete canonical trace. Leaves: `Values`: for each node an expression per element (`Map`), a reduction, a
matrix product, or, where there is no rule or the rule refuses, the op itself (`Extern`) with the reason. View ops leave
no
definition: their result is the base's memory at another geometry, read from the op's own fake result, so that no
list of view ops has to be kept. Rules stand in `rules_*.py`, each registered for the op it lowers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..kernels.target import Target
from .affine import Affine, delinearize, linear, variables
from .depend import direct_reads
from .errors import Unsupported
from .expr import Const, Expr, const, keep, load
from .ir import Node, Ref, Scalar, Spec, Trace, iter_leaves, iter_refs, op_name
from .options import Options
from .size import Size, Undecided, integer
from .values import Contract, Definition, Empty, Extern, Item, Layout, Map, Reduce, Values, View, home
from .writes import writing

Rule = Callable[["Definer", Node], None]
RULES: dict[Any, Rule] = {}
# Of ops that write their arguments, of projects that need not be installed: by the name of the op that is wrapped.
NAMED: dict[str, Rule] = {}

# Dtypes a kernel computes with; anything else runs as the op itself.
COMPUTABLE = {
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
}
# From this architecture on kernels also load and store eight-bit floats. Nothing is computed in them but products of
# matrices, on sm_90 (`rules_matmul.py`).
FLOAT8, FLOAT8_ARCH = torch.float8_e4m3fn, 89


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Registers a lowering rule for ops or for all overloads of op packets."""

    def register(fn: Rule) -> Rule:
        for op in ops:
            overloads = [op] if isinstance(op, torch._ops.OpOverload) else [getattr(op, n) for n in op.overloads()]
            for overload in overloads:
                RULES[overload] = fn
        return fn

    return register


def rule_named(name: str) -> Callable[[Rule], Rule]:
    """Registers a lowering rule for the calls (`writes.py`) of an op that writes its arguments, by its name."""

    def register(fn: Rule) -> Rule:
        NAMED[name] = fn
        return fn

    return register


def rules() -> dict[Any, Rule]:
    """Every lowering rule, by op."""
    from . import (  # noqa: F401  (they register themselves)
        rules_matmul,
        rules_pointwise,
        rules_reduce,
        rules_scan,
        rules_scatter,
        rules_shape,
        rules_window,
    )

    return RULES


def define(trace: Trace, options: Options) -> Values:
    """The definitions of a concrete trace.

    Args:
        trace: what to define.
        options: the target says which dtypes kernels know.

    Raises:
        Unsupported: torch itself gives a result of the piece two shapes.
    """
    rules()
    computable = COMPUTABLE | ({FLOAT8} if options.target.arch >= FLOAT8_ARCH else set())
    definer = Definer(trace, computable, options.target)
    for node in trace.nodes:
        definer.node(node)
    return definer.finish()


def _measured_together(values: Values) -> Values:
    """Products were measured as of few tokens with the others of their piece: none counts so for more of them than one
    that another product follows."""
    read: set[str] = set()
    followed: list[Contract] = []
    for made in reversed(list(values.definitions.values())):
        if isinstance(made, Contract) and made.name in read:
            followed.append(made)
        if isinstance(made, Contract) or made.name in read:
            read.update(direct_reads(made, values))
    few = min((product.few for product in followed), default=None)
    if few is None:
        return values
    more = [made for made in values.definitions.values() if isinstance(made, Contract) and made.few > few]
    fewer = {made.name: replace(made, few=few) for made in more}
    return replace(values, definitions={**values.definitions, **fewer})


class Definer:
    """Collects definitions while `define` walks the trace; the rules' view of the piece."""

    def __init__(self, trace: Trace, computable: Collection[torch.dtype], target: Target) -> None:
        self.trace, self.computable, self.target, self.arch = trace, computable, target, target.arch
        self.definitions: dict[str, Definition] = {}
        self.views: dict[str, View] = {}
        self.layouts: dict[str, Layout] = {}
        self.shared_views: dict[str, View] = {}
        # Values that tracing gave gaps between their elements, with that geometry; in ours they have none.
        self.spread: dict[str, Layout] = {}
        specs = [*(i.spec for i in trace.inputs), *(n.spec for n in trace.nodes)]
        self.device = home(s.device for s in specs if isinstance(s, Spec))
        # Where results start in the storage that tracing gave them (a copy of a view may keep its offset): ours, at 0.
        self.offsets = {n.name: integer(n.spec.offset) for n in trace.nodes if isinstance(n.spec, Spec)}
        for entry in trace.inputs:
            if entry.spec is not None:
                self.layouts[entry.name] = Layout.of(entry.spec)

    def node(self, node: Node) -> None:
        """One node: a view, a part of a multi-result op, by its rule, or as itself."""
        if node.op is operator.getitem:
            self._part(node)
        elif _is_view(node) and self._complex(node):
            # A view may conjugate or negate: that is no geometry.
            self.extern(node, "complex numbers are not computed by kernels")
        elif _is_view(node):
            self._view(node, node.args[0].name, node.spec)
        elif (why := self._refusal(node, lowered := RULES.get(node.op) or _named(node))) is not None:
            self.extern(node, why)
        else:
            assert lowered is not None
            size = len(self.definitions)
            try:
                lowered(self, node)
            except Unsupported as refusal:
                for name in list(self.definitions)[size:]:
                    del self.definitions[name], self.layouts[name]
                call = writing(node)
                self.extern(node, refusal.fact if call is None else f"{op_name(call.op)}: {refusal.fact}")

    def _complex(self, node: Node) -> bool:
        specs = node.spec if isinstance(node.spec, tuple) else (node.spec,)
        layout = self.layouts.get(node.args[0].name)
        return any(s is not None and s.dtype.is_complex for s in (*specs, layout))

    def _refusal(self, node: Node, lowered: Rule | None) -> str | None:
        if lowered is None:
            call = writing(node)
            return f"no lowering rule for {op_name(node.op if call is None else call.op)}"
        if any(isinstance(leaf, Scalar) for leaf in iter_leaves((node.args, dict(node.kwargs)))):
            return "it takes a number that is only known at run time"
        specs = [self.layouts.get(r.name) for r in iter_refs((node.args, dict(node.kwargs)))]
        made = node.spec if isinstance(node.spec, tuple) else (node.spec,)
        for spec in [*specs, *made]:
            if spec is not None and spec.device != self.device:
                return f"it touches a tensor on {spec.device}; kernels run on {self.device}"
            if spec is not None and spec.dtype not in self.computable:
                return f"{str(spec.dtype).removeprefix('torch.')} is not computed by kernels"
        return None

    def _part(self, node: Node) -> None:
        source, position = node.args[0].name, node.args[1]
        if source in self.shared_views:
            base = self.shared_views[source]
            self._view(node, base.base, node.spec)
        elif f"{source}#{position}" in self.layouts:
            inner = f"{source}#{position}"
            self.views[node.name] = View(inner, self.layouts[inner], 0)
            self.layouts[node.name] = self.layouts[inner]
        else:
            layout = Layout.of(node.spec)  # type: ignore[arg-type]
            self._put(Item(node.name, layout, source, position, node.source))

    def _view(self, node: Node, of: str, spec: Any) -> None:
        base, offset = (self.views[of].base, 0) if of in self.views else (of, 0)
        if isinstance(spec, tuple):
            self.shared_views[node.name] = View(base, self.layouts[of], offset)
            return
        layout = Layout.of(spec)
        if layout.dtype != self.layouts[base].dtype:
            self.extern(node, f"it reads {self.layouts[base].dtype} memory as {layout.dtype}")
            return
        offset = integer(spec.offset) - self.offsets.get(base, 0)
        if base in self.spread:
            traced = self.spread[base]
            at = delinearize(linear(variables(layout.shape), layout.stride, offset), traced.shape, traced.stride)
            self.map(node, self.read(Ref(base), at))
            return
        self.views[node.name] = View(base, layout, offset)
        self.layouts[node.name] = layout

    def _put(self, definition: Definition) -> None:
        if isinstance(definition, (Map, Reduce, Contract)) and definition.layout.numel == 0:
            definition = Empty(definition.name, definition.layout, definition.source)
        self.definitions[definition.name] = definition
        if not isinstance(definition, Extern):
            self.layouts[definition.name] = definition.layout

    def extern(self, node: Node, why: str) -> None:
        """The op as itself."""
        made = node.spec if isinstance(node.spec, tuple) else (node.spec,)
        layouts = tuple(Layout.of(s) if isinstance(s, Spec) else None for s in made)
        self._put(Extern(node.name, node, layouts, tuple(node.refs()), why, node.source))
        if isinstance(node.spec, Spec):
            self.layouts[node.name] = layouts[0]  # type: ignore[assignment]

    # What the rules use.

    def layout(self, value: Any) -> Layout:
        """Geometry of an argument that is a tensor."""
        if not isinstance(value, Ref) or value.name not in self.layouts:
            raise Unsupported(str(value), f"{value} is not a tensor with a known layout", stage="define")
        return self.layouts[value.name]

    def view(self, value: Ref) -> View:
        """The argument as geometry over the value in whose memory it lies."""
        return self.views.get(value.name) or View(value.name, self.layout(value), 0)

    def read(self, value: Any, index: Sequence[Affine]) -> Expr:
        """The element of a tensor argument at `index` (one entry per dimension)."""
        where = self.view(value)
        offset = linear(index, where.layout.stride, where.offset)
        return load(where.base, offset, where.layout.dtype)

    def read_broadcast(self, value: Any, index: Sequence[Affine]) -> Expr:
        """The element of an argument, broadcast to the rank and shape of `index`; a number is itself."""
        if not isinstance(value, Ref):
            return self.number(value)
        shape = self.layout(value).shape
        own = index[len(index) - len(shape) :]
        return self.read(value, [Affine() if s == 1 else i for s, i in zip(shape, own, strict=True)])

    def number(self, value: Any) -> Expr:
        """A Python number as an expression of its natural dtype."""
        if isinstance(value, bool):
            return const(value, torch.bool)
        if isinstance(value, int):
            return const(value, torch.int64)
        if isinstance(value, float):
            return const(value, torch.float32)
        if isinstance(value, Size):
            raise Undecided(f"{value} would be a number in a kernel's body")
        raise Unsupported(str(value), f"{value!r} is no number", stage="define")

    def map(self, node: Node, expr: Expr, *, name: str = "", layout: Layout | None = None) -> None:
        """Defines the node's value element by element; `expr` is over `variables(layout.shape)`."""
        layout = layout or Layout.of(node.spec)  # type: ignore[arg-type]
        if not layout.dense:
            self.spread[name or node.name] = layout
            layout = Layout.contiguous(layout.shape, layout.dtype, layout.device)
        self._put(Map(name or node.name, layout, keep(expr, layout.dtype), node.source))

    def reduce(
        self,
        name: str,
        node: Node,
        kind: str,
        expr: Expr,
        domain: tuple[int, ...],
        reduced: tuple[int, ...],
        layout: Layout,
    ) -> None:
        """Defines a value as a reduction of `expr`, which is over `variables(domain)`."""
        self._put(Reduce(name, layout, domain, reduced, kind, expr, node.source))

    def put(self, definition: Definition) -> None:
        """Defines a value of another class."""
        self._put(definition)

    def finish(self) -> Values:
        """The collected definitions, with outputs whose geometry differs from their value's copied to it."""
        outputs = tuple(self._output(i, o) for i, o in enumerate(self.trace.outputs))
        values = Values(
            self.trace.inputs,
            self.definitions,
            self.views,
            outputs,
            self.trace.mutations,
            self.trace.structure,
            self.layouts,
            self.trace.nodes,
            self.trace.absolute,
        )
        return _measured_together(values)

    def _output(self, position: int, output: Any) -> Any:
        if output.kind != "value":
            return output
        layout, wanted = self.layouts[output.ref], Layout.of(output.spec)
        base = self.views[output.ref].base if output.ref in self.views else output.ref
        foreign = any(i.name == base for i in self.trace.inputs)
        if layout.shape != wanted.shape:
            # Both are torch's word: its fake kernel and its decomposition disagree, and only the op itself is right.
            raise Unsupported(
                output.ref, f"torch traces it with shape {wanted.shape} and with {layout.shape}", stage="define"
            )
        strides_match = all(a == b for a, b, s in zip(layout.stride, wanted.stride, wanted.shape, strict=True) if s > 1)
        if strides_match and not foreign:
            return output
        return self._copied(position, output, wanted)

    def _copied(self, position: int, output: Any, wanted: Layout) -> Any:
        name = f"{output.ref}_out{position}"
        self._put(Map(name, wanted, self.read(Ref(output.ref), variables(wanted.shape))))
        return replace(output, ref=name)


def at_flat(flat: Affine, shape: Sequence[int]) -> tuple[Affine, ...]:
    """The index of the `flat`-th element of a tensor of this shape, row-major."""
    from .affine import contiguous_strides

    return delinearize(flat, shape, contiguous_strides(shape))


def _named(node: Node) -> Rule | None:
    """The rule for what a node calls, by name."""
    call = writing(node)
    return None if call is None else NAMED.get(call.op.name().removesuffix(".default"))


def is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and not isinstance(value, Const)


def _is_view(node: Node) -> bool:
    if not isinstance(node.op, torch._ops.OpOverload):
        return False
    if node.op is torch.ops.aten._unsafe_view.default:
        return True
    if node.op is torch.ops.aten._neg_view.default:
        return False
    schema = node.op._schema
    first = schema.arguments[0].alias_info if schema.arguments else None
    returns = [r.alias_info for r in schema.returns]
    return bool(
        first is not None
        and not first.is_write
        and returns
        and returns[0] is not None
        and node.args
        and isinstance(node.args[0], Ref)
    )
