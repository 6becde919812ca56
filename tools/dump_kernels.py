"""What a piece becomes at a size: its kernels, what each holds, why there are not fewer, what they cost and compile to.

    python -m terrazzo.tools.dump_kernels --model llama-3.1-8b --piece 1 --size 16
    python -m terrazzo.tools.dump_kernels --load piece.json --size 1,2048 --target b200
    … --source | --stage fuse | --ops        the module; one stage's result; what runs as itself and why
    … --stats | --ptx | --sass               what the kernels compile to for the target's architecture (or --arch 90)
    … --range 1:16384                        instead of sizes: regimes, and the configs that launches look up by size
    … --json                                 all of it
    python -m terrazzo.tools.dump_kernels --all-models --size 1,2048 --arch 90     compile every kernel of every model

No device is needed. Exit status: 2 for a request that cannot be right (near misses are named), 1 when something does
not lower, does not compile or breaks a limit.
"""

from __future__ import annotations

import argparse
import difflib
import json
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from terrazzo.kernels.target import NAMED, Target
from terrazzo.lowering.emit import Plan
from terrazzo.lowering.errors import UserError
from terrazzo.lowering.options import Options
from terrazzo.lowering.pipeline import Journal
from terrazzo.tools import dump_range, dump_text
from terrazzo.tools.command import DTYPE, exit_status, parser_of, size_range, sizes, with_form
from terrazzo.tools.dump_compile import Stats, compile_launch, launches
from terrazzo.tools.dump_plan import STAGES, Dump, describe, label, make
from terrazzo.tools.models import DTYPES, Piece, load_piece, names, pieces

# The device planned for when only an architecture is given.
BY_ARCH = {80: "a100", 90: "h200", 100: "b200"}
# First, two equal middle ones, last: a piece of a deeper model is one of these.
LAYERS = 3
# A pieces' list without the middle one's twin.
DISTINCT_LAYERS = 2
# What stands for arguments that were not given.
DEFAULTS = {"piece": "1", "size": [16], "dtype": "bf16"}
# Arguments beside which others would mean nothing: those others, why, and what to do.
APART = (
    ("range", ("size", "source", "stage", "ops", "ptx", "sass", "kernel"),
     "it prints regimes and configs, and no module, stage, ops or code of one size", "Ask for these at a size."),
    ("all_models", ("range", "piece", "source", "stage", "ops", "ptx", "sass", "kernel"),
     "it compiles every kernel of every piece, and prints a line per piece and size", "Ask for these of one model."),
    ("stage", ("ops", "source", "stats", "ptx", "sass", "json"),
     "it prints a stage's result alone", "Ask for one after the other."),
    ("ops", ("source", "stats", "ptx", "sass"), "it lists ops and prints nothing else", "Ask for one after the other."),
    ("ptx", ("sass",), "one of the two is printed", "Ask for one after the other."),
    ("load", ("piece", "dtype"), "a file holds one piece, in dtypes of its own", "Save the piece you mean."),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    return exit_status(lambda: _answer(args))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("dump_kernels", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help=f"one of {', '.join(names())}, tiny-<name>, or a folder with a "
                      "config.json")  # fmt: skip
    what.add_argument("--load", metavar="FILE", help="a saved piece")
    what.add_argument("--all-models", action="store_true", help="compile every kernel of every model")
    parser.add_argument("--piece", help="index, or first, middle, last (default: 1)")
    parser.add_argument("--size", type=partial(sizes, least=0), help="tokens, comma-separated (default: 16)")
    parser.add_argument("--range", metavar="LO:HI", type=partial(size_range, least=0),
                        help="plans that serve every size of a range")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help=DTYPE)
    parser.add_argument("--target", help=f"device planned for: {', '.join(NAMED)} (default: h200)")
    parser.add_argument("--arch", type=int, choices=BY_ARCH, help="architecture instead of a device")
    parser.add_argument("--no-fuse", action="store_true", help="a plan without fusion; casts and the like are still "
                        "computed by whoever reads them, equal independent rows still share a launch")  # fmt: skip
    parser.add_argument("--source", action="store_true", help="print the generated module")
    parser.add_argument("--stage", help=f"print one stage's result: {', '.join(STAGES)}")
    parser.add_argument("--ops", action="store_true", help="list ops that run as themselves")
    parser.add_argument("--stats", action="store_true", help="compile: registers, spills, shared memory, seconds; "
                        "exit status 1 where a kernel spills or does not fit")  # fmt: skip
    parser.add_argument("--ptx", action="store_true", help="compile and print PTX; with --stats after the report")
    parser.add_argument("--sass", action="store_true", help="compile and print SASS; with --stats after the report")
    parser.add_argument("--kernel", help="with --ptx or --sass: only this kernel's code")
    parser.add_argument("--json", action="store_true", help="a list: an object per size, of --all-models per launch")
    return parser


