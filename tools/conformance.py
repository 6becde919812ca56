"""PyTorch's operator database against terrazzo: every operator, every sample, through Dynamo and as an ATen graph.

    python -m terrazzo.tools.conformance                                    everything: hours on a CPU
    python -m terrazzo.tools.conformance --ops 'nn.functional.*' --dtypes float32,int64 --samples 8
    python -m terrazzo.tools.conformance --ops cumsum --dtypes bfloat16 --case 3:gaps
    python -m terrazzo.tools.conformance --json found.jsonl --resume        goes on where an earlier run stopped

Dtypes: float32, bfloat16, int64, bool; variants: as given, with gaps in memory, in place. How results are compared
stands in op_check.py. A line per operator and dtype goes to --json as soon as it is known. What was not compared, or
not in full, is counted with its reason. Exit status 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import functools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from terrazzo.lowering.errors import UserError
from terrazzo.tools import opdb, pool
from terrazzo.tools.command import exit_status, number, writable
from terrazzo.tools.coverage import Coverage
from terrazzo.tools.device import HERE, screen
from terrazzo.tools.op_check import DTYPES, PATHS, Result, check

Task = tuple[str, str]


def main() -> int:
    options = _arguments()
    paths = options.paths.split(",")
    _known("--paths", paths, PATHS, "it is no way to compile")
    if options.resume and not options.json:
        raise UserError("--resume", "no file says what was done", stage="tools", remedy="Name it with --json.")
    tasks = _tasks(options.ops.split(","), options.dtypes.split(","))
    writable(options.json, screen=False)
    known = read(options.json) if options.resume else {}
    started = time.perf_counter()
    results = [known[t] for t in tasks if t in known]
    left = [t for t in tasks if t not in known]
    work = functools.partial(_work, paths, options.samples, options.case)
    for done in pool.run(work, left, options.procs, options.seconds):
        result = done.result or Result(done.task[0], done.task[1], failures=[done.ended_by])
        results.append(result)
        _write(options.json, result)
        for failure in result.failures:
            print(f"{result.op} {result.dtype} {' '.join(failure.split())[:400]}", file=sys.stderr, flush=True)
    _report(results, time.perf_counter() - started)
    if options.case and not any(r.checks or r.aside or r.failures for r in results):
        raise UserError(f"--case {options.case}", "none of these operators has such a case", stage="tools",
                        remedy="A failure names its case, NUMBER:VARIANT.")  # fmt: skip
    return int(any(r.failures for r in results))


def _work(paths: Sequence[str], samples: int, case: str, task: Task, note: Callable[[str], None]) -> Result:
    op, dtype = task
    return check(op, dtype, paths, samples, note, case)


def _tasks(patterns: Iterable[str], dtypes: Iterable[str]) -> list[Task]:
    """Operators by dtype, as asked for.

    Raises:
        UserError: a name that nothing has.
    """
    names = opdb.operators()
    chosen: list[str] = []
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            near = ", ".join(difflib.get_close_matches(pattern, names)) or "none near it"
            raise UserError(f"--ops {pattern}", "the database has no such operator", stage="tools",
                            remedy=f"Names like it: {near}.")  # fmt: skip
        chosen += [n for n in found if n not in chosen]
    _known("--dtypes", dtypes, DTYPES, "it is none of the dtypes checked")
    return [(n, d) for n in chosen for d in dtypes if opdb.supports(n, DTYPES[d], HERE)]


def _known(option: str, given: Iterable[str], known: Iterable[str], fact: str) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{option} {name}", fact, stage="tools", remedy=f"Choose from {', '.join(known)}.")


def _write(path: str | None, result: Result) -> None:
    if path:
        with Path(path).open("a") as file:
            file.write(json.dumps({**vars(result), "coverage": vars(result.coverage)}) + "\n")


def read(path: str | None) -> dict[Task, Result]:
    """Results of an earlier run."""
    found: dict[Task, Result] = {}
    if path and Path(path).exists():
        for line in Path(path).read_text().splitlines():
            result = restored(json.loads(line))
            found[result.op, result.dtype] = result
    return found


def restored(fields: dict[str, Any]) -> Result:
    """A result from its JSON."""
    lowered, passed = fields["coverage"]["lowered"], fields["coverage"]["passed"]
    coverage = Coverage(Counter(lowered), {op: Counter(reasons) for op, reasons in passed.items()})
    counted = {"aside": Counter(fields["aside"]), "whole": Counter(fields["whole"]), "coverage": coverage}
    return Result(**{**fields, **counted})


def _report(results: Sequence[Result], seconds: float) -> None:
    console = screen()
    wrong = [r for r in results if r.failures]
    if wrong:
        table = Table(title="wrong", title_justify="left")
        for column in ("operator", "dtype", "cases", "the first"):
            table.add_column(column)
        for result in wrong[:20]:
            table.add_row(result.op, result.dtype, str(len(result.failures)), escape(result.failures[0][:300]))
        console.print(table)
        if len(wrong) > 20:
            console.print(f"… and {len(wrong) - 20} more")
    coverage = Coverage().update(r.coverage for r in results)
    aside, whole = Counter[str](), Counter[str]()
    for result in results:
        aside.update(result.aside)
        whole.update(result.whole)
    for title, counts in (("not compared, or not in full", aside), ("pieces that run as the graph they were", whole)):
        if counts:
            console.print(f"{title}:")
        for reason, count in counts.most_common(8):
            console.print(f"  {count:6d}  {escape(reason[:180])}", highlight=False)
    failures = sum(len(r.failures) for r in results)
    console.print(
        f"{len({r.op for r in results})} operators, {sum(r.checks for r in results)} checks, {failures} wrong; "
        f"{coverage.share:.1%} of the ATen ops in their graphs lowered; {seconds:.0f} s"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default="*", help="names or patterns, comma-separated")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--paths", default=",".join(PATHS))
    parser.add_argument("--samples", type=functools.partial(number, least=0), default=0,
                        help="at most so many per operator and dtype; 0: all")  # fmt: skip
    parser.add_argument("--case", default="", help="one case, as failures name it: NUMBER:VARIANT")
    parser.add_argument("--procs", type=number, default=max((os.cpu_count() or 2) - 1, 1))
    parser.add_argument("--seconds", type=float, default=1800, help="that one operator in one dtype may take")
    parser.add_argument("--json", help="a file that gets a line per operator and dtype as it is known")
    parser.add_argument("--resume", action="store_true", help="leaves out what the --json file has already")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_status(main))
