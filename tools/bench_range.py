"""What one plan for a range costs against a plan for the very size: time on a GPU, and what preparing takes.

    python -m terrazzo.tools.bench_range                               Llama-3.1-8B and 3.2-1B, 1 to 16384 tokens
    python -m terrazzo.tools.bench_range --models gpt2 --sizes 1,17,333,3001 --json
    python -m terrazzo.tools.bench_range --models llama-3.1-8b --dtype fp8 --sizes 8,32,128      shapes without rows

Both run the middle piece in CUDA graphs, replayed in turn, over layers with weights of their own (measure.py). Each
size is checked first; where that fails no time is printed. Exit status 1 when a check failed or the range's plan is
slower than 97 % of the exact plan's speed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

import terrazzo.tools.device as place  # before Triton is imported, whose interpreter it may choose
from terrazzo.lowering.errors import UserError
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools.bench import middle
from terrazzo.tools.command import DTYPE, exit_status, number, parser_of, sizes, with_form
from terrazzo.tools.measure import chain, interleaved_us, layers_of
from terrazzo.tools.models import DTYPES, Piece
from terrazzo.tools.piece_check import check_sizes

MODELS = "llama-3.1-8b,llama-3.2-1b"
# Beside the bounds of the tables, between them, and of no tile's multiple.
SIZES = "1,2,7,16,17,33,64,65,100,128,129,257,333,512,513,1000,1025,2048,2049,3001,8192,12345"
LARGEST = 16384
SPEED = 0.97


def bench(piece: Piece, sizes: Sequence[int], largest: int) -> list[dict[str, Any]]:
    """Times of both kinds of plan at each size, in µs per piece."""
    start = time.perf_counter()
    ranged = CompiledPiece(piece.graph, steady=True)
    regimes = [str(r) for r in ranged.ranged(1, largest)]
    prepared_s = time.perf_counter() - start
    found = []
    for size in sizes:
        # Equal pieces share plans, so this comes after the range was planned.
        failures = check_sizes(piece, [size], place.HERE, (1, largest))[0].failures
        made: dict[str, Any] = {"model": piece.model, "size": size, "failures": failures}
        made |= {"regimes": regimes, "prepared_s": prepared_s}
        if not failures:
            with torch.no_grad():
                layers = layers_of(piece, size, place.HERE)
                runs = {"exact": CompiledPiece(piece.graph, steady=True).at(layers[0]), "range": ranged.at(layers[0])}
                made["us"] = interleaved_us({name: chain(run, layers) for name, run in runs.items()}, len(layers))
                made["speed"] = made["us"]["exact"] / made["us"]["range"]
        found.append(made)
        print(f"{piece.model} at {size}: {made.get('us') or failures}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    return found


def table(found: Sequence[dict[str, Any]]) -> Table:
    """A row per size."""
    made = Table(title="a plan for a range against a plan for the size, µs per piece", title_justify="left")
    for column in ("model", "tokens", "exact", "range", "speed"):
        made.add_column(column, justify="left" if column == "model" else "right")
    for row in found:
        if "us" not in row:
            made.add_row(row["model"], str(row["size"]), "[red]wrong[/]", "", "")
            continue
        style = "red" if row["speed"] < SPEED else None
        times = (f"{row['us'][name]:.1f}" for name in ("exact", "range"))
        made.add_row(row["model"], str(row["size"]), *times, f"{row['speed']:.3f}", style=style)
    return made


def _arguments() -> argparse.Namespace:
    parser = parser_of("bench_range", __doc__)
    parser.add_argument("--models", default=MODELS, help=f"names or folders, comma-separated (default: {MODELS})")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help=DTYPE)
    parser.add_argument("--sizes", default=sizes(SIZES), type=sizes,
                        help=f"numbers of tokens, comma-separated (default: {SIZES})")  # fmt: skip
    parser.add_argument("--largest", type=number, default=LARGEST,
                        help=f"the range's largest size (default: {LARGEST})")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="a list: an object per size")
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    if beyond := [size for size in options.sizes if size > options.largest]:
        fact = f"the range ends at {options.largest}"
        raise UserError(f"sizes {beyond}", fact, stage="tools.bench_range", remedy="Give a larger --largest.")
    models = with_form(options.models.split(","), options.dtype, named=True)
    place.timing()
    found: list[dict[str, Any]] = []
    for name in models:
        found += bench(middle(name, dtype=options.dtype), options.sizes, options.largest)
    if options.json:
        print(json.dumps(found))
    else:
        console = place.screen()
        console.print(table(found))
        for name, seconds in {row["model"]: row["prepared_s"] for row in found}.items():
            console.print(f"{name}: planned and compiled in {seconds:.1f} s")
    return int(any(row["failures"] or row["speed"] < SPEED for row in found))


if __name__ == "__main__":
    sys.exit(exit_status(main))