def _answer(args: argparse.Namespace) -> int:
    """What was asked for, once it is known to make sense together."""
    for name, others, fact, remedy in APART:
        beside = [other for other in others if _given(args, other)] if _given(args, name) else []
        if beside:
            both = f"--{name} with {', '.join(f'--{other}' for other in beside)}".replace("_", "-")
            raise UserError(both, fact, stage="tools.dump_kernels", remedy=remedy)
    if args.kernel is not None and not (args.ptx or args.sass):
        raise UserError(f"--kernel {args.kernel}", "it chooses whose code is printed, and no code was asked for",
                        stage="tools.dump_kernels", remedy="Add --ptx or --sass.")  # fmt: skip
    for name, usual in DEFAULTS.items():
        if not _given(args, name):
            setattr(args, name, usual)
    if not args.load and 0 in (args.range or args.size):
        option = "--range from 0" if args.range else "--size 0"
        raise UserError(option, "a model has one token at least", stage="tools.dump_kernels")
    return _all_models(args) if args.all_models else _one_piece(args)


def _given(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name) not in (None, False)


def _one_piece(args: argparse.Namespace) -> int:
    if args.stage:
        _known("stage", args.stage, STAGES)
    options = _options(args)
    piece, origin = _piece(args)
    if args.range:
        return _ranged(piece, args, options)
    dumped, wrong = [], False
    for size in args.size:
        title = f"{label(piece)}, size {size}. Regenerate: {_command(origin, size, options)}"
        dump, plan = _dump(piece, size, options, title)
        stats = _compile(plan, options.target, args)
        wrong = wrong or any(s.wrong for s in stats)
        dumped.append(dump.to_json() | ({"compiled": [asdict(s) for s in stats]} if stats else {}))
        if not args.json:
            _print(dump, stats, args)
    if args.json:
        print(json.dumps(dumped, indent=1))
    return int(wrong)


def _ranged(piece: Piece, args: argparse.Namespace, options: Options) -> int:
    """A range of sizes instead of single ones."""
    dump = dump_range.describe(piece, args.range[0], args.range[1], options, compiled=args.stats)
    if args.json:
        print(json.dumps([dump.to_json()], indent=1))
    else:
        dump_text.console().print(dump_range.screen(dump))
    return int(any(s.wrong for s in dump.compiled))


def _options(args: argparse.Namespace) -> Options:
    """The target by name, by architecture, or the default."""
    name = args.target or BY_ARCH.get(args.arch, "h200")
    _known("target", name.lower(), list(NAMED))
    target = Target.named(name)
    if args.arch and args.arch != target.arch:
        raise UserError(
            f"--arch {args.arch}",
            f"{target.name} is sm_{target.arch}, and a plan is made for one architecture",
            stage="tools.dump_kernels",
            remedy="Give one of the two.",
        )
    return Options(target, fuse=not args.no_fuse, steady=True)


def _piece(args: argparse.Namespace) -> tuple[Piece, str]:
    """The piece, and the arguments that name it."""
    if args.load:
        # The CPU stands for the device: plans do not depend on it, and fake CUDA tensors need a CUDA build of torch.
        try:
            return load_piece(args.load, "cpu"), f"--load {shlex.quote(args.load)}"
        except OSError as cause:
            raise UserError(f"piece {args.load}", str(cause), stage="tools.dump_kernels") from cause
    found = pieces(args.model, dtype=DTYPES[args.dtype], layers=LAYERS)
    by_name = {str(p.index): p for p in found} | {p.kind: p for p in reversed(found)}
    piece = by_name[_known("piece", args.piece, list(by_name))]
    dtype = "" if args.dtype == "bf16" else f" --dtype {args.dtype}"
    return piece, f"--model {shlex.quote(args.model)} --piece {piece.index}{dtype}"


def _known(kind: str, name: str, known: Sequence[str]) -> str:
    if name in known:
        return name
    close = [] if name.isdecimal() else difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    near = close or list(known)
    fact = f"there is no {kind} of that name"
    raise UserError(f"{kind} {name!r}", fact, stage="tools.dump_kernels", remedy=f"Did you mean {', '.join(near)}?")


def _command(origin: str, size: int, options: Options) -> str:
    fuse = "" if options.fuse else " --no-fuse"
    return f"python -m terrazzo.tools.dump_kernels {origin} --size {size} --target {options.target.name}{fuse} --source"


