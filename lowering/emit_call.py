"""The function `call` of a plan's module: buffers, launches and ops as themselves in order, and what the piece returns.

What cannot be written as text (script objects, higher-order ops) is kept beside it, in `Calls.objects`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter

from .ir import Output, Ref, Scalar, Spec, map_tree
from .schedule import Schedule, Step
from .select import Kernel, operand
from .size import NAME, Size, integer
from .values import Contract, Empty, Extern, Item, Layout, Map, Reduce, Values, View
from .writes import Writing, writing


def tensors(kernel: Kernel) -> list[str]:
    """Values in memory that a launch's bodies touch, reads first."""
    names = [load.value for g in kernel.segments for load in g.loads]
    return list(dict.fromkeys(names + [s.value for g in kernel.segments for s in g.stores]))


class Calls:
    """Writes the call.

    Args:
        schedule: order and buffers.
        names: Python names of values.
    """

    def __init__(self, schedule: Schedule, names: Mapping[str, str]) -> None:
        self.schedule, self.names = schedule, names
        self.values: Values = schedule.values
        self.objects: list[Any] = []

    def call(self) -> str:
        arguments, layouts = self.values.inputs, self.values.layouts
        names = ", ".join(self.names[i.name] for i in arguments)
        lines = [f"def call({names}):"]
        here = [i.name for i in arguments if i.name in layouts and layouts[i.name].device == self.values.device]
        where = f"{self.names[here[0]]}.device" if here else _device(self.values.device)
        lines.append(f"    device = {where}")
        if self.allocates:
            lines.append("    empty = empty_on(device)")
        lines += [f"    {NAME} = {place}" for place in self.size_places()[:1]]
        for step in self.schedule.steps:
            lines += ["    " + line for line in self.step(step)]
        for target, value in self.values.mutations:
            lines.append(f"    {self.names[target]}.copy_({self.tensor(value)})")
        lines.append(f"    return ({''.join(self.output(o) + ', ' for o in self.values.outputs).rstrip()})")
        return "\n".join(lines)

    @property
    def allocates(self) -> bool:
        """Whether the call makes memory on the device where it runs."""
        made = [name for step in self.schedule.steps for name in step.makes]
        return any(self.values.layouts[name].device == self.values.device for name in made)

    def size_places(self) -> list[str]:
        """Where a call finds the number of tokens, in a plan for a range of them."""
        found = []
        for given in self.values.inputs:
            for dim, number in enumerate(given.spec.shape if given.spec is not None else (given.value,)):
                if isinstance(number, Size) and (number.factor, number.const) == (1, 0):
                    name = self.names[given.name]
                    found.append((given.spec is not None, name if given.spec is None else f"{name}.shape[{dim}]"))
        return [place for _, place in sorted(found, key=lambda f: f[0])]

    def step(self, step: Step) -> list[str]:
        kernel = step.kernel
        lines = [f"{self.names[n]} = {self.buffer(self.values.layouts[n])}" for n in step.makes]
        group = kernel.group
        if group.kind == "extern":
            assert group.foreign is not None
            call = writing(group.foreign.node)
            lines += self.foreign(group.foreign) if call is None else self.writing(group.foreign, call, step.drops)
        elif group.kind == "item":
            made = self.values.definitions[group.members[0]]
            assert isinstance(made, Item)
            lines.append(f"{self.names[made.name]} = {self.names[made.of]}[{made.position}]")
        elif kernel.family:
            lines.append(self.launch(kernel))
        made_here = [n for n in step.drops if not isinstance(self.values.definitions.get(n), Empty) or n in step.makes]
        if made_here and step is not self.schedule.steps[-1]:
            lines.append(f"del {', '.join(self.names[n] for n in step.drops)}")
        return lines

    def launch(self, kernel: Kernel) -> str:
        name, size = self.names[kernel.name], f"{NAME}, " if kernel.by_size else ""
        given = "".join(f"{self.names[n]}, " for n in tensors(kernel)).rstrip()
        if kernel.group.contract is not None:
            product = kernel.group.contract
            x, w = self.geometry(product.a), self.geometry(operand(product.b, kernel.problem.layout))
            return f"launch_{name}({size}{x}, {w}, ({given}))"
        rows = "".join(f"{g.rows}, " for g in kernel.segments).rstrip()
        return f"launch_{name}({size}({given}), ({rows}), {kernel.group.cols})"

    def foreign(self, made: Extern) -> list[str]:
        args = [_python(map_tree(a, self.leaf)) for a in made.node.args]
        args += [f"{k}={_python(map_tree(v, self.leaf))}" for k, v in made.node.kwargs.items()]
        op = made.node.op
        text = f"torch.ops.{op}" if isinstance(op, torch._ops.OpOverload) else self.kept(op)
        lines = [f"# {made.name}: itself, {made.why}"] if made.why else []
        returns = isinstance(op, torch._ops.OpOverload) and bool(op._schema.returns)
        target = f"{self.names[made.name]} = " if returns or any(made.layouts) else ""
        return [*lines, f"{target}{text}({', '.join(args)})"]

    def writing(self, made: Extern, call: Writing, ends: Sequence[str]) -> list[str]:
        """An op that writes arguments: on copies of what is not ours, or is read later than this."""
        lines, bases, copies = [f"# {made.name}: itself, {made.why}"], [], []
        for number, base in enumerate(call.bases):
            text = self.tensor(base.name)
            if not self._ends(number, made, call, ends):
                dense = self.values.layouts[base.name].dense
                copied = f"{text}.clone()" if dense else f"torch._prims_common.clone_preserve_strides({text})"
                text = f"{self.names[made.name]}_writes_{number}"
                lines.append(f"{text} = {copied}")
                copies.append(text)
            bases.append(text)
        parts = {name: f"{name}={_python(map_tree(value, self.leaf))}" for name, value in call.given.items()}
        for name, place in call.written.items():
            text = "None" if place is None else bases[place[0]]
            if place is not None and place[1] is not None:
                dim, start, end = (_python(self.literal(n)) for n in (place[1].dim, place[1].start, place[1].end))
                text = f"torch.ops.aten.slice.Tensor({text}, {dim}, {start}, {end})"
            parts[name] = f"{name}={text}"
        arguments = ", ".join(parts[a.name] for a in call.op._schema.arguments if a.name in parts)
        result = f"torch.ops.{call.op}({arguments})"
        if len(call.op._schema.returns) > 1:
            result = f"*{result}"
        lines.append(f"{self.names[made.name]} = ({', '.join([result, *bases])},)")
        return lines + [f"del {', '.join(copies)}"] * bool(copies)

    def _ends(self, number: int, made: Extern, call: Writing, ends: Sequence[str]) -> bool:
        """Whether a base is memory of this plan that nothing reads after this call, nor the call itself elsewhere."""
        base, definitions = self.values.base(call.bases[number].name), self.values.definitions
        ours = isinstance(definitions.get(base), (Map, Reduce, Contract, Empty))
        elsewhere = (*call.read, *(b.name for i, b in enumerate(call.bases) if i != number))
        others = [self.values.base(other) for other in elsewhere]
        # What another op returns may share memory with what it was given.
        seen = any(isinstance(d, Extern) and d is not made and base in map(self.values.base, d.reads)
                   for d in definitions.values())  # fmt: skip
        return ours and base in ends and base not in others and not seen

    def leaf(self, value: Any) -> Any:
        """An argument of an op as source."""
        return _Text(self.tensor(value.name)) if isinstance(value, Ref) else self.literal(value)

    def literal(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            home = self.values.device
            return _Text("device" if str(value) in (str(home), home.type) else _device(value))
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Size):
            return _Text(str(value))
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return _Text(str(value))
        if isinstance(value, Scalar):
            names = {s: sympy.Symbol(self.names[s.name]) for s in value.expr.free_symbols}
            return _Text(PythonPrinter().doprint(value.expr.xreplace(names)))
        return _Text(self.kept(value))

    def kept(self, value: Any) -> str:
        """A Python object beside the text."""
        self.objects.append(value)
        return f"OBJECTS[{len(self.objects) - 1}]"

    def buffer(self, layout: Layout) -> str:
        geometry = f"{_tuple(layout.shape)}, {_tuple(layout.stride)}"
        if layout.device == self.values.device:
            return f"empty({geometry}, {layout.dtype})"
        return f"torch.empty_strided({geometry}, dtype={layout.dtype}, device={_device(layout.device)})"

    def tensor(self, name: str) -> str:
        """A value in memory as an expression, views included."""
        if name in self.values.views:
            return self.geometry(self.values.views[name])
        return self.names[name]

    def geometry(self, view: View, exact: bool = False) -> str:
        """A view as an expression; unless `exact`, strides of dimensions of size 1 are as they come."""
        base = self.values.layouts[view.base]
        same = base.shape == view.layout.shape and view.offset == 0
        pairs = zip(base.stride, view.layout.stride, base.shape, strict=True) if same else ()
        same = same and all(a == b for a, b, s in pairs if exact or s > 1)
        name = self.names[view.base]
        if same:
            return name
        ours = isinstance(self.values.definitions.get(view.base), (Map, Reduce, Contract, Empty))
        beyond = f" + {view.offset}" if view.offset else ""
        offset = str(view.offset) if ours else f"{name}.storage_offset(){beyond}"
        return f"{name}.as_strided({_tuple(view.layout.shape)}, {_tuple(view.layout.stride)}, {offset})"

    def dtype(self, name: str) -> torch.dtype:
        return self.values.layouts[name].dtype

    def reinterpreted(self, name: str, spec: Spec) -> str:
        """An input's memory as numbers of another dtype."""
        start = f"{self.names[name]}.storage_offset() * {self.dtype(name).itemsize} // {spec.dtype.itemsize}"
        memory = f"{self.names[name]}.untyped_storage(), {start} + {int(spec.offset)}"
        sizes = f"{_tuple(spec.sizes())}, {_tuple(spec.strides())}"
        return f"torch.empty(0, dtype={spec.dtype}, device=device).set_({memory}, {sizes})"

    def output(self, output: Output) -> str:
        if output.kind == "input":
            return self.names[output.ref]
        if output.kind == "alias" and output.spec is not None and output.spec.dtype != self.dtype(output.ref):
            return self.reinterpreted(output.ref, output.spec)
        if output.kind in ("alias", "value"):
            assert output.spec is not None
            view = self.values.views.get(output.ref)
            base, offset = (view.base, view.offset) if view is not None else (output.ref, 0)
            offset = integer(output.spec.offset) if output.kind == "alias" else offset
            text = self.geometry(View(base, Layout.of(output.spec), offset), exact=True)
            # Whoever gets it may change its shape, or ask whether it is what they gave.
            apart = output.kind == "alias" or output.another
            return f"{text}.detach()" if apart and text == self.names[base] else text
        return _python(self.literal(output.value))


class _Text(str):
    """Source text that stands for itself."""

    def __repr__(self) -> str:
        return str(self)


def _python(value: Any) -> str:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_python, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_python(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _device(device: torch.device) -> str:
    return f'torch.device("{device}")'


def _tuple(numbers: Sequence[int]) -> str:
    return "(" + "".join(f"{n}, " for n in numbers).rstrip() + ")"
