"""Check every piece of the models against eager and fp64: values, memory, repeatability, CUDA graph.

    python -m terrazzo.tools.check                                       all models, on a GPU at their published sizes
    python -m terrazzo.tools.check --models llama-3.1-8b --sizes 1,16,2048 --json
    python -m terrazzo.tools.check --tiny                                their tiny twins, on a GPU as well
    python -m terrazzo.tools.check --range 1:8192                        plans for ranges of sizes, at their bounds

Of each model the first, one middle and the last piece are checked: the others are the same piece. What is checked
stands in piece_check.py. Without a GPU the kernels are interpreted, and the models are always the tiny twins.

Exit status: 0; 1 when anything does not hold; 2 for a request that cannot be right.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from itertools import groupby

from rich.table import Table

from terrazzo.lowering.errors import UserError
from terrazzo.tools.command import DTYPE, exit_status, number, parser_of, size_range, sizes, with_form, writable
from terrazzo.tools.device import HERE, screen
from terrazzo.tools.models import DTYPES, Piece, names, pieces
from terrazzo.tools.piece_check import Result, bounds, check_sizes

SIZES = (1, 2, 7, 16, 64, 128, 1000, 2048, 8192)
# The interpreter takes about 12 ms per 128 x 128 x 128 product.
INTERPRETED_SIZES = (1, 2, 7)
KINDS = ("first", "middle", "last")
# Two layers give one piece of each kind.
LAYERS = 2


def check_all(
    models: Sequence[str],
    sizes: Sequence[int],
    dtype: str = "bf16",
    tiny: bool = False,
    procs: int = 1,
    span: tuple[int, int] | None = None,
) -> Iterator[Result]:
    """Every kind of piece of every model at every size.

    Args:
        models: names; equal sizes for all.
        sizes: numbers of tokens.
        dtype: a key of `DTYPES`.
        tiny: the models' tiny twins.
        procs: processes that share the work; compiling keeps a core busy each.
        span: a range of sizes to plan for at once; the sizes in it are served by those plans.
    """
    # The longest first, so that no process works on alone at the end.
    tasks = [(model, at, tuple(sizes), dtype, tiny, span) for at in (1, 0, 2) for model in models]
    if procs == 1:
        for task in tasks:
            yield from check_kind(*task)
        return
    # A process that has touched CUDA cannot be forked.
    with ProcessPoolExecutor(procs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(check_kind, *task) for task in tasks]):
            yield from done.result()


def check_kind(
    model: str, at: int, sizes: tuple[int, ...], dtype: str, tiny: bool, span: tuple[int, int] | None = None
) -> list[Result]:
    """One of a model's three pieces at these sizes; none given: at and beside the bounds of its range's plans."""
    piece = _pieces(model, dtype, tiny)[at]
    return check_sizes(piece, sizes or bounds(piece, span), HERE, span)


@cache
def _pieces(model: str, dtype: str, tiny: bool) -> list[Piece]:
    return pieces(model, tiny=tiny, dtype=DTYPES[dtype], device=HERE, layers=LAYERS)


def table(results: Sequence[Result]) -> Table:
    """Sizes with equal outcome share a row.

    Of the columns, 'undecided' rows are left out (wide.py), and 'error' is in units of eager's: right to 2.
    """
    made = Table(title="compiled pieces against eager and fp64", title_justify="left")
    for column in ("model", "piece"):
        made.add_column(column, no_wrap=True)
    made.add_column("tokens")
    for column in ("kernels", "as themselves", "undecided", "error"):
        made.add_column(column, justify="right")
    made.add_column("")
    order = {kind: at for at, kind in enumerate(KINDS)}
    ordered = sorted(results, key=lambda r: (r.model, order[r.piece], r.size))
    for key, group in groupby(ordered, key=lambda r: (r.model, r.piece, r.kernels, r.foreign, r.ok)):
        members = list(group)
        model, piece, kernels, foreign, ok = key
        sizes, ratio = " ".join(str(r.size) for r in members), max(r.ratio for r in members)
        undecided = sum(r.undecided for r in members)
        state = "[green]ok[/]" if ok else "[red]wrong[/]"
        made.add_row(model, piece, sizes, str(kernels), str(foreign), str(undecided or ""), f"{ratio:.2f}", state)
    return made


def _arguments() -> argparse.Namespace:
    parser = parser_of("check", __doc__)
    parser.add_argument("--models", default="all", help="names or folders, comma-separated, or 'all' (default)")
    usual, interpreted = (",".join(map(str, known)) for known in (SIZES, INTERPRETED_SIZES))
    parser.add_argument("--sizes", type=sizes, help="numbers of tokens, comma-separated (default: with --range as said "
                        f"there, else {usual}, without a GPU {interpreted})")  # fmt: skip
    parser.add_argument("--range", metavar="LO:HI", type=size_range, help="plans that serve every size of a range; "
                        "without --sizes each is checked at its first two sizes, one inside and its last")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help=DTYPE)
    parser.add_argument("--tiny", action="store_true", help="the models' tiny twins; without a GPU always")
    parser.add_argument("--procs", type=number,
                        help="processes (default: 8 on a GPU, as far as there are cores, else 1)")  # fmt: skip
    parser.add_argument("--json", nargs="?", const="-", help="results as JSON, on the screen or to a file")
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    everything = options.models == "all"
    models = with_form(names() if everything else options.models.split(","), options.dtype, named=not everything)
    writable(options.json)
    on_gpu = HERE.type == "cuda"
    usual = SIZES if on_gpu else INTERPRETED_SIZES
    span = options.range
    asked = options.sizes or (() if span else usual)
    outside = [size for size in asked if span and not span[0] <= size <= span[1]]
    if outside:
        fact = f"the range is {span[0]} to {span[1]}, and another plan would be checked"
        raise UserError(f"sizes {outside}", fact, stage="tools.check", remedy="Give sizes inside.")
    procs = options.procs or (min(8, os.cpu_count() or 1) if on_gpu else 1)
    started, results = time.perf_counter(), []
    for result in check_all(models, asked, options.dtype, options.tiny or not on_gpu, procs, span):
        results.append(result)
        state = f"error {result.ratio:.2f}" if result.ok else "; ".join(result.failures)
        print(f"{result.model} {result.piece} at {result.size}: {state}", file=sys.stderr, flush=True)
        if options.json not in (None, "-"):
            # What is known so far, should the rest not be reached.
            with open(options.json, "w") as file:
                json.dump([asdict(r) for r in results], file)
    wrong = sum(not r.ok for r in results)
    if options.json == "-":
        print(json.dumps([asdict(r) for r in results]))
        return int(wrong > 0)
    console = screen()
    console.print(table(results))
    console.print(f"{len(results)} checks, {wrong} wrong, {time.perf_counter() - started:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(exit_status(main))
