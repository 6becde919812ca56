"""Stage 9: the order of launches, and the life of every buffer.

Enters: `Selected`. Leaves: `Schedule`: steps in order; for each the buffers it makes and those nobody needs afterwards.
A buffer is made right before the launch that writes it and dropped right after the last that reads it, so that the
caching allocator hands the same memory to a later one; inside a captured graph that happens at capture time. Buffers
that the piece returns, and memory that is returned under another geometry, live on. It refuses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .ir import Output
from .select import Kernel, Selected, reads_and_writes
from .values import Extern, Values


@dataclass(frozen=True)
class Step:
    """One launch, the buffers made before it and the names dropped after it."""

    kernel: Kernel
    makes: tuple[str, ...]
    drops: tuple[str, ...]


@dataclass(frozen=True)
class Schedule:
    """A plan in all but text."""

    selected: Selected
    steps: tuple[Step, ...]

    @property
    def values(self) -> Values:
        return self.selected.values

    @property
    def outputs(self) -> tuple[Output, ...]:
        return self.values.outputs

    @cached_property
    def leading(self) -> frozenset[str]:
        """Kernels before which nothing of this plan runs, or an op that runs as itself: these wait for whatever did
        before they let another start (kernels/launch.py). None where all that kernels of the plan ask for before they
        wait was there before any plan ran."""
        products = [k.problem for k in self.launches() if k.family and k.group.contract is not None]
        if products and all(p.w_steady or not p.w_given for p in products):
            return frozenset()
        found, fresh = set(), True
        for kernel in self.launches():
            if kernel.family and fresh:
                found.add(kernel.name)
            fresh = not kernel.family
        return frozenset(found)

    def launches(self) -> list[Kernel]:
        """Steps that launch something: our kernels and ops that run as themselves."""
        return [s.kernel for s in self.steps if s.kernel.family or s.kernel.group.kind == "extern"]

    def __str__(self) -> str:
        lines = []
        for step in self.steps:
            lines.append(
                f"{step.kernel.family or step.kernel.group.kind} {step.kernel.name}: "
                f"makes {', '.join(step.makes) or '-'}"
            )
            if step.drops:
                lines[-1] += f", drops {', '.join(step.drops)}"
        return "\n".join(lines)


def schedule(selected: Selected) -> Schedule:
    """Buffers' lives for a list of kernels."""
    values = selected.values
    kept = {values.base(o.ref) for o in values.outputs if o.kind == "value"} | {
        values.base(v) for _, v in values.mutations
    }
    kept |= {i.name for i in values.inputs}
    # Ops that return nothing leave no name to drop.
    kept |= {n for n, made in values.definitions.items() if isinstance(made, Extern) and not any(made.layouts)}
    last: dict[str, int] = {}
    effects = []
    for number, kernel in enumerate(selected.kernels):
        reads: set[str] = set()
        writes: set[str] = set()
        for group in kernel.segments:
            r, w = reads_and_writes(group, values)
            reads |= r
            writes |= w
        effects.append((reads, writes))
        last.update(dict.fromkeys(reads | writes, number))
    steps = []
    for number, (kernel, (_, writes)) in enumerate(zip(selected.kernels, effects, strict=True)):
        makes = tuple(sorted(writes)) if kernel.group.kind not in ("extern", "item") else ()
        drops = tuple(sorted(n for n, at in last.items() if at == number and n not in kept))
        steps.append(Step(kernel, makes, drops))
    return Schedule(selected, tuple(steps))
