"""Tune the GEMMs of a model's middle piece where they run: a config is put into the plan, and the whole piece is timed.

    python -m terrazzo.tools.tune_piece --models llama-3.1-8b --sizes 8,16,32,64,128
    python -m terrazzo.tools.tune_piece --models qwen3-8b --sizes 64 --dtype fp8 --budget-s 60 --json out.jsonl

What a GEMM costs depends on its neighbours: with programmatic dependent launch it starts while the kernel before it
ends, so configs timed alone (`tune_gemm.py`) do not tell. One launch after the other, heaviest first, takes the config
with which the piece is fastest; twice more among each launch's best, as long as there is time. The piece as it is
planned runs in turn with every candidate, and ratios are to that. A config that changes the piece's result by more than
its dtype explains is reported and never timed.
The last lines are rows for a family's table, with what each launch then adds to the piece. A row serves the sizes below
its own, down to the next: tune at the buckets of the table.

Exit status: 0; 1 when a config was wrong; 2 for a request that cannot be right, and without a GPU.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch

import terrazzo.tools.device as place  # before Triton is imported, whose interpreter it may choose
from terrazzo.kernels import gemm_persistent, gemm_stream, gemm_vendor
from terrazzo.kernels.gemm import GemmProblem, table_columns
from terrazzo.kernels.gemm_boxes import takes_extra, together
from terrazzo.kernels.target import Target
from terrazzo.kernels.together import compiling_together
from terrazzo.runtime import compilers
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools.bench import middle
from terrazzo.tools.command import DTYPE, exit_status, parser_of, sizes, with_form, writable
from terrazzo.tools.measure import chain, floor_us, interleaved_us, kernel_times, layers_of
from terrazzo.tools.models import Piece
from terrazzo.tools.piece_check import poisoned
from terrazzo.tools.tune_gemm import as_planned, persistent_space

# Rounds over all launches, and how many of a launch's candidates each takes: all, then the best so far.
ROUNDS = (None, 8, 4)
REPLAYS = (5, 11, 21)
# Largest change of a result, relative to its RMS, that another order of sums explains in 16 bits; in eight, where it
# moves what is quantised next across a tie, to a neighbour that is a sixteenth of it apart.
CHANGE, CHANGE_OF_EIGHT = 2e-2, 5e-2
# Tokens for which streaming products are tried, beside the other families from 129 on.
MOST_BESIDE = 384
# Dtypes whose products have kernels to choose among.
TUNED = ("bf16", "fp16", "fp8")


@dataclass
class Launch:
    """A GEMM of the plan.

    Args:
        variable: its name in the plan's module.
        planned: what the plan has there.
        args: of its call, as the first layer makes it.
        candidates: prepared launches by config, of one family or another.
        ratios: of the piece with each to the piece as planned.
    """

    variable: str
    planned: Any
    args: tuple[Any, ...]
    candidates: dict[Any, Any] = field(default_factory=dict)
    ratios: dict[Any, float] = field(default_factory=dict)

    @property
    def problem(self) -> GemmProblem:
        return self.planned.problem


def beside(m: int) -> list[tuple[int, int]]:
    """Tokens of a tile, and those beside them, where one, two or three such tiles hold so many with few to spare."""
    sides = [(side, extra) for side in (64, 128) for extra in (0, 8, 16, 32, 64) if extra < side]
    sides.append((256, 0))
    found = []
    for tiles in (1, 2, 3) if m > 128 else (1,):
        needed = -(-m // tiles)
        fitting = [side for side in sides if needed <= sum(side) <= 1.3 * needed]
        found += [min(fitting, key=sum)] if fitting else []
    return [side for side in dict.fromkeys(found) if m > 128 or side[1]]


def stream_space(problem: GemmProblem, target: Target) -> Iterator[gemm_stream.Config]:
    """Tiles of either orientation, as deep in bytes whatever the dtype, rings for one and two programs a
    multiprocessor."""
    whole, accs = max(8, 1 << (problem.m - 1).bit_length()), problem.accumulators
    wider = 2 // problem.dtype.itemsize
    if problem.m <= 32:
        shapes = [(whole, 64, False, k, s, 0) for k in (64, 128) for s in (1, 2, 4)]
        shapes += [(64, n, True, k, s, 0) for n in (32, 64) for k in (64, 128, 256) for s in (1, 2)]
    else:
        tiles = [min(whole, 128), 64] if problem.m <= 128 else []
        shapes = [(m, n, False, k, s, 0) for m in tiles for n in (64, 128) for k in (64, 128) for s in (1, 2)]
        shapes += [(m, n, True, k, s, 0) for m in tiles for n in (32, 64, 128) for k in (64, 128) for s in (1, 2)]
        shapes += [(128, 128, first, 64, s, 0) for first in (False, True) for s in (3, 4, 6) if 64 < problem.m <= 128]
        widths = (32, 64, 128) if problem.paired else (64, 128)
        for m, extra in beside(problem.m):
            shapes += [(m, n, False, k, s, extra) for n in widths for k in (64, 128) for s in (1, 2, 3, 4, 6)]
    shapes = [(m, max(n, problem.summed), first, k, split, extra) for m, n, first, k, split, extra in shapes]
    for shape, warps, resident in itertools.product(dict.fromkeys(shapes), (4, 8), (1, 2)):
        m, n, tokens_first, k, split, extra = shape
        tiles_of_w = -(-problem.n // n) * -(-problem.m // (m + extra))
        programs = tiles_of_w * split
        sums_per_thread = (m + extra) * n * accs / (32 * warps)
        base = gemm_stream.Config(m, n, k * wider, 1, warps, split, tokens_first, extra)
        rows = m if tokens_first else 2 * n if together(problem, base) else n
        one = gemm_stream.smem_bytes(problem, base) - 1024
        stages = min(8, (target.smem_bytes // resident - 2048) // one)
        tiles_at_once = (stages - 1) * max(1, min(resident, programs / target.sm_count))
        in_flight = n * base.block_k * accs * problem.dtype.itemsize * tiles_at_once
        # Programs that all find a multiprocessor of their own need not share one.
        alone = programs <= target.sm_count
        if resident == 2 and alone or resident == 1 and not alone and warps == 4 and problem.m > 64:
            continue
        fits = 0.4 <= programs / target.sm_count <= 6 and (split == 1 or tiles_of_w <= 100)
        holds = sums_per_thread <= 160 and (warps == 4 or (rows >= 128 and sums_per_thread >= 32))
        if fits and holds and takes_extra(problem, base) and stages >= 2 and in_flight >= 24_000:
            yield replace(base, stages=stages)


def space(problem: GemmProblem, target: Target) -> Iterator[tuple[Any, Any]]:
    """Families and configs that a problem is tuned over."""
    if problem.m <= MOST_BESIDE and gemm_stream.supports(replace(problem, m=1)) is None:
        yield from ((gemm_stream, config) for config in dict.fromkeys(stream_space(problem, target)))
    if gemm_persistent.supports(problem) is not None:
        return
    for config in as_planned(problem, persistent_space(problem), target):
        if gemm_persistent.smem_bytes(problem, config) <= target.smem_bytes:
            yield gemm_persistent, config
    if gemm_vendor.supports(problem) is None:
        yield gemm_vendor, gemm_vendor.Config()


class Tuning:
    """A piece at one size: its plan's GEMMs, exchanged one by one."""

    def __init__(self, piece: Piece, size: int) -> None:
        self.piece, self.size = piece, size
        compiled = CompiledPiece(piece.graph, steady=True)
        self.layers = layers_of(piece, size, place.HERE)
        self.run = compiled.at(self.layers[0])
        (self.loaded,) = [made for (sizes, _), made in compiled.plans.items() if sizes == (size,)]
        self.module = self.loaded.call.__globals__
        self.launches = self._found()
        with poisoned():
            self.expected = [_copied(value) for value in self.run(*self.layers[0])]
        self.planned = chain(self.run, self.layers)
        eight = any(launch.problem.dtype.itemsize == 1 for launch in self.launches)
        self.explained = CHANGE_OF_EIGHT if eight else CHANGE
        self.wrong: list[str] = []

    def _found(self) -> list[Launch]:
        families = (gemm_stream.StreamGemm, gemm_persistent.PersistentGemm, gemm_vendor.VendorGemm)
        names = [n for n, value in self.module.items() if n.startswith("launch_") and isinstance(value, families)]
        # A preparation may have several names: each of its calls is a launch of its own.
        with _noting(self.module, names) as noted:
            self.run(*self.layers[0])
        found = [Launch(name, self.module[name], noted[name]) for name in names]
        return sorted(found, key=lambda launch: -launch.problem.weight_bytes)

    def prepare(self) -> None:
        """Every candidate of every launch, compiled side by side."""
        target = Target.current()
        with compiling_together(compilers.asked()):
            for launch in self.launches:
                for family, config in space(launch.problem, target):
                    how: dict[str, Any] = {"pdl": True}
                    if isinstance(launch.planned, gemm_stream.StreamGemm):
                        if family is gemm_stream:
                            how |= {name: getattr(launch.planned, name) for name in ("leads", "parts", "loads")}
                        elif launch.planned.loads is not None:
                            # The others' epilogues read for themselves.
                            continue
                    made = launch.candidates[config] = family.prepare(
                        launch.planned.epilogue, config, launch.problem, **how
                    )
                    made(*launch.args)

    def ratio(self, replays: int) -> float:
        """Time of the piece as it is now over that of the piece as planned, medians of replays in turn."""
        graphs = {"planned": self.planned, "now": chain(self.run, self.layers)}
        us = interleaved_us(graphs, len(self.layers), replays)
        return us["now"] / us["planned"]

    def tune(self, launch: Launch, configs: Iterable[Any], replays: int, check: bool, deadline: float) -> None:
        """The launch takes the config of these with which the piece is fastest, if faster than with its present one."""
        best, taken = self.ratio(replays), self.module[launch.variable]
        for config in configs:
            if time.monotonic() > deadline:
                break
            self.module[launch.variable] = launch.candidates[config]
            if check and (change := self._change()) is not None:
                self.wrong.append(f"{launch.variable} {config}: {change:.3g}")
                continue
            launch.ratios[config] = ratio = self.ratio(replays)
            if ratio < best:
                best, taken = ratio, launch.candidates[config]
        self.module[launch.variable] = taken

    def _change(self) -> float | None:
        """By how much the piece's result differs from the planned one's; None where rounding explains it."""
        for ours, theirs in zip(self.run(*self.layers[0]), self.expected, strict=True):
            if isinstance(ours, torch.Tensor) and ours.is_floating_point():
                # NaN is left where the piece fills nothing.
                filled = ~theirs.isnan()
                ours, theirs = ours[filled].double(), theirs[filled].double()
                relative = ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()
                if ours.numel() and not relative < self.explained:
                    return relative
        return None

    def rows(self) -> list[str]:
        """The configs as rows of their families' tables, with what each launch adds to the piece."""
        timed = kernel_times(chain(self.run, self.layers), len(self.layers), self.loaded)
        times = {k.launch.partition(":")[0].lstrip("_"): k.adds_us for k in timed}
        found = []
        for launch in self.launches:
            problem, config = launch.problem, self.module[launch.variable].config
            numbers = " ".join(str(int(getattr(config, name))) for name in table_columns(config))
            us = times.get(launch.variable.removeprefix("launch_"), float("nan"))
            row = f"{problem.n} {problem.k} {problem.kind} {self.size} {numbers} {us:.1f}"
            found.append((type(config).__module__, row))
        # A family's name, then its rows.
        return [line for table in dict(found) for line in (f"# {table}", *(row for t, row in found if t == table))]


