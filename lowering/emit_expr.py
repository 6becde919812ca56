"""Expressions as Triton source: one body function per launch.

What a person would write: every load and every value of the source graph that is used twice, or that has an op of the
graph behind it, is a line with its FX name; the rest is nested. Shapes: `row` is [R, 1] and always valid, `col` is
[1, C], `mask` is [R, C]; in an epilogue `m`, `n` and `mask`, or all of them the other way round. A load that depends on
the row alone needs no mask, one on the column alone `col < cols`.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from .affine import Affine, Atom, Bounded, Div, Indirect, Mod, Var
from .expr import Acc, Apply, Const, Expr, Index, Load, Masked, RowScalar, children, walk
from .functions import COMPARISONS, HELPER_NAMES, TYPES, apply_text, atomic, constant, register
from .group import Group, Store
from .size import NAME

# Names that mean something else inside a body.
RESERVED = {
    *HELPER_NAMES,
    NAME,
    "t",
    "row",
    "col",
    "mask",
    "m",
    "n",
    "acc",
    "acc2",
    "tl",
    "triton",
    "torch",
    "libdevice",
    "float",
    "device",
    "empty",
    "empty_on",
    "call",
}

# A value of the source graph whose text is longer (`_length`) has a line of its own.
LONG = 32

# What a masked lane contributes to a reduction.
NEUTRAL = {
    "sum": "0",
    "max": "low",
    "min": "high",
    "prod": "1",
    "any": "False",
    "all": "True",
    "argmax": "low",
    "argmin": "high",
    "running_sum": "0",
    "running_prod": "1",
}


def identifier(name: str) -> str:
    """A value's name as a Python name."""
    name = re.sub(r"\W", "_", name)
    return f"{name}_" if keyword.iskeyword(name) or name in RESERVED else name


def short_names(values: Iterable[str]) -> dict[str, str]:
    """Readable, distinct Python names: Dynamo's paths without what every path has."""
    given: dict[str, str] = {}
    taken: set[str] = set()
    for value in values:
        name = re.sub(r"^l_(?:self_)?", "", value.lower() if value.startswith("L_") else value)
        name = re.sub(r"_?(?:modules|parameters|buffers)_+", "_", name).strip("_") or value
        name = base = identifier(name if not name[0].isdigit() else f"v_{name}")
        count = 2
        while name in taken:
            name, count = f"{base}_{count}", count + 1
        taken.add(name)
        given[value] = name
    return given


