"""Time a model's middle piece, eager, Inductor and terrazzo, each as CUDA graphs, against what the hardware allows.

    python -m terrazzo.tools.bench                                     Llama-3.1-8B and 3.2-1B, bf16
    python -m terrazzo.tools.bench --models qwen3-8b --sizes 1,64 --json
    python -m terrazzo.tools.bench --models ./my-model --dtype fp16    of a folder with a config.json
    python -m terrazzo.tools.bench --kernels --contenders terrazzo     where the plan's time goes, kernel by kernel
    python -m terrazzo.tools.bench --sizes 2048 --pause 0.1            each replay as a GPU that was idle gives it
    python -m terrazzo.tools.bench --max-autotune                      also Inductor with max-autotune: minutes per size

A time is per piece, in a graph over layers with weights of their own (measure.py), the median of replays taken in turn.
The floor is max(weight bytes / bandwidth of a copy, FLOPs / 790 TFLOP/s, of eight-bit products 1580); activations are
left out. Each size is checked first (piece_check.py): where that fails, no time of terrazzo is printed.

Exit status: 0; 1 when a check failed; 2 for a request that cannot be right, and without a GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table

from terrazzo.tools.command import DTYPE, exit_status, parser_of, sizes, with_form, writable
from terrazzo.tools.device import HERE, screen, timing
from terrazzo.tools.measure import KernelTime, Target, chain, floor_us, host_us, interleaved_us, kernel_times, layers_of
from terrazzo.tools.models import DTYPES, Piece, pieces
from terrazzo.tools.piece_check import CompiledPiece, check_piece

MODELS = ("llama-3.1-8b", "llama-3.2-1b")
SIZES = (1, 16, 64, 2048, 8192)
CONTENDERS = ("eager", "inductor", "terrazzo")
AUTOTUNED = "inductor max-autotune"


def bench_piece(
    piece: Piece,
    sizes: Sequence[int],
    contenders: Sequence[str],
    kernels: Sequence[str] = (),
    pause_s: float = 0.0,
) -> list[dict[str, Any]]:
    """Times a piece.

    Args:
        piece: with its values on the device that is here.
        sizes: numbers of tokens.
        contenders: of `CONTENDERS` and `AUTOTUNED`.
        kernels: contenders whose kernels are timed one by one as well.
        pause_s: how long the GPU is idle before each replay.

    Returns:
        Per size: model, size, floor_us, us by contender, layers per graph, failures of the check, and kernels.
    """
    results = []
    for size in sizes:
        made = _bench_size(piece, CompiledPiece(piece.graph, steady=True), size, contenders, kernels, pause_s)
        times = ", ".join(f"{name} {us:.1f}" for name, us in made["us"].items())
        print(f"{piece.model} at {size}: floor {made['floor_us']:.1f}, {times} µs", file=sys.stderr, flush=True)
        results.append(made)
    return results


def _bench_size(
    piece: Piece,
    compiled: CompiledPiece,
    size: int,
    contenders: Sequence[str],
    kernels: Sequence[str],
    pause_s: float,
) -> dict[str, Any]:
    failures: list[str] = []
    if "terrazzo" in contenders:
        failures = check_piece(piece, compiled, size, HERE).failures
        contenders = [c for c in contenders if c != "terrazzo" or not failures]
    with torch.no_grad():
        layers = layers_of(piece, size, HERE)
        graphs = {name: chain(_runner(name, piece, compiled, layers[0]), layers) for name in contenders}
        times = interleaved_us(graphs, len(layers), pause_s=pause_s)
        found: dict[str, list[KernelTime]] = {}
        for name in [k for k in kernels if k in graphs]:
            plans = [made for (sizes, _), made in compiled.plans.items() if _ours(name) and sizes == (size,)]
            found[name] = kernel_times(graphs[name], len(layers), plans[0] if plans else None)
    return {
        "model": piece.model,
        "size": size,
        "floor_us": floor_us(piece, size, Target.current()),
        "us": times,
        "layers": len(layers),
        "failures": failures,
        "kernels": {name: [vars(k) for k in made] for name, made in found.items()},
    }


def _ours(name: str) -> bool:
    return name == "terrazzo"


def _runner(name: str, piece: Piece, compiled: CompiledPiece, args: Sequence[Any]) -> Callable[..., Any]:
    if name == "eager":
        return piece.graph.forward
    if _ours(name):
        return compiled.at(args)
    # Equal code at another size would count as a recompilation, of which there is a limit.
    torch._dynamo.reset()
    mode = "max-autotune-no-cudagraphs" if name == AUTOTUNED else None
    return torch.compile(piece.graph, dynamic=False, mode=mode)


def table(results: Sequence[dict[str, Any]]) -> Table:
    """One row per size: µs per piece, and terrazzo beside the floor and the fastest other."""
    names = list(dict.fromkeys(name for r in results for name in r["us"]))
    made = Table(title="µs per piece", title_justify="left")
    made.add_column("model", no_wrap=True)
    for column in ("tokens", "floor", *names, "terrazzo / floor", "best other / terrazzo"):
        made.add_column(column, justify="right")
    for r in results:
        row = [r["model"], str(r["size"]), f"{r['floor_us']:.1f}"]
        row += [f"{r['us'][n]:.1f}" if n in r["us"] else "-" for n in names]
        ours, others = r["us"].get("terrazzo"), [us for n, us in r["us"].items() if not _ours(n)]
        if r["failures"]:
            row += ["[red]wrong[/]", "[red]wrong[/]"]
        else:
            row.append(f"{ours / r['floor_us']:.2f}" if ours else "")
            row.append(f"{min(others) / ours:.2f}" if ours and others else "")
        made.add_row(*row)
    return made


def kernel_table(title: str, kernels: Sequence[dict[str, Any]]) -> Table:
    """One row per kernel of a layer: its duration, what it adds to the piece's time, and the least it could take."""
    made = Table(title=title, title_justify="left")
    made.add_column("launch")
    made.add_column("kernel")
    for column in ("µs", "adds", "floor"):
        made.add_column(column, justify="right", no_wrap=True)
    for k in kernels:
        floor = "" if k["floor_us"] is None else f"{k['floor_us']:.1f}"
        made.add_row(k["launch"], k["name"][:40], f"{k['us']:.2f}", f"{k['adds_us']:.2f}", floor)
    made.add_section()
    made.add_row("sum", "", "", f"{sum(k['adds_us'] for k in kernels):.2f}", "")
    return made


