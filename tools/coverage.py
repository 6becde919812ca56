"""Which ops of a plan were lowered and which run as themselves, and why."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from terrazzo.lowering.ir import op_name
from terrazzo.lowering.values import Extern, Values


def ops(values: Values) -> Iterator[tuple[str, str]]:
    """Every op of a plan by name, with the reason why it runs as itself; '' where it was lowered."""
    for node in values.ops:
        if node.op is operator.getitem:
            continue
        made = values.definitions.get(node.name)
        yield op_name(node.op), (made.why or "itself") if isinstance(made, Extern) else ""


@dataclass
class Coverage:
    """Counts over plans: lowered by op; passed through by op and reason."""

    lowered: Counter[str] = field(default_factory=Counter)
    passed: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, values: Values) -> None:
        """Counts one plan."""
        for name, why in ops(values):
            if why:
                self.passed.setdefault(name, Counter())[why] += 1
            else:
                self.lowered[name] += 1

    def update(self, others: Iterable[Coverage]) -> Coverage:
        """Adds other counts to these."""
        for other in others:
            self.lowered.update(other.lowered)
            for name, reasons in other.passed.items():
                self.passed.setdefault(name, Counter()).update(reasons)
        return self

    @property
    def share(self) -> float:
        """Lowered ops among all."""
        all_passed = sum(sum(reasons.values()) for reasons in self.passed.values())
        return sum(self.lowered.values()) / max(sum(self.lowered.values()) + all_passed, 1)