@dataclass
class Body:
    """Writes the statements of one group.

    Args:
        group: what is computed.
        dtypes: of values in memory.
        names: Python names of values.
        epilogue: whether the indices are `m` and `n` of a GEMM's tile instead of `row` and `col`.
    """

    group: Group
    dtypes: Mapping[str, torch.dtype]
    names: Mapping[str, str]
    epilogue: bool
    lines: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    done: dict[tuple[Expr, Expr | None], tuple[str, frozenset[int]]] = field(default_factory=dict)
    uses: Counter[Expr] = field(default_factory=Counter)
    called: dict[Expr, str] = field(default_factory=dict)
    # Expressions whose text depends on the condition they stand under.
    reading: set[Expr] = field(default_factory=set)

    def __post_init__(self) -> None:
        # A value may be called what another one's pointer is.
        self.taken.update(map(self.pointer, self.dtypes))
        for expr, name in self.group.names.items():
            self.called.setdefault(kept(expr), name)

    def write(self) -> list[str]:
        """The statements, without indentation."""
        masks, values = zip(*map(stored, self.group.stores), strict=True) if self.group.stores else ((), ())
        roots = [*(r.expr for r in self.group.reductions), *values, *(mask for mask in masks if mask is not None)]
        self.uses.update(map(kept, roots))
        for node in dict.fromkeys(walk(*roots)):
            if kept(node) is node:
                self.uses.update(map(kept, children(node)))
            if _conditional(node) or any(child in self.reading for child in children(node)):
                self.reading.add(node)
        for reduction in self.group.reductions:
            if reduction.parts:
                # The schedule puts it behind the tensors.
                self.assign(reduction.value, f"t[{len(self.dtypes)}]")
                continue
            value = self.operand(reduction.expr)
            if reduction.half:
                self.assign(reduction.value, f"sum_of_heads({value}, n, {reduction.half})")
                continue
            self.assign(reduction.value, self.reduced(reduction.kind, value, register(reduction.expr.dtype)))
        for store in self.group.stores:
            self.store(store)
        return self.lines

    def assign(self, name: str, text: str) -> str:
        name = base = self.names.get(name) or identifier(name)
        count = 2
        while name in self.taken:
            name, count = f"{base}_{count}", count + 1
        self.taken.add(name)
        self.lines.append(f"{name} = {text}")
        return name

    def pointer(self, name: str) -> str:
        return f"{self.names[name]}_ptr"

    def operand(self, expr: Expr) -> str:
        """What is reduced, in its dtype: whole numbers alone would be as wide as they need."""
        value, _ = self.value(expr)
        typed = expr.dtype.is_floating_point or any(isinstance(n, (Load, RowScalar, Acc)) for n in walk(expr))
        return value if typed or expr.dtype == torch.bool else f"tl.cast({value}, {TYPES[register(expr.dtype)]})"

    def reduced(self, kind: str, value: str, dtype: torch.dtype) -> str:
        return f"row_{kind}(tl.where(mask, {value}, {neutral_text(kind, dtype)}))"

    def store(self, store: Store) -> None:
        held, expr = stored(store)
        value, _ = self.value(expr, held)
        if store.summed:
            parts = self.group.cols // store.summed
            pointer = f"{self.pointer(store.value)} + m * {parts}"
            self.lines.append(f"store_sums({pointer}, {value}, n, mask, {store.summed}, {parts})")
            return
        where, dims = self.offset(store.offset, None)
        where = self.spread(where, dims, frozenset((0,)) if store.per_row else frozenset((0, 1)))
        mask = "mask"
        if store.per_row:
            mask = "row_mask"
            if mask not in self.taken:
                self.assign(mask, "tl.max(mask.to(tl.int32), axis=1, keep_dims=True) != 0")
        if held is not None:
            inside, _ = self.value(held)
            mask = f"{mask} & {inside if atomic(inside) else f'({inside})'}"
        target, text = self.pointer(store.value), self.typed(value, expr, self.dtypes[store.value])
        self.lines.append(f"tl.store({target} + {where}, {text}, mask={mask})")

    def typed(self, value: str, expr: Expr, dtype: torch.dtype) -> str:
        """A value as what is stored: in the tensor's dtype; a constant as a tensor."""
        if isinstance(expr, Const) and not value.startswith("("):
            # A scalar takes the layout of what it is stored to, in Gluon as well.
            if self.epilogue:
                return f"tl.cast({value}, {TYPES[dtype]})"
            # Triton makes no constants of eight bits.
            made, rounded = (torch.float32, f".to({TYPES[dtype]})") if dtype == torch.float8_e4m3fn else (dtype, "")
            return f"tl.full([1, 1], {value}, {TYPES[made]}){rounded}"
        return f"{value if atomic(value) else f'({value})'}.to({TYPES[dtype]})"

    # Values.

    def value(self, expr: Expr, cond: Expr | None = None) -> tuple[str, frozenset[int]]:
        """The text of an expression under a condition, and the dimensions (0 row, 1 column) it varies along."""
        expr = kept(expr)
        key = (expr, cond if cond is not None and (expr in self.reading or _reads(expr)) else None)
        if key in self.done:
            return self.done[key]
        text, dims = self.text(expr, cond)
        named = self.called.get(expr)
        simple = text.isidentifier() or isinstance(expr, Const)
        long = named is not None and _length(text) > LONG
        if not simple and (isinstance(expr, Load) or self.uses.get(expr, 0) > 1 or long):
            text = self.assign(named or (expr.value if isinstance(expr, Load) else "value"), text)
        self.done[key] = text, dims
        return self.done[key]

    def text(self, expr: Expr, cond: Expr | None) -> tuple[str, frozenset[int]]:
        if isinstance(expr, Const):
            return constant(expr), frozenset()
        if isinstance(expr, Acc):
            return ("acc2" if expr.which else "acc"), frozenset((0, 1))
        if isinstance(expr, RowScalar):
            wide = any(r.value == expr.value and (r.running or r.half) for r in self.group.reductions)
            return self.names[expr.value], frozenset((0, 1) if wide else (0,))
        if isinstance(expr, Index):
            return self.number(expr, cond)
        if isinstance(expr, Masked):
            both = expr.cond if cond is None else Apply(torch.bool, fn="bitwise_and", args=(cond, expr.cond))
            return self.value(expr.body, both)
        if isinstance(expr, Load):
            return self.load(expr, cond)
        assert isinstance(expr, Apply)
        first = expr.args[0] if expr.fn == "cast" else None
        if isinstance(first, Load) and self.dtypes[first.value] == expr.dtype:
            # It is stored rounded already.
            return self.value(first, cond)
        if expr.fn in COMPARISONS and all(map(_short, expr.args)):
            parts = [self.place(a, cond) if isinstance(a, Index) else self.value(a, cond) for a in expr.args]
        else:
            parts = [self.value(a, cond) for a in expr.args]
        dims = frozenset().union(*(d for _, d in parts))
        return apply_text(expr, [p for p, _ in parts]), dims

    def place(self, expr: Index, cond: Expr | None) -> tuple[str, frozenset[int]]:
        """An index as wide as the kernel's own."""
        where, dims = self.offset(expr.offset, cond)
        return where if atomic(where) else f"({where})", dims

    def number(self, expr: Index, cond: Expr | None) -> tuple[str, frozenset[int]]:
        """An index as a number to calculate with, in 64 bits."""
        if _short(expr):
            where, dims = self.place(expr, cond)
            return f"{where}.to(tl.int64)", dims
        offset = flat(expr.offset)
        dims, parts = frozenset(), [str(offset.const)]
        for atom, coefficient in offset.terms:
            text, own = self.atom(atom, cond)
            dims |= own
            parts.append(f"{text}.to(tl.int64) * {coefficient}")
        return f"({' + '.join(parts)})", dims

    def load(self, expr: Load, cond: Expr | None) -> tuple[str, frozenset[int]]:
        if cond is not None and not _guarded(expr.offset):
            return self.value(expr)
        where, dims = self.offset(expr.offset, cond)
        held = None
        if cond is not None:
            held, cond_dims = self.value(cond)
            held = held if atomic(held) else f"({held})"
            where = self.spread(where, dims, dims | cond_dims)
            dims = dims | cond_dims
        mask = self.mask(dims)
        masks = [m for m in (mask, held) if m]
        text = f"tl.load({self.pointer(expr.value)} + {where}"
        text += f", mask={' & '.join(masks)})" if masks else ")"
        stored = self.dtypes[expr.value]
        if register(stored) != stored:
            text += ".to(tl.float32)"
        return text, dims

    def mask(self, dims: frozenset[int]) -> str | None:
        if dims == frozenset((0, 1)):
            return "mask"
        if dims == frozenset((1,)):
            if self.group.rows == 1 and not self.epilogue:
                return "mask"
            return f"({'n' if self.epilogue else 'col'} < {self.group.cols})"
        return None

    # Indices.

    def offset(self, offset: Affine, cond: Expr | None) -> tuple[str, frozenset[int]]:
        dims: frozenset[int] = frozenset()
        parts = []
        offset = flat(offset)
        for atom, coefficient in offset.terms:
            text, own = self.atom(atom, cond)
            dims |= own
            parts.append(text if coefficient == 1 else f"-{text}" if coefficient == -1 else f"{text} * {coefficient}")
        if offset.const or not parts:
            parts.append(str(offset.const))
        text = " + ".join(parts).replace("+ -", "- ")
        return text, dims

    def spread(self, where: str, dims: frozenset[int], full: frozenset[int]) -> str:
        """An offset that varies (by nothing) along every dimension of `full`."""
        names = ("m", "n") if self.epilogue else ("row", "col")
        return " + ".join([where, *(f"{names[d]} * 0" for d in sorted(full - dims))])

    def atom(self, atom: Atom, cond: Expr | None) -> tuple[str, frozenset[int]]:
        if isinstance(atom, Var):
            names = ("m", "n") if self.epilogue else ("row", "col")
            return names[atom.dim], frozenset((atom.dim,))
        if isinstance(atom, (Div, Mod)):
            base, dims = self.offset(atom.base, cond)
            base = base if atomic(base) else f"({base})"
            return f"({base} {'//' if isinstance(atom, Div) else '%'} {atom.divisor})", dims
        assert isinstance(atom, Indirect)
        text, dims = self.value(atom.value, cond)
        return f"{text}.to(tl.int64)" if atomic(text) else f"({text}).to(tl.int64)", dims