def middle(name: str, tiny: bool = False, dtype: str = "bf16") -> Piece:
    """The middle piece of a model; `dtype` is a key of `DTYPES`."""
    return pieces(name, tiny=tiny, dtype=DTYPES[dtype], device=HERE, layers=2)[1]


def _arguments() -> argparse.Namespace:
    parser = parser_of("bench", __doc__)
    models, usual, contenders = ",".join(MODELS), ",".join(map(str, SIZES)), ",".join(CONTENDERS)
    known = f"{contenders},{AUTOTUNED}"
    parser.add_argument("--models", default=models, help=f"names or folders, comma-separated (default: {models})")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help=DTYPE)
    parser.add_argument(
        "--sizes", default=list(SIZES), type=sizes, help=f"numbers of tokens, comma-separated (default: {usual})"
    )
    parser.add_argument(
        "--contenders", default=contenders, help=f"who is timed, of {known}, comma-separated (default: {contenders})"
    )
    parser.add_argument(
        "--pause", type=float, default=0.0, metavar="SECONDS",
        help="leave the GPU idle before each replay, which then starts below the power limit",
    )  # fmt: skip
    parser.add_argument("--max-autotune", action="store_true", help=f"{AUTOTUNED} as well")
    parser.add_argument(
        "--kernels", nargs="?", const="terrazzo", default="", metavar="CONTENDERS",
        help=f"time every single kernel as well, of those of {known} that are named, comma-separated, or of terrazzo "
        "if none is (default: no single kernels)",
    )  # fmt: skip
    parser.add_argument("--json", nargs="?", const="-", help="results as JSON, on the screen or to a file")
    options = parser.parse_args()
    for chosen in (options.contenders, options.kernels):
        for name in filter(None, chosen.split(",")):
            if name not in (*CONTENDERS, AUTOTUNED):
                parser.error(f"unknown contender {name!r}; there are {', '.join((*CONTENDERS, AUTOTUNED))}")
    options.contenders = options.contenders.split(",") + [AUTOTUNED] * options.max_autotune
    options.kernels = [name for name in options.kernels.split(",") if name]
    if not 0 <= options.pause <= 60:
        parser.error(f"--pause {options.pause}: seconds, at most 60")
    if missing := [name for name in options.kernels if name not in options.contenders]:
        parser.error(f"--kernels {', '.join(missing)}: not among those that are timed")
    return options


def main() -> int:
    options = _arguments()
    timing()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    models = with_form(options.models.split(","), options.dtype, named=True)
    writable(options.json)
    host = host_us(middle("llama-3.1-8b", tiny=True), 16, HERE)
    results: list[dict[str, Any]] = []
    for name in models:
        piece = middle(name, dtype=options.dtype)
        results += bench_piece(piece, options.sizes, options.contenders, options.kernels, options.pause)
    _report(options.json, results, host)
    return int(any(r["failures"] for r in results))


def _report(where: str | None, results: list[dict[str, Any]], host: dict[str, float]) -> None:
    for r in results:
        for failure in r["failures"]:
            print(f"{r['model']} at {r['size']}: {failure}", file=sys.stderr)
    if where:
        text = json.dumps({"device": Target.current().name, "host_us": host, "results": results})
        if where == "-":
            print(text)
            return
        with open(where, "w") as file:
            file.write(text)
    console = screen()
    console.print(table(results))
    for r in results:
        for name, kernels in r["kernels"].items():
            console.print(kernel_table(f"{r['model']} at {r['size']}, {name}: kernels of one piece", kernels))
    console.print(
        f"{Target.current().name}; host time of a replay: {host['dispatcher']:.2f} µs through the dispatcher, "
        f"{host['bare']:.2f} bare; {host['launched']:.1f} launch by launch"
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
