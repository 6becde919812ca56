"""What an epilogue reads, taken out of its body into a function of its own: a schedule may then ask for it before the
product.

A row's residual, a norm's weights and the tables of RoPE come from memory while nothing waits for them; at the end of a
product everything would (docs/perf-log.md, 2026-11-26). Only reads that hang on neither the product nor on sums of rows
move. The body finds what was read behind its tensors in `t`, in the dtype in which it lies in memory.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .parser import parse

# Reads that are held across the product, at most: each takes registers.
MOST = 8
WIDENED = ".to(tl.float32)"


@dataclass(frozen=True)
class _Line:
    """One statement: its text, the names it reads and those it makes, and whether it is a read of memory."""

    text: str
    reads: frozenset[str]
    makes: tuple[str, ...]
    loads: bool


def apart(body: str, tensors: int, name: str) -> tuple[str, str]:
    """The function of the reads, and the body without them; an empty function where none can move.

    Args:
        body: an epilogue `def …(acc, acc2, m, n, mask, t)`, one statement a line.
        tensors: what `t` holds before the reads: tensors, and the sum of a row's parts where there is one.
        name: of the new function.
    """
    lines: list[str | None] = [*body.split("\n")]
    found = dict(_lines(body))
    fixed = {"acc", "acc2"}
    for line in found.values():
        if line.reads & fixed or _sum(line, tensors):
            fixed.update(line.makes)
    moved = [number for number, line in found.items() if line.loads and not fixed & {*line.makes, *line.reads}]
    if not 0 < len(moved) <= MOST:
        return "", body
    needed = _needed(found, moved)
    # What the body still reads, last statement first: a read that only served another one's address is not among it.
    used: set[str] = set()
    for number in sorted(found, reverse=True):
        line = found[number]
        if number in moved:
            continue
        if not line.makes or used & {*line.makes}:
            used |= line.reads
    read = frozenset().union(*(found[number].reads for number in needed))
    given: list[str] = []
    inner: list[str] = []
    for number in needed:
        line = found[number]
        (target, *_) = line.makes
        if number not in moved:
            inner.append(line.text)
        else:
            # Held as narrow as it lies in memory, unless another read needs it as a number.
            wide = line.text.endswith(WIDENED) and target not in read
            inner.append(line.text.removesuffix(WIDENED) if wide else line.text)
            lines[number] = f"    {target} = t[{tensors + len(given)}]{WIDENED if wide else ''}"
            given += [target] * (target in used)
        if not used & {*line.makes}:
            lines[number] = None
    if not given:
        return "", body
    head = ["@triton.jit", f"def {name}(m, n, mask, t):"]
    reads = [*head, *(f"    {text}" for text in inner), f"    return ({', '.join(given)},)"]
    return "\n".join(reads), "\n".join(line for line in lines if line is not None)


def _sum(line: _Line, tensors: int) -> bool:
    """Whether a statement takes the sum of a row's parts, which the schedule puts behind the tensors."""
    return any(line.text == f"{name} = t[{tensors - 1}]" and not name.endswith("_ptr") for name in line.makes)


def _lines(body: str) -> Iterator[tuple[int, _Line]]:
    """The statements by their lines' numbers."""
    lines = body.split("\n")
    (function,) = parse(body).body
    assert isinstance(function, ast.FunctionDef)
    for statement in function.body:
        assert statement.lineno == statement.end_lineno, "one statement a line"
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        makes = tuple(node.id for node in names if isinstance(node.ctx, ast.Store))
        reads = frozenset(node.id for node in names if isinstance(node.ctx, ast.Load))
        value = statement.value if isinstance(statement, ast.Assign) else None
        text = lines[statement.lineno - 1].strip()
        yield statement.lineno - 1, _Line(text, reads, makes, value is not None and _is_load(value))


def _is_load(value: ast.expr) -> bool:
    """`tl.load(…)`, widened or not."""
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return False
    if value.func.attr == "to":
        return _is_load(value.func.value)
    return isinstance(value.func.value, ast.Name) and (value.func.value.id, value.func.attr) == ("tl", "load")


def _needed(found: dict[int, _Line], moved: Sequence[int]) -> list[int]:
    """The statements that these need, and they themselves, in order."""
    needed, wanted = set(moved), set().union(*(found[number].reads for number in moved))
    for number in sorted(found, reverse=True):
        line = found[number]
        if number in needed or wanted & set(line.makes):
            needed.add(number)
            wanted |= line.reads
    return sorted(needed)
