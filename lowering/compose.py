"""What may share a kernel: values composed over a two-dimensional domain of rows and columns.

`compose` is the whole legality of fusion. Given the values that shall share a kernel and those of them that others
need, it finds a domain (a GEMM's tile space, a reduction's rows, or the elements of what is stored), writes every
stored value as one expression over it, and refuses, with the reason, when there is none. Reading another value inside
the kernel is always correct algebra, at any index: its expression is inlined with the index substituted. Only two
things cannot be inlined and must match the domain: the result of a reduction (it belongs to this row) and a GEMM's
accumulator (it belongs to this tile).

A GEMM's tile may hold two columns of the product for each of its own: a fixed distance apart (gate and up of a GLU), or
the halves of a head (a rotation), whose sum it then knows as well (a norm of each head before it is rotated). And a
row's sum may be cut in two (hoist.py): every tile leaves a part of it, another kernel's tiles sum those. The
expressions are written in `composer.py` and, for heads, in `heads.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from .composer import Composer, Refused
from .elements import Elements
from .expr import loads
from .group import FEW_TOKENS_OF_NORMS, MANY_TOKENS, Group
from .heads import Heads
from .size import alike
from .values import Contract, Extern, Item, Map, Parts, Reduce, SumOfParts, Values


def compose(
    members: Collection[str],
    needed: Collection[str],
    values: Values,
    inlined: Collection[str],
    cols: int = 0,
    elements: Elements | None = None,
    returned: Collection[str] = (),
) -> Group:
    """One kernel for these values.

    Args:
        members: names of the values to compute here.
        needed: those of them that must be in memory afterwards.
        values: all definitions.
        inlined: values that every reader computes for itself.
        cols: for a pointwise group, how its elements are cut into columns; 0 for one long row.
        returned: those of `needed` that only the caller of the piece reads.
        elements: kept for further compositions of the piece; the group's `names` are then not complete.

    Raises:
        Refused: they do not fit one kernel.
    """
    order = [n for n in values.definitions if n in members]
    made = [values.definitions[n] for n in order]
    if len(made) == 1 and not isinstance(made[0], (Map, Reduce, Contract)):
        return _alone(order, made[0])
    if any(isinstance(v, (Extern, Item)) for v in made):
        raise Refused("an op that runs as itself shares no kernel")
    kept = tuple(n for n in order if n in needed)
    given = order, kept, values, frozenset(inlined), elements, frozenset(returned)
    products = [v for v in made if isinstance(v, Contract)]
    reductions = [v for v in made if isinstance(v, Reduce)]
    if len(products) > 1:
        raise Refused("two matrix products need two kernels")
    if products:
        sums = [r for r in reductions if not isinstance(r, Parts) and not _arrived(r, order)]
        return _product(given, products[0], sums)
    return Composer(*given).row(reductions) if reductions else Composer(*given).pointwise(cols)


def _alone(order: list[str], made: object) -> Group:
    if isinstance(made, Extern):
        return Group("extern", tuple(order), 0, 0, foreign=made)
    return Group("item" if isinstance(made, Item) else "empty", tuple(order), 0, 0)


def _arrived(made: Reduce, members: Collection[str]) -> bool:
    """Whether this is a sum of parts that an earlier kernel left in memory."""
    return isinstance(made, SumOfParts) and not any(node.value in members for node in loads(made.expr))


# Halves of heads that a tile may bring together.
HALVES = (128, 64, 32, 16)


def _product(given: tuple[Any, ...], product: Contract, sums: Sequence[Reduce]) -> Group:
    """A product and what follows it: column by column, pairs of columns a fixed distance apart, or halves of heads,
    which a tile may also sum."""
    composer = Composer(*given)
    try:
        if sums:
            raise Refused("a reduction needs the whole row, a GEMM tile holds only some of its columns")
        return composer.gemm(product)
    except Refused as reason:
        results = [composer.layout(n).shape for n in composer.needed if n != product.name]
        widths = {shape[-1] for shape in results if shape}
        if sums:
            # Where there is one sum a row, that is over all of it.
            several = any(not alike(made.rows, product.m) for made in sums)
            widths &= {made.cols for made in sums} if several else set()
        halves = [half for half in HALVES if product.n % (2 * half) == 0 and 2 * half in widths]
        few = FEW_TOKENS_OF_NORMS if sums else product.few
        # In this order: a plan for a range of sizes is cut where it asks for the number of tokens.
        if len(composer.order) > 1 and halves and (product.m <= few or product.m >= MANY_TOKENS):
            for half in halves:
                try:
                    return Heads(*given).halves(product, half, sums)
                except Refused:
                    continue
        raise reason from None
