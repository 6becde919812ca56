"""Stage 5: a norm before a product leaves the product's operand and scales its result.

Enters: `Values`. Leaves: `Values` in which, for a product whose operand is scaled row by row,

    y = (r[row] · x · g[column]) @ W        with r a function of a sum over the row, r = 1 / sqrt(Σ x² / K + ε)

has become

    x' = x · g    parts = Σ x² over every PART columns        what computes x can leave both, tile by tile
    y = r[row] · (x' @ W)                                     what computes y can sum the parts

so that nothing stands between the product that x comes out of and this one: no kernel has to see whole rows. x' has as
many roundings as the scaled operand had, and sums of squares are sums in another order. It stands before `depend`, as
it changes what depends on what. Only where x comes out of a product, whose epilogue fusion will give all this to; only
in bfloat16, which has the range of fp32: in fp16 an x' that is not yet scaled could overflow; and only for few tokens,
of which a border between two kernels is a large part.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from .affine import Affine, Indirect, Var, contiguous_strides, delinearize, substitution, variables
from .define import at_flat
from .depend import direct_reads
from .expr import Apply, Expr, Index, Load, apply, cast, keep, load, loads, rewrite, walk
from .group import PART
from .values import Contract, Definition, Extern, Item, Layout, Map, Reduce, Values, View

# Up to so many tokens it pays: every tile of the second product sums a row's parts anew, and the first stores x' beside
# x. Middle pieces of Llama-3.1-8B, Llama-3.2-1B and Qwen3-8B took (H100, torch 2.11, triton 3.6, bf16, 2026-11-25,
# tiles tuned for it) 0.95 to 0.99 of the time with norms at 8 and 16 tokens, 0.95 to 0.98 at 32, 0.99 to 1.01 at 64,
# 0.99 to 1.06 at 128, 1.17 at 2048.
MOST_TOKENS = 32
# A scale that takes more operations than this is not repeated in an epilogue.
SCALE_LIMIT = 40


@dataclass(frozen=True)
class Scaled:
    """An operand that is `scale`, the same along each row, times `rest`; both over the operand's own dimensions."""

    operand: Map
    scale: Expr
    rest: Expr
    sums: tuple[Reduce, ...]
    products: tuple[Contract, ...]


def hoist(values: Values, barred: Collection[str] = ()) -> Values:
    """The values with what scales the rows of operands hoisted out of their products.

    Args:
        barred: products that must stay as they are, whose operands and results no kernel of ours would take part in.
    """
    for name in list(values.definitions):
        scaled = _scaled(name, values, barred)
        if scaled is not None:
            values = _hoisted(scaled, values)
    return values


def _scaled(name: str, values: Values, barred: Collection[str]) -> Scaled | None:
    """What can be hoisted out of this value, and past which products."""
    made = values.definitions.get(name)
    if not isinstance(made, Map) or made.layout.dtype != torch.bfloat16 or name in _kept(values):
        return None
    shape = made.layout.shape
    if not shape or made.layout.stride != contiguous_strides(shape) or shape[-1] % PART:
        return None
    products = [d for d in values.definitions.values() if name in direct_reads(d, values)]
    rows, cols = math.prod(shape[:-1]), shape[-1]
    if not products or not all(_takes(d, name, rows, cols) and d.name not in barred for d in products):
        return None
    if rows > MOST_TOKENS:
        return None
    scale, rest = _split(made.expr, len(shape) - 1, values)
    if scale is None or rest is None or sum(1 for _ in walk(scale)) > SCALE_LIMIT:
        return None
    read = list(dict.fromkeys(node.value for node in loads(scale)))
    sums = [values.definitions[n] for n in read if n in values.definitions]
    if len(sums) != 1 or not _summed(sums[0], rows, cols, values, barred):
        return None
    return Scaled(made, scale, rest, tuple(sums), tuple(products))  # type: ignore[arg-type]


def _kept(values: Values) -> set[str]:
    """Values whose memory the caller sees."""
    return {values.base(o.ref) for o in values.outputs if o.kind == "value"} | {
        values.base(made) for _, made in values.mutations
    }


def _takes(made: Definition, operand: str, rows: int, cols: int) -> bool:
    """Whether this is a product of the operand, rows by rows, with something else."""
    if not isinstance(made, Contract) or made.b.base == operand:
        return False
    whole = made.a.layout.shape == (rows, cols) and made.a.layout.stride == (cols, 1) and made.a.offset == 0
    return whole and made.layout.shape == (made.m, made.n) and made.layout.stride == (made.n, 1)


def _summed(made: Definition, rows: int, cols: int, values: Values, barred: Collection[str]) -> bool:
    """Whether this is a sum over the rows of what comes out of a product."""
    if not isinstance(made, Reduce) or made.kind != "sum" or made.layout.dtype != torch.float32:
        return False
    if made.reduced != (len(made.domain) - 1,) or (made.rows, made.cols) != (rows, cols):
        return False
    seen: set[str] = set()
    stack = [node.value for node in loads(made.expr)]
    while stack:
        name = stack.pop()
        source = values.definitions.get(name)
        if isinstance(source, Contract):
            return (source.m, source.n) == (rows, cols) and name not in barred
        if isinstance(source, Map) and name not in seen:
            seen.add(name)
            stack += [node.value for node in loads(source.expr)]
    return False


