"""One screen: a small Llama cut into pieces as vLLM cuts it, each served by terrazzo's backend, beside eager and fp64.

    python -m terrazzo.tools.demo [--model NAME] [--tokens N] [--json]

Without a GPU the kernels are interpreted. On one the pieces are captured and replayed as CUDA graphs, and a table more
shows times of Llama-3.1-8B's middle piece. Exit status 1 when a result is further from fp64 than oracle.py allows.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from terrazzo.lowering.errors import UserError
from terrazzo.tools import wide
from terrazzo.tools.command import exit_status, number
from terrazzo.tools.device import HERE, screen
from terrazzo.tools.models import Piece, Whole, config, run_eagerly, run_whole, whole
from terrazzo.tools.oracle import judge
from terrazzo.tools.stand_in import CompiledPiece, backend

MODEL = "llama-3.1-8b"
TOKENS = 16
# Reasons against a fusion that are shown.
SHOWN = 3
# What is timed on a GPU: decode sizes, which take seconds to compile.
BENCHED = (MODEL, (1, 16, 64))
# Calls until a size is served as it will be: the general graph; on a GPU then one plain run and the capture.
SETTLING = 3 if HERE.type == "cuda" else 1


@dataclass
class Served:
    """What became of one piece.

    Args:
        ops: kernels that eager launches: ATen ops that are neither views nor bare memory.
        kernels, foreign: launches of ours, ops that run as themselves.
        ratio: error in units of eager's (see `oracle.Verdict`).
        state: what serves this size.
        launches: per kernel its family and what it computes.
        refusals: why there are not fewer.
    """

    name: str
    ops: int
    kernels: int = 0
    foreign: int = 0
    ratio: float = 0.0
    ok: bool = True
    state: str = ""
    launches: list[tuple[str, str]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Demo:
    """All pieces in order, and the whole model's output."""

    model: str
    tokens: int
    pieces: list[Served]
    ratio: float
    ok: bool


def demo(model: str = MODEL, tokens: int = TOKENS) -> Demo:
    """Serves the tiny twin of a model piece by piece.

    Args:
        model: a name.
        tokens: how many, in one sequence.

    Raises:
        UserError: there is no such model, or it has fewer positions.
    """
    twin = config(model, tiny=True)
    if tokens > twin.max_positions:
        fact = f"the tiny twin of {model} has {twin.max_positions} positions"
        raise UserError(f"{tokens} tokens", fact, stage="tools.demo")
    parts = whole(model, tiny=True, device=HERE)
    ids = torch.randint(0, twin.vocab, (tokens,), generator=torch.Generator().manual_seed(0)).to(HERE, torch.int32)
    positions = torch.arange(tokens, device=HERE)
    served = _Serving(parts, tokens)
    for _ in range(SETTLING):
        run_whole(parts, served.run, ids, positions)
    ours = run_whole(parts, served.run_and_compare, ids, positions)
    eager = run_whole(parts, run_eagerly, ids, positions)
    verdict = judge(ours, eager, run_whole(parts, _run_wide, ids, positions))
    pieces = list(served.pieces.values())
    return Demo(f"tiny-{model.removeprefix('tiny-')}", tokens, pieces, verdict.ratio, verdict.ok)


class _Serving:
    """Backends of a model's pieces, called in order."""

    def __init__(self, parts: Whole, tokens: int) -> None:
        gpu = HERE.type == "cuda"
        pool = torch.cuda.graph_pool_handle() if gpu else None
        sizes = {"capture_sizes" if gpu else "compile_sizes": [tokens]}
        pieces, total = parts.pieces.values(), len(parts.pieces)
        self.compiled = {p.index: CompiledPiece(p.graph) for p in pieces}
        self.backends = {
            p.index: backend(p, total, pool=pool, compiled=self.compiled[p.index], **sizes) for p in pieces
        }
        self.tokens = tokens
        self.pieces: dict[int, Served] = {}

    def run(self, piece: Piece, args: list[Any]) -> Any:
        return self.backends[piece.index](*args)

    def run_and_compare(self, piece: Piece, args: list[Any]) -> Any:
        with _Ops() as ops:
            eager = wide.run_eager(piece.graph, args)
        oracle = wide.run_wide(piece.graph, args)
        result = self.run(piece, args)
        served = Served(f"{piece.index} {piece.kind}", ops.count)
        for ours, theirs, exact in zip(pytree.tree_leaves(result), eager.outputs, oracle.outputs, strict=True):
            if oracle.unfilled(exact) is None:
                verdict = judge(ours, theirs, exact)
                served.ratio, served.ok = max(served.ratio, verdict.ratio), served.ok and verdict.ok
        self._describe(piece, served)
        self.pieces[piece.index] = served
        return result

    def _describe(self, piece: Piece, served: Served) -> None:
        entry = self.backends[piece.index].entries[self.tokens]
        served.state = entry.state()
        compiled = self.compiled[piece.index]
        plans = [made.plan for (sizes, _), made in compiled.plans.items() if sizes == (self.tokens,)]
        if not plans or entry.fell_back or "graph it was" in compiled.summary():
            served.state, served.ok = "the graph it was", False
            return
        launches = plans[0].schedule.launches()
        served.kernels = sum(bool(k.family) for k in launches)
        served.foreign = len(launches) - served.kernels
        for kernel in launches:
            rows = Counter(_computes(group.members) for group in kernel.segments)
            computes = " | ".join(f"{count} × ({what})" if count > 1 else what for what, count in rows.items())
            served.launches.append((kernel.family or "itself", computes))
        refusals = plans[0].schedule.selected.fused.refusals
        served.refusals = [f"{r.producer} + {r.consumer}: {r.reason}" for r in refusals]