def _dump(piece: Piece, size: int, options: Options, title: str) -> tuple[Dump, Plan]:
    """Plan and describe; a failure says which stages passed before it."""
    journal = Journal()
    try:
        plan, retraced = make(piece, size, options, title, journal)
    except Exception:
        passed = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, _, seconds in journal.stages) or "none"
        print(f"{label(piece)}, size {size}: stages passed: {passed}", file=sys.stderr)
        raise
    return describe(piece, size, options, plan, retraced, journal), plan


def _compile(plan: Plan, target: Target, args: argparse.Namespace) -> list[Stats]:
    """What the command line asks to have compiled."""
    if not (args.stats or args.ptx or args.sass):
        return []
    made = launches(plan, target)
    if args.kernel:
        _known("kernel", args.kernel, [launch.kernel for launch in made])
        # Its code alone does not need the others.
        made = made if args.stats else [launch for launch in made if launch.kernel == args.kernel]
    code = "sass" if args.sass else "ptx" if args.ptx else ""
    known: dict[Any, Any] = {}
    compiled = [compile_launch(launch, target.arch, code, known) for launch in made]
    return [replace(s, code=s.code if args.kernel in (None, s.kernel) else "") for s in compiled]


def _print(dump: Dump, stats: Sequence[Stats], args: argparse.Namespace) -> None:
    console = dump_text.console()
    code = "".join(f"// {s.kernel} sm_{dump.target.arch}\n{s.code}\n" for s in stats if s.code)
    if args.stage:
        print(next(text for name, _, text in dump.stages if name == args.stage))
    elif args.ops:
        console.print(dump_text.ops(dump))
    else:
        if args.stats or not (args.source or code):
            console.print(dump_text.screen(dump, stats))
        if args.source:
            print(dump.source, end="")
    print(code, end="")


def _all_models(args: argparse.Namespace) -> int:
    """Every distinct piece of every model at every size, compiled; one process per core, a model at a time."""
    options = _options(args)
    models = with_form(names(), args.dtype, named=False)
    workers = min(len(os.sched_getaffinity(0)), len(models))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_whole_model, name, args.size, options, args.dtype) for name in models]
        rows = [row for future in futures for row in _told(future.result(), args.json)]
    bad = [row for row in rows if row["wrong"]]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{len(rows)} launches for sm_{options.target.arch}, {len(bad)} wrong")
    return int(bool(bad))


def _told(rows: list[dict[str, Any]], quiet: bool) -> list[dict[str, Any]]:
    """The rows, after one line per plan and per row that is wrong."""
    if quiet:
        return rows
    for place in dict.fromkeys((row["piece"], row["size"]) for row in rows):
        mine = [row for row in rows if (row["piece"], row["size"]) == place]
        most = [max(row[column] for row in mine) for column in ("registers", "spills_bytes", "shared_bytes")]
        seconds = sum(row["seconds"] for row in mine)
        limits = f"at most {most[0]} registers, {most[1]} bytes of local and {most[2]} of shared memory"
        print(f"{place[0]} size {place[1]}: {len(mine)} launches, {limits}; {seconds:.1f} s", flush=True)
        for row in mine:
            if row["wrong"]:
                print(f"  {row['kernel']} ({row['family']}): {row['wrong']}", flush=True)
    return rows


def _whole_model(name: str, sizes: Iterable[int], options: Options, dtype: str) -> list[dict[str, Any]]:
    """One row per launch of a model; a plan that cannot be made or run without memory is one row as well."""
    rows: list[dict[str, Any]] = []
    known: dict[Any, Any] = {}
    for piece in pieces(name, dtype=DTYPES[dtype], layers=DISTINCT_LAYERS):
        for size in sizes:
            place = {"piece": label(piece), "size": size}
            try:
                plan, _ = make(piece, size, options, label(piece), Journal())
                made = launches(plan, options.target)
            except Exception as error:  # whatever fails is this plan's row
                failed = Stats("plan", (0, 0, 0), wrong=f"{type(error).__name__}: {error}")
                rows.append(place | {"family": "", "config": ""} | asdict(failed))
                continue
            chosen = {k.name: k for k in plan.schedule.launches()}
            for launch in made:
                kernel = chosen[launch.kernel]
                what = {"family": kernel.family, "config": str(kernel.config)}
                rows.append(place | what | asdict(compile_launch(launch, options.target.arch, known=known)))
    return rows


if __name__ == "__main__":
    sys.exit(main())