def _split(expr: Expr, column: int, values: Values) -> tuple[Expr | None, Expr | None]:
    """An expression as a factor that is the same for all columns, and the rest; None stands for 1."""
    if not expr.dtype.is_floating_point:
        return None, expr
    if not _varies(expr, column):
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


def _varies(expr: Expr, column: int) -> bool:
    """Whether an expression differs between the columns of a row."""

    def along(offset: Affine) -> bool:
        return any(
            _varies(a.value, column) if isinstance(a, Indirect) else isinstance(a, Var) and a.dim == column
            for a in offset.atoms()
        )

    return any(along(node.offset) for node in walk(expr) if isinstance(node, (Load, Index)))


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


def _hoisted(scaled: Scaled, values: Values) -> Values:
    """The values after one operand's scale has left it; unchanged where its sums would be needed nevertheless."""
    operand = scaled.operand
    made: dict[str, Definition] = {}
    unscaled = Map(f"{operand.name}_unscaled", operand.layout, keep(scaled.rest, operand.layout.dtype), operand.source)
    parts = {r.name: _parts(r) for r in scaled.sums}
    hoisted = dict(values.hoisted)
    for name, definition in values.definitions.items():
        if name == operand.name:
            made[unscaled.name] = unscaled
        elif name in parts:
            made[parts[name].name] = parts[name]
            made[name] = definition
        elif definition in scaled.products:
            for new in _product(definition, unscaled, scaled, parts):  # type: ignore[arg-type]
                made[new.name] = new
                if isinstance(new, Contract):
                    hoisted[new.name] = name
        else:
            made[name] = definition
    layouts = {**values.layouts, **{n: d.layout for n, d in made.items() if not isinstance(d, Extern)}}
    result = replace(values, definitions=made, layouts=layouts, hoisted=hoisted)
    before, alive = _alive(values), _alive(result)
    if any(r.name in alive for r in scaled.sums):
        return values
    gone = before - alive
    views = {name: view for name, view in values.views.items() if view.base not in gone}
    return replace(result, definitions={n: d for n, d in made.items() if n not in gone}, views=views)


def _parts(reduction: Reduce) -> Reduce:
    """The sums over every `PART` columns of what is summed."""
    rows, count = reduction.rows, reduction.cols // PART
    domain = (rows, count, PART)
    row, part, col = variables(domain)
    place = at_flat(row * reduction.cols + part * PART + col, reduction.domain)
    expr = rewrite(reduction.expr, substitution(dict(enumerate(place))))
    layout = Layout.contiguous((rows, count), torch.float32, reduction.layout.device)
    return Reduce(f"{reduction.name}_parts", layout, domain, (2,), "sum", expr, reduction.source)


def _product(
    product: Contract, unscaled: Map, scaled: Scaled, parts: Mapping[str, Reduce]
) -> tuple[Reduce | Contract | Map, ...]:
    """The product of the operand without its scale, the sums of parts, and the product's result, scaled."""
    view = View(unscaled.name, product.a.layout, 0)
    inner = replace(product, name=f"{product.name}_unscaled", a=view, rounded=False)
    sums: dict[str, Reduce] = {}
    for name, part in parts.items():
        row, at = variables(part.layout.shape)
        read = load(part.name, row * part.layout.shape[1] + at, torch.float32)
        layout = Layout.contiguous((product.m,), torch.float32, part.layout.device)
        sums[name] = Reduce(f"{name}_{product.name}", layout, part.layout.shape, (1,), "sum", read, part.source)
    row, col = variables((product.m, product.n))
    place = at_flat(row * product.k, scaled.operand.layout.shape)

    def leaf(node: Expr) -> Expr | None:
        if not isinstance(node, Load) or node.value not in sums:
            return None
        # Each row's own sum: a Reduce's result lies in the order of the rows.
        return load(sums[node.value].name, node.offset, torch.float32)

    scale = rewrite(scaled.scale, substitution(dict(enumerate(place))), leaf)
    value = cast(load(inner.name, row * product.n + col, inner.layout.dtype), torch.float32)
    result = apply("mul", value, cast(scale, torch.float32), dtype=torch.float32)
    return *sums.values(), inner, Map(product.name, product.layout, keep(result, product.layout.dtype), product.source)


def _alive(values: Values) -> set[str]:
    """Values that something the caller sees depends on."""
    alive: set[str] = set()
    stack = [*_kept(values), *(n for n, d in values.definitions.items() if isinstance(d, (Extern, Item)))]
    while stack:
        name = stack.pop()
        if name in values.definitions and name not in alive:
            alive.add(name)
            stack += direct_reads(values.definitions[name], values)
    return alive