def _computes(members: Iterable[str]) -> str:
    """'mul ×4 + sub + cat' for mul_5, mul_6, sub_1, …: what is computed, not which."""
    names = Counter(re.sub(r"(_\d+)+(?=$|_total$)", "", name).lstrip("_") for name in members)
    return " + ".join(f"{name} ×{count}" if count > 1 else name for name, count in names.items())


class _Ops(TorchDispatchMode):
    """Counts what launches a kernel in eager mode."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        self.count += not (func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view")))
        return func(*args, **(kwargs or {}))


def _run_wide(piece: Piece, args: list[Any]) -> Any:
    outputs = wide.run_wide(piece.graph, args).outputs
    return outputs[0] if piece.kind == "last" else outputs


def show(console: Console, made: Demo, seconds: float) -> None:
    """The screen."""
    where = "CUDA graphs" if HERE.type == "cuda" else "interpreted on the CPU"
    console.print(f"[bold]terrazzo[/]: {made.model}, {made.tokens} tokens, bf16, served in pieces, kernels {where}\n")
    table = Table(title="pieces: kernels that eager launches, and ours", title_justify="left")
    for column in ("piece", "served by"):
        table.add_column(column)
    for column in ("eager", "terrazzo", "as themselves", "error (eager = 1)"):
        table.add_column(column, justify="right")
    table.add_column("")
    for p in made.pieces:
        counts = [str(p.ops), str(p.kernels), str(p.foreign), f"{p.ratio:.2f}"]
        table.add_row(p.name, p.state, *counts, _mark(p.ok))
    table.add_section()
    totals = [str(sum(getattr(p, name) for p in made.pieces)) for name in ("ops", "kernels", "foreign")]
    table.add_row("model", "", *totals, f"{made.ratio:.2f}", _mark(made.ok))
    console.print(table)
    middle = made.pieces[len(made.pieces) // 2]
    kernels = Table(title=f"what became one kernel, piece {middle.name}", title_justify="left")
    kernels.add_column("kernel", no_wrap=True)
    kernels.add_column("computes")
    for family, computes in middle.launches:
        kernels.add_row(family, computes)
    console.print(kernels)
    reasons = list(dict.fromkeys(middle.refusals))
    for reason in reasons[:SHOWN]:
        console.print(f"not fused: {reason}", highlight=False)
    if len(reasons) > SHOWN:
        console.print(f"… and {len(reasons) - SHOWN} more", highlight=False)
    console.print(f"An error up to 2 is right: see tools/oracle.py. {seconds:.0f} s.", highlight=False)


def _mark(ok: bool) -> str:
    return "[green]ok[/]" if ok else "[red]wrong[/]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="its tiny twin is served")
    parser.add_argument("--tokens", type=number, default=TOKENS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    started = time.perf_counter()
    made = demo(options.model, options.tokens)
    times: list[dict[str, Any]] = []
    if HERE.type == "cuda":
        from terrazzo.tools import bench

        times = bench.bench_piece(bench.middle(BENCHED[0]), BENCHED[1], bench.CONTENDERS)
    if options.json:
        print(json.dumps(asdict(made) | {"times": times}))
    else:
        console = screen()
        show(console, made, time.perf_counter() - started)
        if times:
            console.print(bench.table(times))
    wrong = not made.ok or not all(p.ok for p in made.pieces) or any(t["failures"] for t in times)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(exit_status(main))
