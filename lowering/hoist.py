"""Stage 5: a norm before a product leaves the product's operand and scales its result.

Enters: `Values`. Leaves: `Values` in which, for a product whose operand is scaled row by row,

    y = (r[row] · x · g[column]) @ W        with r = 1 / sqrt(a sum over the row of x, times a constant, + ε)

has become

    x' = x · g    parts = that sum over every few columns     what computes x leaves both, tile by tile
    y = r[row] · (x' @ W)                                     what computes y sums the parts

so that no kernel has to see whole rows, and none stands between the product that x comes out of and this one. x' has as
many roundings as the scaled operand had, and the sum is one in another order. It stands before `depend`, as it changes
what depends on what. Only where x comes out of a product, whose epilogue fusion will give all this to; where fusion
does not (`Fused.stranded`), planning goes without. Only for few tokens, of which a border between two kernels is a
large part. Only in bfloat16 and with an ε: in fp16 an x' that is not yet scaled could overflow, and a scale that may be
infinite is no longer where it was. In bfloat16 that takes rows of 1e35: eager scales those, whose squares overflow, by
0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..kernels.gemm import MANY_PARTS_TOKENS, PART_WIDTHS, part_width
from .affine import contiguous_strides, delinearize, substitution, variables
from .define import at_flat
from .depend import direct_reads
from .expr import Apply, Const, Expr, Load, apply, cast, keep, load, loads, rewrite, varies
from .size import Size, alike
from .values import Contract, Definition, Extern, Item, Layout, Map, Parts, Reduce, SumOfParts, Values, View

# Up to so many tokens it pays, and to more where a row has few parts: every tile of the second product holds the parts
# of its rows in registers, and the first stores x' beside x. Middle pieces of Llama-3.1-8B, Llama-3.2-1B (64 narrow
# parts a row) and Qwen3-8B took (H100, torch 2.11, triton 3.6, bf16, 2026-11-25, one run) 0.98, 0.95 and 0.98 of the
# time with norms at 1 and 16 tokens, 0.98, 0.96 and 0.98 at 32, 0.99, 0.97 and 0.99 at 64; at 128 with narrow parts
# 1.05, 0.97 and 1.05, with few (2026-11-26, with configs measured so) 0.98, 0.98 and 0.98. Mistral-Nemo-12B and
# Qwen3-14B, whose 5120 columns are 40 parts of 128, took 0.97 and 0.99 at 128 (H200, 2026-11-26, both tuned). Other
# rows of more than 4096, and these on another card, were not tried. Beyond 128 it pays where all products that the norm
# lies between were measured so (`Contract.few`): pieces of Llama-3.1-8B and 3.2-1B took 0.96 and 0.92 at 130 tokens,
# 0.96 and 0.93 at 144, 0.99 and 0.96 at 160, 1B's 0.90 at 192 (H200, 2026-11-27), six shapes by a rule 1.00 to 1.22.
MOST_TOKENS, MOST_COLUMNS = MANY_PARTS_TOKENS, 5120


@dataclass(frozen=True)
class Scaled:
    """An operand that is `scale`, the same along each row, times `rest`; both over the operand's own dimensions."""

    operand: Map
    scale: Expr
    rest: Expr
    sum: Reduce
    products: tuple[Contract, ...]

    @property
    def unscaled(self) -> Map:
        """The operand without its scale."""
        rest = keep(self.rest, self.operand.layout.dtype)
        return replace(self.operand, name=f"{self.operand.name}_unscaled", expr=rest)


def hoist(values: Values, vain: frozenset[str] = frozenset()) -> Values:
    """The values with what scales the rows of operands hoisted out of their products.

    Args:
        vain: products that keep their operands as they are, because it gains nothing.
    """
    found = _candidates(values, vain)
    while found:
        hoisted = _hoisted(found, values)
        alive = _alive(hoisted)
        needed = {scaled.sum.name for scaled in found} & alive
        if not needed:
            return _without(hoisted, _alive(values) - alive)
        # A sum that something else reads is computed anyway, of whole rows.
        found = [scaled for scaled in found if scaled.sum.name not in needed]
    return values


def _candidates(values: Values, vain: frozenset[str]) -> list[Scaled]:
    """What could be hoisted out of all operands."""
    readers: dict[str, list[Definition]] = {}
    for made in values.definitions.values():
        for name in direct_reads(made, values):
            readers.setdefault(name, []).append(made)
    found: list[Scaled] = []
    for name, products in readers.items():
        if name not in values.kept and vain.isdisjoint(made.name for made in products):
            scaled = _scaled(name, products, values)
            found += [scaled] if scaled is not None else []
    return found


