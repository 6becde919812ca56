"""Stage 10: a schedule as one readable Python module.

Enters: a `Schedule`. Leaves: `Plan`: source text with the fused bodies as `@triton.jit` functions, the launches
prepared at import, and `call(*args)`, which makes buffers, launches in order and returns what the piece returns. Equal
schedules give byte-equal text. What cannot be written as text (script objects, higher-order ops) travels beside it in
`Plan.objects`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import torch

from .affine import Bounded, Div, Mod
from .choices import EARLY, Choice, at_size
from .emit_call import Calls, tensors
from .emit_expr import Body, flat, short_names
from .emit_loads import apart
from .emit_loop import looped_body
from .errors import UserError
from .facts import Facts
from .functions import HELPERS
from .group import Group
from .parser import parse
from .schedule import Schedule
from .select import Kernel, is_looped
from .size import NAME, Undecided
from .values import Values

# Families that ask for what their epilogue reads before the product.
READING_EARLY = frozenset({"gemm_stream"})


@dataclass(frozen=True)
class Plan:
    """What will run.

    Args:
        source: the module's text.
        facts: what its runner needs to know.
        stages: what it was written from; None for a plan from the cache.
        objects: what the text cannot hold, by position.
        constants: tensors the piece holds, by input name.
    """

    source: str
    facts: Facts
    stages: Schedule | None = None
    objects: tuple[Any, ...] = ()
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def schedule(self) -> Schedule:
        """What the plan was written from.

        Raises:
            UserError: it comes from the cache.
        """
        if self.stages is None:
            raise UserError("a plan from the cache", "it has no stages to look at", stage="emit",
                            remedy="Look at a piece that was compiled without a cache.")  # fmt: skip
        return self.stages

    @property
    def themselves(self) -> tuple[str, ...]:
        """Ops that run as themselves, each with the reason; of a plan from the cache none is known."""
        launches = self.stages.launches() if self.stages is not None else []
        return tuple(f"{kernel.name}: {kernel.why}" for kernel in launches if not kernel.family)


def emit(schedule: Schedule, title: str) -> Plan:
    """The plan's text.

    Args:
        schedule: order, configs, buffers.
        title: the header's first line: which piece and which sizes.
    """
    writer = _Writer(schedule)
    bodies = [text for step in schedule.steps if step.kernel.family and (text := writer.body(step.kernel))]
    prepared = [writer.prepared(step.kernel) for step in schedule.steps if step.kernel.family]
    call = writer.calls.call()
    header = writer.header(title, "\n".join([*bodies, *prepared, call]))
    text = "\n\n\n".join([header, *bodies, "\n".join(prepared), call])
    text = text.replace("\n\n\n\n\n", "\n\n\n").rstrip() + "\n"
    constants = {i.name: i.value for i in schedule.values.inputs if i.kind == "constant"}
    return Plan(text, Facts.of(schedule), schedule, tuple(writer.calls.objects), constants)


class _Writer:
    """Turns steps into text; holds names that must stay unique."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.values: Values = schedule.values
        inputs = [i.name for i in self.values.inputs]
        self.names = short_names([*inputs, *self.values.definitions, *self.values.views])
        self.calls = Calls(schedule, self.names)
        self.bodies: dict[str, str] = {}  # function by what it does
        self.body_of: dict[str, str] = {}  # function by the kernel's name
        self.reading: set[str] = set()  # functions whose reads stand in one of their own
        self.launches: dict[str, str] = {}  # variable by how it is prepared

    # Module level.

    def header(self, title: str, rest: str) -> str:
        launches = self.schedule.launches()
        ours = [k for k in launches if k.family]
        lines = ['"""' + title, ""]
        lines.append(f"{len(ours)} kernels, {len(launches) - len(ours)} ops as themselves.")
        lines += [
            f"  {k.name}: {k.family} {k.config} ({k.why})" if k.family else f"  {k.name}: itself ({k.why})"
            for k in launches
        ]
        lines += ['"""', ""]
        if "math." in rest:
            lines.append("import math")
        lines.append("import torch")
        if "tl." in rest:
            lines += ["import triton", "import triton.language as tl"]
        if "libdevice." in rest:
            lines.append("from triton.language.extra import libdevice")
        lines.append("")
        families = sorted(set().union(*map(_families, ours)))
        if families:
            lines.append(f"from terrazzo.kernels import {', '.join(families)}")
        if self.calls.allocates:
            lines.append("from terrazzo.kernels.buffers import empty_on")
        if any(k.by_size for k in ours):
            lines.append("from terrazzo.kernels.by_size import BySize")
        helpers = sorted(set(HELPERS.findall(rest)))
        if helpers:
            lines.append(f"from terrazzo.kernels.functions import {', '.join(helpers)}")
        if any(k.group.contract is not None for k in ours):
            lines.append("from terrazzo.kernels.gemm import GemmProblem")
        return "\n".join(lines)

    def body(self, kernel: Kernel) -> str:
        """The body function of a launch; empty where an earlier launch has the same but for the names in it, as the
        layers of a model do: then both share it, and what it compiles to."""
        name = f"{self.names[kernel.name]}_body"
        text, parts, reads = self.function(kernel, name), self.parts(kernel, name), ""
        if _families(kernel) <= READING_EARLY:
            reads, text = apart(text, len(tensors(kernel)) + bool(parts), _loads(name))
        functions = [one for one in (parts, reads, text) if one]
        # Of a loop there are four functions.
        what = text if is_looped(kernel) else "".join(map(nameless, functions))
        if self.bodies.setdefault(what, name) == name and reads:
            self.reading.add(name)
        self.body_of[kernel.name] = self.bodies[what]
        return "\n\n\n".join(functions) if self.body_of[kernel.name] == name else ""

    def parts(self, kernel: Kernel, body: str) -> str:
        """The function that reads the parts of an epilogue's rows; empty where it needs no sums of rows."""
        group = kernel.group
        if not group.parts_read:
            return ""
        [read], [total] = group.parts_read, [r for r in group.reductions if r.parts]
        lines = ["@triton.jit", f"def {_parts(body)}(m, n, t):"]
        lines += [f"    {line}" for line in self.pointers(tensors(kernel), {read.value})]
        if self.wide(group):
            lines.append("    m, n = m.to(tl.int64), n.to(tl.int64)")
        pointer = f"{self.names[read.value]}_ptr + m * {total.parts}"
        return "\n".join([*lines, f"    return load_parts({pointer}, n, {total.parts})"])

    def pointers(self, tensors: Sequence[str], used: Collection[str]) -> list[str]:
        return [f"{self.names[n]}_ptr = t[{i}]" for i, n in enumerate(tensors) if n in used]

    def function(self, kernel: Kernel, name: str) -> str:
        epilogue = kernel.group.contract is not None
        touched = tensors(kernel)
        dtypes = {n: self.values.layouts[n].dtype for n in touched}
        if is_looped(kernel):
            body = looped_body(name, kernel.group, touched, dtypes, self.names)
            return self.sizeless(kernel, body)
        parameters = "acc, acc2, m, n, mask, t" if epilogue else "SEGMENT: tl.constexpr, row, col, mask, t"
        lines = ["@triton.jit", f"def {name}({parameters}):"]
        for number, group in enumerate(kernel.segments):
            inner = [f"# {line}" for line in self.sources(group)]
            used = {load.value for load in group.body_loads} | {s.value for s in group.stores}
            inner += self.pointers(touched, used)
            if epilogue and self.wide(group):
                inner.append("m, n = m.to(tl.int64), n.to(tl.int64)")
            inner += self.sizeless(kernel, "\n".join(Body(group, dtypes, self.names, epilogue).write())).split("\n")
            indent = "    "
            if len(kernel.segments) > 1:
                lines.append(f"    if SEGMENT == {number}:")
                indent = "        "
            lines += [indent + line for line in inner]
        return "\n".join(lines)

    def sizeless(self, kernel: Kernel, body: str) -> str:
        """The body, which is compiled once for all sizes of a range: the size must not stand in it."""
        found = re.search(rf".*\b{NAME}\b.*", body) if NAME in body else None
        if found is not None:
            raise Undecided(f"the size stands in the body of %{kernel.name}: `{found[0].strip()}`")
        return body

    def sources(self, group: Group) -> list[str]:
        """`node: name (file.py:120)` for each value computed here."""
        found = []
        for name in group.members:
            made = self.values.definitions[name]
            found.append(f"node: {name}" + (f" ({made.source})" if made.source else ""))
        return found

    def wide(self, group: Group) -> bool:
        """Whether 32 bits do not hold some offset, or what it is divided out of."""
        offsets = [flat(o) for o in (*(load.offset for load in group.loads), *(s.offset for s in group.stores))]
        inner = [flat(a.base) for o in offsets for a in o.atoms() if isinstance(a, (Div, Mod, Bounded))]
        return any(max(abs(x) for x in o.range) >= 2**31 for o in (*offsets, *inner))

    def prepared(self, kernel: Kernel) -> str:
        """The launch, prepared at import; one that is prepared like an earlier one is that one."""
        name = self.names[kernel.name]
        own = Choice(kernel.family, kernel.config, kernel.pdl, kernel.why)
        if not kernel.by_size:
            text = self.preparation(kernel, own, at_size(kernel.problem))
        else:
            first = {choice.key: (bound, choice) for bound, choice in reversed(kernel.by_size)}
            numbers = {key: number for number, key in enumerate(first)}
            table = {bound: numbers[choice.key] for bound, choice in kernel.by_size}
            launches = [self.preparation(kernel, choice, at_size(kernel.problem, b)) for b, choice in first.values()]
            inner = "".join(f"    {x},\n" for x in (repr(table), *(x.replace("\n", "\n    ") for x in launches)))
            text = f"BySize(\n{inner})"
        variable = self.launches.setdefault(text, f"launch_{name}")
        said: list[str] = []
        if (body := self.body_of[kernel.name]) != f"{name}_body":
            nodes = (line for group in kernel.segments for line in self.sources(group))
            said = [f"# {line}\n" for line in (f"{body} does this as well, but for the names in it:", *nodes)]
        return "".join(said) + f"launch_{name} = {text if variable == f'launch_{name}' else variable}"

    def preparation(self, kernel: Kernel, choice: Choice, problem: Any) -> str:
        """A family's `prepare` for one choice."""
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(choice.config).items())
        parts = [self.body_of[kernel.name], f"{choice.family}.Config({settings})"]
        if kernel.group.contract is not None:
            told = ", ".join(f"{f.name}={v!r}" for f in fields(problem) if (v := getattr(problem, f.name)) != f.default)
            parts.append(f"GemmProblem({told})")
            if kernel.group.parts_read:
                parts.append(f"parts={_parts(self.body_of[kernel.name])}")
            if self.body_of[kernel.name] in self.reading:
                parts.append(f"loads={_loads(self.body_of[kernel.name])}")
        elif any(map(self.wide, kernel.segments)):
            parts.append("wide=True")
        if choice.pdl:
            leads = kernel.name in self.schedule.leading and choice.family in EARLY
            parts.append("pdl=True, leads=True" if leads else "pdl=True")
        inner = ",\n    ".join(parts)
        return f"{choice.family}.prepare(\n    {inner},\n)"


@lru_cache(maxsize=1 << 12)
def nameless(function: str) -> str:
    """A function's text without comments and decorators, its own name and those of its variables replaced by numbers:
    equal for functions that do the same to their arguments."""
    (tree,) = parse(function).body
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = []
    variables = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made = dict.fromkeys(node.id for node in variables if isinstance(node.ctx, ast.Store))
    for parameter in tree.args.args:
        made.pop(parameter.arg, None)
    numbers = {name: f"_{number}" for number, name in enumerate(made)}
    for node in variables:
        node.id = numbers.get(node.id, node.id)
    tree.name = "_"
    return ast.unparse(tree)


def _parts(body: str) -> str:
    """Name of the function that reads the parts of a body's rows."""
    return body.removesuffix("_body") + "_parts"


def _loads(body: str) -> str:
    """Name of the function that reads what a body needs beside the product."""
    return body.removesuffix("_body") + "_loads"


def _families(kernel: Kernel) -> set[str]:
    """Families that run a launch at one size or another."""
    return {kernel.family, *(choice.family for _, choice in kernel.by_size)}
