"""The core ATen operators: lowered to Triton, taken apart, geometry alone, or run as themselves, and why.

    python -m terrazzo.tools.operators                                      the table
    python -m terrazzo.tools.operators --found found.jsonl --write          docs/operators.md, with what a run of
                                                                            terrazzo.tools.conformance found

`core` is torch's own word: the operators tagged `torch.Tag.core`. What an operator is follows from the lowering itself
(its rules, its decomposition table, the operators' schemas); only the reasons of those without either stand here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import terrazzo.tools.device  # noqa: F401  before Triton is imported, whose interpreter it may choose
from terrazzo.lowering.decompositions import table as decompositions
from terrazzo.lowering.define import rules
from terrazzo.lowering.errors import InternalError, UserError
from terrazzo.tools.command import exit_status
from terrazzo.tools.conformance import read
from terrazzo.tools.coverage import Coverage
from terrazzo.tools.device import screen

PAGE = Path(__file__).resolve().parents[1] / "docs" / "operators.md"

# The page is written with a newer torch, whose decompositions take such an operator apart.
OLD = "torch 2.11 does not take it apart"
# Why a core operator runs as itself.
WHY = {
    "linear algebra": ("_cdist_forward", "_pdist_forward"),
    "Fourier transforms": ("_fft_c2r", "_fft_r2c"),
    "convolutions": ("convolution", "convolution_backward"),
    "sorting": ("sort", "topk"),
    "random numbers: eager's own, so that a seed gives the same": ("native_dropout", "rand", "randn", "randperm"),
    "the result's size depends on data": ("nonzero",),
    "it reads a number for the host": ("_local_scalar_dense",),
    OLD: ("max_pool2d_with_indices_backward",),
    "bags of embeddings with offsets known at run time": ("_embedding_bag",),
}
REASONS = {name: why for why, names in WHY.items() for name in names}

HEAD = """# Operators

What becomes of the core ATen operators (those that torch tags `core`), written by
`python -m terrazzo.tools.operators --found FILE --write` from the lowering itself and from a run of
`python -m terrazzo.tools.conformance --json FILE` over PyTorch's operator database.

- *kernel*: a rule says what one element of the result is; it is computed in Triton, fused with its neighbours.
- *parts*: taken apart while tracing into operators that are.
- *geometry*: a view; no work is left of it.
- *size*: arithmetic on sizes, done before anything runs.
- *itself*: the operator runs as torch's own kernel, correct and counted.

"in the database" counts the operator in the graphs of that run: lowered, and run as itself with the most frequent
reasons (a dtype or form that no rule takes, sizes for which the vendor's kernel is the better one).
"""


@dataclass(frozen=True)
class Operator:
    """One core operator.

    Args:
        name: with its overload.
        how: 'kernel', 'parts', 'geometry', 'size' or 'itself'.
        why: of what runs as itself.
    """

    name: str
    how: str
    why: str = ""


def core() -> Iterator[Operator]:
    """Every core operator, by name.

    Raises:
        InternalError: nothing lowers one, and no reason stands in `WHY`.
    """
    known, taken_apart = rules(), decompositions()
    for op in sorted(_core(), key=str):
        name = op._schema.name.split("::")[1]
        if op in known:
            yield Operator(str(op), "kernel")
        elif name.startswith("sym_"):
            yield Operator(str(op), "size")
        elif _is_view(op):
            yield Operator(str(op), "geometry")
        elif op in taken_apart:
            yield Operator(str(op), "parts")
        elif name in REASONS:
            yield Operator(str(op), "itself", REASONS[name])
        elif op._schema.is_mutable:
            yield Operator(str(op), "parts")
        else:
            raise InternalError(str(op), "it has no rule, and no reason for that is written down", stage="tools",
                                remedy="Write a rule, or name it in WHY.")  # fmt: skip


def _core() -> Iterator[Any]:
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        if isinstance(packet, torch._ops.OpOverloadPacket):
            overloads = [getattr(packet, overload) for overload in packet.overloads()]
            yield from (op for op in overloads if torch.Tag.core in op.tags)


def _is_view(op: Any) -> bool:
    first = op._schema.arguments[0].alias_info if op._schema.arguments else None
    return first is not None and not first.is_write


def share(operators: list[Operator]) -> float:
    """Of the core operators, how many are lowered."""
    return sum(o.how != "itself" for o in operators) / len(operators)


def page(operators: list[Operator], found: Coverage) -> str:
    """The text of docs/operators.md."""
    counts = Counter(o.how for o in operators)
    said = ", ".join(f"{count} {how}" for how, count in counts.most_common())
    lines = [HEAD, f"{len(operators)} operators: {said}; {share(operators):.1%} lowered.\n"]
    lines += ["| operator | how | in the database | as itself, because |", "|---|---|---|---|"]
    for o in operators:
        lowered, passed = found.lowered.get(o.name, 0), found.passed.get(o.name, Counter[str]())
        reasons = [o.why] if o.why else [f"{why} ({n})" for why, n in _merged(passed).most_common(3)]
        numbers = f"{lowered} lowered, {sum(passed.values())} as itself" if lowered or passed else ""
        lines.append(f"| `{o.name}` | {o.how} | {numbers} | {'; '.join(reasons)} |")
    return "\n".join(lines) + "\n"


def _merged(reasons: Mapping[str, int]) -> Counter[str]:
    """Reasons with their numbers left out, so that equal ones meet."""
    merged: Counter[str] = Counter()
    for why, count in reasons.items():
        merged[" ".join(w for w in why.split() if not w.isdigit())] += count
    return merged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--found", help="the --json file of a run of terrazzo.tools.conformance")
    parser.add_argument("--write", action="store_true", help=f"writes {PAGE.name}")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.found and not Path(options.found).is_file():
        raise UserError(f"--found {options.found}", "there is no such file", stage="tools")
    if options.write and not options.found:
        raise UserError("--write", "the page says what a run of the database found", stage="tools",
                        remedy="Name its file with --found.")  # fmt: skip
    operators = list(core())
    found = Coverage().update(result.coverage for result in read(options.found).values())
    if options.write:
        PAGE.write_text(page(operators, found))
    if options.json:
        print(json.dumps([vars(o) for o in operators]))
        return 0
    shown = Table(title=f"{len(operators)} core operators, {share(operators):.1%} lowered", title_justify="left")
    for column in ("as itself", "why"):
        shown.add_column(column)
    for o in operators:
        if o.how == "itself":
            shown.add_row(o.name, o.why)
    screen().print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