def stored(store: Store) -> tuple[Expr | None, Expr]:
    """Where a store writes (None: everywhere), and what, before the store itself rounds it."""
    held, expr = (store.expr.cond, store.expr.body) if isinstance(store.expr, Masked) else (None, store.expr)
    if isinstance(expr, Apply) and expr.fn in ("keep", "cast") and expr.args[0].dtype == torch.float32:
        expr = expr.args[0]
    return held, expr


def flat(offset: Affine) -> Affine:
    """What is written for an offset: terms that are known to be bounded, term by term."""
    written = Affine.of(offset.const)
    for atom, coefficient in offset.terms:
        written += (flat(atom.base) if isinstance(atom, Bounded) else Affine.of(atom)) * coefficient
    # A quotient and its remainder may have become what both are of.
    return flat(written) if any(isinstance(atom, Bounded) for atom, _ in written.terms) else written


def kept(expr: Expr) -> Expr:
    """What is written for an expression: a value that stays as it is in registers is the value itself."""
    while isinstance(expr, Apply) and expr.fn == "keep":
        expr = expr.args[0]
    return expr


def _length(text: str) -> int:
    """Of an expression in which each name counts one and casts nothing: kernels that do the same under other names are
    written the same, and then are one."""
    return len(re.sub(r"(?<![\w.])[a-zA-Z_]\w*(?![\w.(])", "v", re.sub(r"\.to\(tl\.\w+\)", "", text)))


