"""A dump on one screen: what was fused, what was not and why, what it costs, what it compiles to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from terrazzo.tools.dump_compile import Stats
from terrazzo.tools.dump_plan import Dump, KernelInfo

# A log or a file has no width of its own; 80 columns break every line.
LOG_COLUMNS = 168


def console() -> Console:
    """Standard output, wide when it is no terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(width=LOG_COLUMNS, highlight=False)


def screen(dump: Dump, stats: Sequence[Stats] = ()) -> Group:
    """Everything but the source.

    Args:
        dump: from `dump_plan.describe`.
        stats: what the launches compiled to; adds four columns.
    """
    parts: list[Any] = [Text(line) for line in _head(dump)]
    parts.append(_table(dump, stats))
    wrong = [s for s in stats if s.wrong]
    parts += [Text(f"{s.kernel}: {s.wrong}", style="red") for s in wrong]
    parts += _section("why this family and config", _reasons(dump.ours))
    refusals = [f"{r.producer} + {r.consumer}: {r.reason}" for r in dump.refusals]
    parts += _section("not fused", refusals)
    if dump.foreign:
        parts += _section("ops as themselves", _ops(dump))
    return Group(*parts)


def ops(dump: Dump) -> Group:
    """What runs as itself, with the reason."""
    lines = _ops(dump) or ["every op is in a kernel"]
    return Group(Text(f"{dump.label}, size {dump.size}, {dump.target.name}"), *map(Text, lines))


def _head(dump: Dump) -> list[str]:
    total = dump.totals()
    lines = [f"{dump.label}, size {dump.size}, planned for {dump.target.name} (sm_{dump.target.arch})"]
    lines.append("stages, ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms, _ in dump.stages))
    if dump.retraced:
        lines.append(f"traced for this size alone: the guard {dump.retraced} of the trace for all sizes does not hold")
    counts = f"{total['ops']} ops in the piece, {total['computed']} values to compute -> {total['kernels']} kernels"
    lines.append(f"{counts}, {total['ops_as_themselves']} ops as themselves")
    weights = ""
    if total["weight_bytes"]:
        weights_us = total["weight_bytes"] / dump.target.bandwidth_bytes_s * 1e6
        weights = f"; weight matrices alone {_amount(total['weight_bytes'])}B, {weights_us:.1f} us"
    us = f"{'without those ops ' if dump.foreign else ''}{total['predicted_us']:.1f} us predicted"
    lines.append(
        f"{us}; floor {total['floor_us']:.1f} us: {_amount(total['bytes'])}B, {_amount(total['flops'])}FLOP{weights}"
    )
    return lines


def _table(dump: Dump, stats: Sequence[Stats]) -> Table:
    table = Table("kernel", "family, config, domain", "holds (source line)")
    for name in ("bytes", "FLOP", "floor us", "us", *(("regs", "local B", "smem B", "s") if stats else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for kernel in dump.kernels:
        mine = [s for s in stats if s.kernel == kernel.name]
        numbers = [f"{_amount(kernel.bytes)}B", _amount(kernel.flops), f"{kernel.floor_us:.2f} {kernel.bound[0]}"]
        numbers.append("" if kernel.predicted_us is None else f"{kernel.predicted_us:.1f}")
        if stats:
            columns = ("registers", "spills_bytes", "shared_bytes", "seconds")
            numbers += ["\n".join(_number(getattr(s, c)) for s in mine) for c in columns]
        style = "red" if any(s.wrong for s in mine) else "yellow" if not kernel.family else None
        table.add_row(kernel.name, _schedule(kernel), "\n".join(_holds(kernel)), *numbers, style=style)
    table.caption = (
        "floor: m bound by memory, c bound by compute; us: predicted; '+' computed on the spot by every reader"
    )
    table.caption_justify = "left"
    return table


def _schedule(kernel: KernelInfo) -> str:
    if not kernel.family:
        return f"itself: {kernel.config}"
    domain = " + ".join(f"{rows} x {cols}" for rows, cols in kernel.domain)
    how = " (pdl, W early)" if kernel.early else " (pdl)" if kernel.pdl else ""
    return f"{kernel.family}{how}\n{kernel.config}\n{domain}"


def _holds(kernel: KernelInfo) -> list[str]:
    """One line per source line, in order, then what is computed on the spot."""
    lines = []
    for source, group in groupby(kernel.holds, key=lambda h: h.source):
        names = " ".join(h.name for h in group)
        lines.append(f"{names}  {source}" if source else names)
    if kernel.inlined:
        lines.append(f"+ {' '.join(h.name for h in kernel.inlined)}")
    return lines


def _reasons(kernels: Sequence[KernelInfo]) -> list[str]:
    """Why each kernel is what it is; what is said of several once, after them."""
    clauses = {kernel.name: re.split("; (?=not gemm_)", kernel.why) for kernel in kernels if kernel.why}
    said = Counter(clause for each in clauses.values() for clause in dict.fromkeys(each))
    lines, shared = [], dict[str, list[str]]()
    for name, each in clauses.items():
        own = [clause for clause in each if said[clause] == 1]
        lines += [f"{name}: {'; '.join(own)}"] if own else []
        for clause in dict.fromkeys(each):
            if said[clause] > 1:
                shared.setdefault(clause, []).append(name)
    together: dict[str, list[str]] = {}
    for clause, names in shared.items():
        together.setdefault(", ".join(names), []).append(clause)
    return lines + [f"{names}: {'; '.join(each)}" for names, each in together.items()]


def _ops(dump: Dump) -> list[str]:
    lines = []
    for kernel in dump.foreign:
        source = kernel.holds[0].source
        where = f" ({source})" if source else ""
        lines.append(f"{kernel.name}: {kernel.config}{where}: {kernel.why or 'nothing lowers this op'}")
    return lines


def _section(title: str, lines: Sequence[str]) -> list[Any]:
    indented = (Padding(Text(line), (0, 0, 0, 2), expand=False) for line in lines)
    return [Text(f"\n{title}", style="bold"), *indented] if lines else []


def _number(value: float) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _amount(number: float) -> str:
    """A count with a unit prefix, powers of 1000."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000 or prefix == "T":
            break
        number /= 1000
    return f"{number:.0f} {prefix}" if number == int(number) and not prefix else f"{number:.1f} {prefix}"
