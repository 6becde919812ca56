"""What a value is: the definitions that `define` gives to every node and that fusion composes.

A definition says what one element of a value is as a function of its index, or which product or foreign op makes it.
All sizes are integers here. Views have no definition of their own: reading one is reading its base at another offset.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch

from .affine import contiguous_strides
from .expr import Expr
from .ir import Input, Node, Output, Spec
from .show import dtype_name, expression

# How the kinds of reductions begin whose result is every prefix's.
RUNNING = "running_"


@dataclass(frozen=True)
class Layout:
    """A tensor of known geometry: shape and strides in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(spec: Spec) -> Layout:
        return Layout(spec.sizes(), spec.strides(), spec.dtype, spec.device)

    @staticmethod
    def contiguous(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Layout:
        return Layout(shape, contiguous_strides(shape), dtype, device)

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def dense(self) -> bool:
        """Whether the elements fill their memory exactly, in some order of dimensions."""
        step = 1
        for stride, size in sorted((st, s) for st, s in zip(self.stride, self.shape, strict=True) if s != 1):
            if stride != step:
                return False
            step *= size
        return True


def home(devices: Iterable[torch.device]) -> torch.device:
    """Where a piece's kernels run: the first CUDA device among those of its tensors, else the first of all."""
    found = list(devices)
    return next((d for d in found if d.type == "cuda"), found[0] if found else torch.device("cpu"))


@dataclass(frozen=True)
class View:
    """A value that is `base`'s memory at another geometry; `offset` in elements from the base's first."""

    base: str
    layout: Layout
    offset: int


@dataclass(frozen=True)
class Map:
    """Each element is `expr` of its index: variables 0 … rank-1 over `layout.shape`."""

    name: str
    layout: Layout
    expr: Expr
    source: str = ""


@dataclass(frozen=True)
class Reduce:
    """`kind` of `expr` over the dimensions `reduced` of `domain`; variables 0 … over `domain` in natural order.

    `layout` is that of the result, whose elements stand in the order of the dimensions kept; those of a running
    reduction (a cumulative sum: one result per element) in the order of the domain.
    """

    name: str
    layout: Layout
    domain: tuple[int, ...]
    reduced: tuple[int, ...]
    kind: str
    expr: Expr
    source: str = ""

    @property
    def running(self) -> bool:
        return self.kind.startswith(RUNNING)

    @property
    def rows(self) -> int:
        return math.prod(s for i, s in enumerate(self.domain) if i not in self.reduced)

    @property
    def cols(self) -> int:
        return math.prod(self.domain[i] for i in self.reduced)


@dataclass(frozen=True)
class Parts(Reduce):
    """A row's sum in parts, of which only the total counts: it may all be in the first parts of a tile."""


@dataclass(frozen=True)
class SumOfParts(Reduce):
    """The total of what `Parts` left of each row."""


@dataclass(frozen=True)
class Contract:
    """`m × k` times `k × n`, accumulated in fp32; `a` and `b` are the operands as geometry over values in memory.

    Args:
        rounded: an op of the piece ends with these sums, so that eager rounds them here; otherwise they are inside one,
            such as `addmm`, that rounds later.
        few: up to so many rows reading `b` is what it costs, and what follows it stands in its epilogue.
    """

    name: str
    layout: Layout
    a: View
    b: View
    m: int
    n: int
    k: int
    source: str = ""
    rounded: bool = True
    few: int = 0


@dataclass(frozen=True)
class Extern:
    """An op that runs as itself: what it reads must be in memory. `why` says what kept it from being lowered."""

    name: str
    node: Node
    layouts: tuple[Layout | None, ...]
    reads: tuple[str, ...]
    why: str
    source: str = ""


@dataclass(frozen=True)
class Item:
    """Result `position` of the extern `of`."""

    name: str
    layout: Layout
    of: str
    position: int
    source: str = ""


@dataclass(frozen=True)
class Empty:
    """Memory whose content nobody asked for (`torch.empty`)."""

    name: str
    layout: Layout
    source: str = ""


Definition: TypeAlias = Map | Reduce | Contract | Extern | Item | Empty


@dataclass(frozen=True)
class Values:
    """A piece as definitions, in an order in which they can be computed.

    Args:
        inputs: the piece's arguments and constants.
        definitions: by name, in order.
        views: names that are geometry over another value.
        outputs, mutations, absolute: as in `Trace`, names resolved by `views` where they are views.
        layouts: geometry of every value.
        ops: the trace's nodes, which these definitions were made of.
        hoisted: products whose operand lost its scale, with the value that is their scaled result (see hoist.py).
    """

    inputs: tuple[Input, ...]
    definitions: Mapping[str, Definition]
    views: Mapping[str, View]
    outputs: tuple[Output, ...]
    mutations: tuple[tuple[str, str], ...]
    structure: Any = None
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    ops: tuple[Node, ...] = ()
    absolute: bool = False
    hoisted: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def device(self) -> torch.device:
        """Where the kernels run."""
        return home(layout.device for layout in self.layouts.values())

    @cached_property
    def given(self) -> frozenset[str]:
        """The inputs that the piece leaves as they are."""
        return frozenset(i.name for i in self.inputs) - {target for target, _ in self.mutations}

    @cached_property
    def parameters(self) -> frozenset[str]:
        """The inputs that are weights and buffers."""
        return frozenset(i.name for i in self.inputs if i.parameter)

    @cached_property
    def kept(self) -> frozenset[str]:
        """Values whose memory the caller sees: returned ones, and those that arguments are overwritten with."""
        returned = (o.ref for o in self.outputs if o.kind == "value")
        return frozenset(self.base(name) for name in (*returned, *(made for _, made in self.mutations)))

    def base(self, name: str) -> str:
        """The value in whose memory `name` lies."""
        return self.views[name].base if name in self.views else name

    def __str__(self) -> str:
        lines = [_line(made) for made in self.definitions.values()]
        lines += [f"view %{n} of %{v.base} + {v.offset} {v.layout.shape}" for n, v in self.views.items()]
        return "\n".join(lines)


def _line(made: Definition) -> str:
    """One line: kind, name, shape and dtype, what it is, source line."""
    head, where = f"{type(made).__name__.lower()} %{made.name}", f"  # {made.source}" if made.source else ""
    if isinstance(made, Extern):
        return f"{head} = {made.node.target}({', '.join(f'%{name}' for name in made.reads)}){where}"
    head += f" {list(made.layout.shape)} {dtype_name(made.layout.dtype)}"
    if isinstance(made, Map):
        return f"{head} = {expression(made.expr)}{where}"
    if isinstance(made, Reduce):
        over = ", ".join(f"i{i} < {made.domain[i]}" for i in made.reduced)
        return f"{head} = {made.kind} over {over or 'nothing'} of {expression(made.expr)}{where}"
    if isinstance(made, Contract):
        a, b = (f"%{v.base} {list(v.layout.shape)}" for v in (made.a, made.b))
        return f"{head} = {a} @ {b}{where}"
    if isinstance(made, Item):
        return f"{head} = result {made.position} of %{made.of}{where}"
    return f"{head}{where}"