def neutral_text(kind: str, dtype: torch.dtype) -> str:
    """What a lane without a column contributes to a reduction, as source."""
    neutral = NEUTRAL[kind]
    if neutral not in ("low", "high"):
        return neutral
    if dtype.is_floating_point:
        return 'float("-inf")' if neutral == "low" else 'float("inf")'
    info = torch.iinfo(dtype)
    return str(info.min if neutral == "low" else info.max)


def _short(expr: Expr) -> bool:
    """Whether this is an index or a whole number that 32 bits hold."""
    if isinstance(expr, Index):
        return max(abs(x) for x in flat(expr.offset).range) < 2**31
    return isinstance(expr, Const) and not expr.dtype.is_floating_point and abs(expr.value) < 2**31


@lru_cache(maxsize=1 << 14)
def _guarded(offset: Affine) -> bool:
    """Whether an offset is only in range under its condition; elsewhere the load needs none and keeps its shape."""
    for atom in offset.atoms():
        if isinstance(atom, Bounded):
            return True
        if isinstance(atom, Indirect) and any(
            _guarded(n.offset) for n in walk(atom.value) if isinstance(n, (Load, Index))
        ):
            return True
    return False


def _reads(expr: Expr) -> bool:
    """Whether the text of an expression depends on the condition it stands under."""
    return any(_conditional(n) for n in walk(expr))


def _conditional(node: Expr) -> bool:
    """Whether this very node is written otherwise under another condition."""
    return isinstance(node, Masked) or (isinstance(node, Load) and _guarded(node.offset))