@contextmanager
def _noting(module: dict[str, Any], names: Sequence[str]) -> Iterator[dict[str, tuple[Any, ...]]]:
    """Inside, the arguments of these launches' first calls are kept."""
    noted: dict[str, tuple[Any, ...]] = {}
    planned = {name: module[name] for name in names}

    def keeping(name: str) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            noted.setdefault(name, args)
            planned[name](*args)

        return launch

    module.update({name: keeping(name) for name in names})
    try:
        yield noted
    finally:
        module.update(planned)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def tune_size(piece: Piece, size: int, seconds: float, write: Callable[[dict[str, Any]], None]) -> Tuning:
    """Tunes every GEMM of a piece at a size, for so long once all is compiled; a line to `write` per candidate and
    round."""
    tuning = Tuning(piece, size)
    tuning.prepare()
    deadline = time.monotonic() + seconds
    for number, (kept, replays) in enumerate(zip(ROUNDS, REPLAYS, strict=True)):
        for launch in tuning.launches:
            known = sorted(launch.ratios, key=lambda config: launch.ratios[config])
            configs = list(launch.candidates) if kept is None else known[:kept]
            tuning.tune(launch, configs, replays, number == 0, deadline)
            for config, ratio in launch.ratios.items():
                place = {"model": piece.model, "size": size, "round": number, "launch": launch.variable}
                shape = {"n": launch.problem.n, "k": launch.problem.k, "kind": launch.problem.kind}
                write({**place, **shape, "config": astuple(config), "ratio": round(ratio, 4)})
        if time.monotonic() > deadline:
            break
    return tuning