def _scaled(name: str, products: Sequence[Definition], values: Values) -> Scaled | None:
    """What can be hoisted out of this value, and past which products."""
    made = values.definitions.get(name)
    if not isinstance(made, Map) or made.layout.dtype != torch.bfloat16 or not made.layout.shape:
        return None
    shape = made.layout.shape
    rows, cols = math.prod(shape[:-1]), shape[-1]
    if isinstance(cols, Size) or cols % PART_WIDTHS[0] or not all(_takes(p, name, rows, cols) for p in products):
        return None
    if not all(map(alike, made.layout.stride, contiguous_strides(shape))):
        return None
    scale, rest = _split(made.expr, len(shape) - 1, values)
    if scale is None or rest is None or not _finite(scale):
        return None
    summed = {node.value for node in loads(scale)}
    total = values.definitions.get(summed.pop()) if len(summed) == 1 else None
    if not isinstance(total, Reduce) or not _sums_rows(total, rows, cols):
        return None
    sources = [_products(expr, rows, cols, values) for expr in (total.expr, rest)]
    if not all(sources):
        return None
    few = min(p.few for p in (*products, *sources[0], *sources[1]) if isinstance(p, Contract))
    if rows > MOST_TOKENS and (rows > few or cols > MOST_COLUMNS or cols % part_width(rows, cols)):
        return None
    return Scaled(made, scale, rest, total, tuple(products))  # type: ignore[arg-type]


def _takes(made: Definition, operand: str, rows: int, cols: int) -> bool:
    """Whether this is a product of the operand, rows by rows, with something else."""
    if not isinstance(made, Contract) or made.b.base == operand:
        return False
    x, y = made.a.layout, made.layout
    pairs = zip((*x.shape, *x.stride, *y.shape), (rows, cols, cols, 1, made.m, made.n), strict=True)
    return all(alike(a, b) for a, b in pairs) and made.a.offset == 0 and y.stride == (made.n, 1)


def _finite(scale: Expr) -> bool:
    """Whether this is 1 / sqrt(… + ε), times numbers: neither infinite nor, but for rows that overflow, 0."""
    while isinstance(scale, Apply) and (scale.fn in ("cast", "keep") or (scale.fn == "mul" and _numbers(scale))):
        scale = next(arg for arg in scale.args if not isinstance(arg, Const))
    if not isinstance(scale, Apply) or scale.fn != "rsqrt":
        return False
    inner = scale.args[0]
    while isinstance(inner, Apply) and inner.fn in ("cast", "keep"):
        inner = inner.args[0]
    added = inner.args if isinstance(inner, Apply) and inner.fn == "add" else ()
    return any(isinstance(arg, Const) and 0 < arg.value < math.inf for arg in added)


def _numbers(product: Apply) -> bool:
    """Whether one factor is a number."""
    return sum(isinstance(arg, Const) for arg in product.args) == 1


def _sums_rows(made: Reduce, rows: int, cols: int) -> bool:
    """Whether this is a sum over rows of these sizes."""
    plain = made.kind == "sum" and made.layout.dtype == torch.float32
    return plain and made.reduced == (len(made.domain) - 1,) and alike(made.rows, rows) and alike(made.cols, cols)


def _products(expr: Expr, rows: int, cols: int, values: Values) -> list[Contract]:
    """The products with these rows and columns from which an expression is computed, element by element."""
    found: list[Contract] = []
    seen: set[str] = set()
    stack = [node.value for node in loads(expr)]
    while stack:
        name = stack.pop()
        made = values.definitions.get(name)
        if isinstance(made, Reduce):
            return []
        if isinstance(made, Contract):
            found += [made] if alike(made.m, rows) and alike(made.n, cols) else []
        elif isinstance(made, Map) and name not in seen:
            seen.add(name)
            stack += [node.value for node in loads(made.expr)]
    return found


def _split(expr: Expr, column: int, values: Values) -> tuple[Expr | None, Expr | None]:
    """An expression as a factor that is the same for all columns, and the rest; None stands for 1."""
    if not expr.dtype.is_floating_point:
        return None, expr
    if not varies(expr, column):
        return _opened(expr, values), None
    if isinstance(expr, Load):
        inner = _definition(expr, values)
        scale, rest = (None, None) if inner is None else _split(inner, column, values)
        return (None, expr) if scale is None else (scale, rest)
    if isinstance(expr, Apply) and expr.fn in ("cast", "keep"):
        scale, rest = _split(expr.args[0], column, values)
        if scale is None or rest is None:
            return None, expr
        return scale, keep(rest, expr.dtype) if expr.fn == "keep" else cast(rest, expr.dtype)
    if isinstance(expr, Apply) and expr.fn == "mul":
        parts = [_split(arg, column, values) for arg in expr.args]
        scales, rests = ([p[i] for p in parts if p[i] is not None] for i in (0, 1))
        return _times(scales), _times(rests)  # type: ignore[arg-type]
    return None, expr


