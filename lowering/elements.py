"""What fusion remembers between compositions of one piece."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from .expr import Expr
from .values import Contract, Definition, Reduce


@dataclass
class Elements:
    """Expressions that many compositions of one piece need alike: of a value at an index, in a domain, out of the
    members that it is computed from. Those with a reduction or a product among them belong to their kernel alone.

    Args:
        bits: a bit for each value.
        above: what each value is computed from, whole way up.
        tied: reductions and products.
        known: what was composed.
        columns: of a product, which a value is computed from where heads' halves are brought together; or why none.
    """

    bits: dict[str, int] = field(default_factory=dict)
    above: dict[str, int] = field(default_factory=dict)
    tied: int = 0
    known: dict[tuple[object, ...], Expr] = field(default_factory=dict)
    columns: dict[tuple[object, ...], tuple[int, int] | str] = field(default_factory=dict)

    def add(self, made: Definition, sources: Collection[str]) -> None:
        """The next value, in an order in which its sources come before it."""
        bit = self.bits[made.name] = 1 << len(self.bits)
        self.above[made.name] = bit
        for source in sources:
            self.above[made.name] |= self.above.get(source, 0)
        if isinstance(made, (Reduce, Contract)):
            self.tied |= bit

    def mask(self, names: Collection[str]) -> int:
        """The bits of these values."""
        return sum(self.bits[name] for name in names)