def main() -> int:
    parser = parser_of("tune_piece", __doc__)
    parser.add_argument("--models", default="llama-3.1-8b,llama-3.2-1b",
                        help="names or folders, comma-separated (default: %(default)s)")  # fmt: skip
    parser.add_argument("--dtype", choices=TUNED, default="bf16", help=DTYPE)
    parser.add_argument("--sizes", default="8,16,32,64,128", type=sizes,
                        help="numbers of tokens, comma-separated (default: %(default)s)")  # fmt: skip
    parser.add_argument("--budget-s", type=float, default=600,
                        help="seconds of timing in all, shared evenly (default: %(default)s)")  # fmt: skip
    parser.add_argument("--json", help="a file that gets every measurement, a JSON object a line")
    options = parser.parse_args()
    writable(options.json, screen=False)
    place.timing()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    models = with_form(options.models.split(","), options.dtype, named=True)
    # Until this program ends.
    compilers.open_for(main)
    work = [(model, size) for model in models for size in options.sizes]
    share, wrong = options.budget_s / len(work), []
    with open(options.json or os.devnull, "a") as journal, torch.no_grad():

        def write(line: dict[str, Any]) -> None:
            journal.write(json.dumps(line) + "\n")
            journal.flush()

        for model, size in work:
            piece = middle(model, dtype=options.dtype)
            tuning = tune_size(piece, size, share, write)
            wrong += tuning.wrong
            floor, ratio = floor_us(piece, size, Target.current()), tuning.ratio(REPLAYS[-1])
            timed = sum(len(launch.ratios) for launch in tuning.launches)
            tried = f"{timed} of {sum(len(launch.candidates) for launch in tuning.launches)} candidates timed"
            print(f"{model} at {size}: {ratio:.4f} of the time as planned; floor {floor:.1f} us; {tried}", flush=True)
            print("\n".join(tuning.rows()), flush=True)
    for line in wrong[:20]:
        print(f"wrong: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(exit_status(main))
