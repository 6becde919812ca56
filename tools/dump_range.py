"""A piece over a range of sizes: its regimes, what each launch looks up by size, and how many kernels that is.

Enters: a piece, a range, a target (no device needed). Leaves: `RangeDump`. With `compiled`, every binary that any size
of the range launches is compiled for the target's architecture, each once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from terrazzo.lowering.intake import Examples
from terrazzo.lowering.options import Options
from terrazzo.lowering.ranged import Regime
from terrazzo.lowering.select import Kernel
from terrazzo.runtime.lowered import planned_range
from terrazzo.runtime.warm import telling
from terrazzo.tools.dump_compile import Stats, compile_launch, launches
from terrazzo.tools.dump_plan import label
from terrazzo.tools.models import Piece


@dataclass(frozen=True)
class Row:
    """One launch of one regime, for the sizes that share a config."""

    regime: str
    sizes: str
    kernel: str
    family: str
    config: str
    pdl: bool


@dataclass(frozen=True)
class RangeDump:
    """A piece over a range.

    Args:
        label: the piece. lo, hi: the range. seconds: what planning all of it took.
        regimes: each with the reason why it has no plan, '' where it has one.
        rows: launches in order, with their configs by size.
        compiled: one entry per binary; compile_seconds: what they took, one after the other.
    """

    label: str
    lo: int
    hi: int
    seconds: float
    regimes: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    compiled: tuple[Stats, ...] = ()
    compile_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(piece: Piece, lo: int, hi: int, options: Options, compiled: bool) -> RangeDump:
    """Plans the range, and compiles it on demand."""
    start = time.perf_counter()
    found = planned_range(piece.graph, Examples.of(piece.graph, None), lo, hi, options)
    seconds = time.perf_counter() - start
    rows = tuple(row for regime in found if regime.plan for row in _rows(regime))
    start = time.perf_counter()
    stats = _compiled(found, options) if compiled else ()
    spent = time.perf_counter() - start
    return RangeDump(label(piece), lo, hi, seconds, tuple((str(r), r.why) for r in found), rows, stats, spent)


def screen(dump: RangeDump) -> Group:
    """The dump for a reader."""
    table = Table("sizes", "kernel", "configs by size")
    done = ""
    for row in dump.rows:
        config = f"{row.family or 'itself'} {row.config}{' (pdl)' if row.pdl else ''}"
        first = f"{row.regime} {row.kernel}" != done
        table.add_row(row.regime if not done.startswith(f"{row.regime} ") else "", row.kernel if first else "",
                      f"{row.sizes}: {config}" if row.family else config)  # fmt: skip
        done = f"{row.regime} {row.kernel}"
    binaries = len({(r.kernel, r.family, r.config, r.pdl) for r in dump.rows if r.family})
    counts = f"{len(dump.regimes)} regimes, {binaries} kernels with configs"
    lines = [f"{dump.label}, sizes {dump.lo} to {dump.hi}: {counts}, planned in {dump.seconds:.1f} s"]
    lines += [f"{name}: planned one by one, as {why}" for name, why in dump.regimes if why]
    if dump.compiled:
        wrong = [f"{s.kernel}: {s.wrong}" for s in dump.compiled if s.wrong]
        took = f"{dump.compile_seconds:.1f} s"
        lines += [f"{len(dump.compiled)} binaries, compiled one after the other in {took}", *wrong]
    return Group(*map(Text, lines), table)


def _rows(regime: Regime) -> list[Row]:
    assert regime.plan is not None
    found = []
    for kernel in regime.plan.schedule.launches():
        first = regime.lo
        for bound, family, config, pdl in _choices(regime, kernel):
            sizes = f"{first}-{bound}" if bound > first else f"{bound}"
            found.append(Row(str(regime), sizes, kernel.name, family, config, pdl))
            first = bound + 1
    return found


def _choices(regime: Regime, kernel: Kernel) -> list[tuple[int, str, str, bool]]:
    if not kernel.family:
        foreign = kernel.group.foreign
        return [(regime.hi, "", foreign.node.target if foreign is not None else "", False)]
    if not kernel.by_size:
        return [(regime.hi, kernel.family, str(kernel.config), kernel.pdl)]
    return [(bound, c.family, str(c.config), c.pdl) for bound, c in kernel.by_size]


def _compiled(found: Sequence[Regime], options: Options) -> tuple[Stats, ...]:
    """One entry for each binary of the range."""
    reports: dict[Any, Any] = {}
    stats: dict[Any, Stats] = {}
    for regime, plan in [(r, r.plan) for r in found if r.plan is not None]:
        for size in telling(plan.facts, regime.lo, regime.hi):
            for launch in launches(plan, options.target, size):
                before = len(reports)
                made = compile_launch(launch, options.target.arch, known=reports)
                if len(reports) > before:
                    stats[len(stats)] = made
                elif not made.registers:
                    # It did not compile, so nothing is known of it.
                    stats[made.kernel, made.wrong] = made
    return tuple(stats.values())