def _times(factors: list[Expr]) -> Expr | None:
    if not factors:
        return None
    first, *others = (cast(factor, torch.float32) for factor in factors)
    return first if not others else apply("mul", first, *others, dtype=torch.float32)


def _definition(read: Load, values: Values) -> Expr | None:
    """What a read of an elementwise value is computed as; None for another value."""
    made = values.definitions.get(read.value)
    if not isinstance(made, Map) or not made.layout.numel:
        return None
    place = delinearize(read.offset, made.layout.shape, made.layout.stride)
    return rewrite(made.expr, substitution(dict(enumerate(place))))


def _opened(expr: Expr, values: Values) -> Expr:
    """The expression with every elementwise value in it written out."""

    def leaf(node: Expr) -> Expr | None:
        inner = _definition(node, values) if isinstance(node, Load) else None
        return None if inner is None else _opened(inner, values)

    return rewrite(expr, new_leaf=leaf)


def _hoisted(found: Sequence[Scaled], values: Values) -> Values:
    """The values with these scales past their products, what they were computed by still among them."""
    operands = {scaled.operand.name: scaled for scaled in found}
    parts = {scaled.sum.name: _parts(scaled.sum) for scaled in found}
    products = {product.name: scaled for scaled in found for product in scaled.products}
    made: dict[str, Definition] = {}
    hoisted: dict[str, str] = {}
    for name, definition in values.definitions.items():
        new: tuple[Definition, ...] = (definition,)
        if name in operands:
            new = (operands[name].unscaled,)
        elif name in parts:
            new = parts[name], definition
        elif name in products and isinstance(definition, Contract):
            scaled = products[name]
            new = _product(definition, scaled, parts[scaled.sum.name])
            hoisted[new[1].name] = name
        made.update((d.name, d) for d in new)
    layouts = {**values.layouts, **{n: d.layout for n, d in made.items() if not isinstance(d, Extern)}}
    return replace(values, definitions=made, layouts=layouts, hoisted=hoisted)


def _without(values: Values, gone: set[str]) -> Values:
    """The values without those that nothing needs any more."""
    views = {name: view for name, view in values.views.items() if view.base not in gone}
    return replace(values, definitions={n: d for n, d in values.definitions.items() if n not in gone}, views=views)


def _parts(total: Reduce) -> Parts:
    """The sums over a part's columns of what is summed."""
    width = part_width(total.rows, total.cols)
    domain = (total.rows, total.cols // width, width)
    row, part, col = variables(domain)
    place = at_flat(row * total.cols + part * width + col, total.domain)
    expr = rewrite(total.expr, substitution(dict(enumerate(place))))
    layout = Layout.contiguous(domain[:2], torch.float32, total.layout.device)
    return Parts(f"{total.name}_parts", layout, domain, (2,), "sum", expr, total.source)


def _product(product: Contract, scaled: Scaled, parts: Parts) -> tuple[SumOfParts, Contract, Map]:
    """The sum of the parts, the product of the operand without its scale, and its result, scaled."""
    row, at = variables(parts.layout.shape)
    read = load(parts.name, row * parts.layout.shape[1] + at, torch.float32)
    layout = Layout.contiguous((product.m,), torch.float32, parts.layout.device)
    name = f"{scaled.sum.name}_{product.name}"
    arrived = SumOfParts(name, layout, parts.layout.shape, (1,), "sum", read, parts.source)
    view = View(scaled.unscaled.name, product.a.layout, 0)
    inner = replace(product, name=f"{product.name}_unscaled", a=view, rounded=False)
    row, col = variables((product.m, product.n))
    place = at_flat(row * product.k, scaled.operand.layout.shape)

    def leaf(node: Expr) -> Expr | None:
        # Each row's own sum: a Reduce's result lies in the order of the rows.
        return load(name, node.offset, torch.float32) if isinstance(node, Load) else None

    scale = rewrite(scaled.scale, substitution(dict(enumerate(place))), leaf)
    value = cast(load(inner.name, row * product.n + col, inner.layout.dtype), torch.float32)
    result = apply("mul", value, cast(scale, torch.float32), dtype=torch.float32)
    return arrived, inner, Map(product.name, product.layout, keep(result, product.layout.dtype), product.source)


def _alive(values: Values) -> set[str]:
    """Values that something the caller sees depends on."""
    alive: set[str] = set()
    stack = [*values.kept, *(n for n, d in values.definitions.items() if isinstance(d, (Extern, Item)))]
    while stack:
        name = stack.pop()
        if name in values.definitions and name not in alive:
            alive.add(name)
            stack += direct_reads(values.definitions[name], values)
    return alive
