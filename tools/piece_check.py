"""Everything that must hold of a compiled piece at one size, found out by running it.

values      every output and every changed input against eager and fp64 (oracle.py, wide.py)
geometry    shape, dtype, strides of dimensions larger than 1, device
memory      outputs share storage with each other and with inputs exactly as eager's do; no input changes that
            eager leaves alone; nothing is read that was not written (fresh memory is filled with NaN)
again       a second run gives the same bits
graph       on CUDA: captured and replayed, the same bits; replayed on other inputs, right again
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools import wide
from terrazzo.tools.models.fakes import TensorSpec, symbols_of
from terrazzo.tools.models.piece import Piece
from terrazzo.tools.oracle import judge

Runner = Callable[..., Any]


@dataclass
class Result:
    """One piece at one size.

    Args:
        kernels, foreign: launches of ours, ops that run as themselves.
        ratio: the largest of the outputs' (see `oracle.Verdict`): right up to 2.
        undecided: rows left out because a router may choose either way.
        failures: what does not hold; empty when all is right.
    """

    model: str
    piece: str
    size: int
    kernels: int = 0
    foreign: int = 0
    ratio: float = 0.0
    undecided: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures


def check_sizes(
    piece: Piece, sizes: Sequence[int], device: torch.device, span: tuple[int, int] | None = None
) -> list[Result]:
    """Compiles a piece and checks it at each of these numbers of tokens.

    Args:
        piece: what to check.
        sizes: numbers of tokens.
        device: where its inputs are made.
        span: plans for this range of sizes serve those in it, and planning at a call is a failure.
    """
    results = []
    ranged = CompiledPiece(piece.graph, steady=True)
    regimes = ranged.ranged(*span) if span is not None else ()
    for size in sizes:
        inside = any(r.lo <= size <= r.hi for r in regimes)
        planned = len(ranged.plans)
        # Equal pieces share trace and plans; that one size cannot be compiled must not colour the next.
        compiled = ranged if inside else CompiledPiece(piece.graph, steady=True)
        results.append(check_piece(piece, compiled, size, device))
        if inside and len(ranged.plans) > planned:
            why = "; ".join(r.why for r in regimes if r.why)
            results[-1].failures.append(f"the range did not serve it: planned at its call ({why})")
        if device.type == "cuda":
            # Several processes may share the device.
            torch.cuda.empty_cache()
    return results


def bounds(piece: Piece, span: tuple[int, int] | None) -> list[int]:
    """The smallest, second and largest size of every regime of a range, and one inside."""
    found: set[int] = set()
    for regime in CompiledPiece(piece.graph, steady=True).ranged(*span) if span is not None else ():
        found |= {regime.lo, min(regime.lo + 1, regime.hi), (regime.lo + regime.hi) // 2, regime.hi}
    return sorted(found)


def check_piece(piece: Piece, compiled: CompiledPiece, size: int, device: torch.device) -> Result:
    """Runs and compares.

    Args:
        piece: what to check.
        compiled: the same, compiled.
        size: number of tokens.
        device: where its inputs are made.
    """
    result = Result(piece.model, piece.kind, size)
    try:
        with torch.no_grad():
            _Check(piece, compiled, size, device, result).all()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        result.failures.append(f"{type(error).__name__} at {where}: {str(error)[:2000]}")
    return result


@dataclass
class _Check:
    piece: Piece
    compiled: CompiledPiece
    size: int
    device: torch.device
    result: Result

    def __post_init__(self) -> None:
        specs = self.piece.specs()
        self.varying = [isinstance(s, TensorSpec) and any(map(symbols_of, (*s.shape, *s.stride))) for s in specs]

    def all(self) -> None:
        args = self.piece.make_inputs(self.size, self.device)
        kept = [_bits(a) if isinstance(a, torch.Tensor) and not v else None for a, v in self._pairs(args)]
        eager, oracle = self._references(args)
        with poisoned():
            run = self.compiled.at(args)
            first = self._run(run, args)
        self._count()
        self._compare("", first, eager, oracle, args)
        for at, before in enumerate(kept):
            if before is not None and before != _bits(args[at]):
                self._fail(f"input {at} has changed")
        del oracle
        self._same("a second run", self._run(run, args), first)
        if self.device.type == "cuda":
            self._graph(run, args, first)

    def _graph(self, run: Runner, args: list[Any], first: wide.Outcome) -> None:
        """Captured: the same again, and right on other inputs."""
        static = self._copies(args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = tuple(pytree.tree_leaves(run(*static)))
        self._fill(static, args)
        graph.replay()
        captured = wide.Outcome(outputs, tuple(static))
        self._same("a replay", captured, first)
        other = [a if not v else _other(b) for (a, v), b in zip(self._pairs(args), self._others(), strict=True)]
        eager, oracle = self._references(other)
        self._fill(static, other)
        graph.replay()
        self._compare("replay on other inputs: ", captured, eager, oracle, other, geometry=False)

    def _references(self, args: list[Any]) -> tuple[wide.Outcome, wide.Outcome]:
        return wide.run_eager(self.piece.graph, self._copies(args)), wide.run_wide(self.piece.graph, args)

    def _run(self, run: Runner, args: list[Any]) -> wide.Outcome:
        own = self._copies(args)
        return wide.Outcome(tuple(pytree.tree_leaves(run(*own))), tuple(own))

    def _pairs(self, args: Sequence[Any]) -> Iterator[tuple[Any, bool]]:
        return zip(args, self.varying, strict=True)

    def _copies(self, args: list[Any]) -> list[Any]:
        """The arguments with those that depend on the size copied: weights are too large to copy for every run."""
        return [_copy(a) if v else a for a, v in self._pairs(args)]

    def _fill(self, static: list[Any], args: list[Any]) -> None:
        for at, (value, varies) in enumerate(self._pairs(args)):
            if varies:
                static[at].copy_(value)

    def _others(self) -> list[Any]:
        return self.piece.make_inputs(self.size, self.device, seed=1)

    def _count(self) -> None:
        plan = self.compiled.serving(self.size)
        if plan is None or "graph it was" in self.compiled.summary():
            why = getattr(self.compiled, "refusal", "")
            self._fail("not compiled: it runs as the graph it was" + (f": {why}" if why else ""))
            return
        launches = plan.schedule.launches()
        self.result.kernels = sum(bool(k.family) for k in launches)
        self.result.foreign = len(launches) - self.result.kernels

    def _compare(
        self, what: str, ours: wide.Outcome, eager: wide.Outcome, oracle: wide.Outcome, args: list[Any],
        geometry: bool = True,
    ) -> None:  # fmt: skip
        if len(ours.outputs) != len(eager.outputs):
            self._fail(f"{what}{len(ours.outputs)} outputs, eager has {len(eager.outputs)}")
            return
        rows = wide.undecided(eager, oracle)
        self.result.undecided = max(self.result.undecided, 0 if rows is None else int(rows.sum()))
        for at, (x, y, exact) in enumerate(zip(ours.outputs, eager.outputs, oracle.outputs, strict=True)):
            if not isinstance(y, torch.Tensor):
                if x != y:
                    self._fail(f"{what}output {at}: {x!r}, eager has {y!r}")
                continue
            if geometry and _geometry(x) != _geometry(y):
                self._fail(f"{what}output {at}: {_geometry(x)}, eager has {_geometry(y)}")
                continue
            self._judge(f"{what}output {at}", x, y, exact, rows, oracle.unfilled(exact))
        for at, (x, y, exact) in enumerate(zip(ours.inputs, eager.inputs, oracle.inputs, strict=True)):
            if not isinstance(x, torch.Tensor) or not self.varying[at]:
                continue
            if not torch.equal(_raw(y), _raw(args[at])):
                self._judge(f"{what}changed input {at}", x, y, exact, rows, None)
            elif not torch.equal(_raw(x), _raw(args[at])):
                self._fail(f"{what}input {at} has changed, eager leaves it alone")
        mine, theirs = sharing(ours), sharing(eager)
        if geometry and mine != theirs:
            self._fail(f"{what}memory shared by outputs: {mine}, eager: {theirs}")

    def _judge(
        self, what: str, x: torch.Tensor, y: torch.Tensor, exact: torch.Tensor, rows: torch.Tensor | None,
        unfilled: torch.Tensor | None,
    ) -> None:  # fmt: skip
        if rows is not None and exact.dim() and exact.shape[0] == rows.numel():
            x, y, exact = x[~rows], y[~rows], exact[~rows]
            unfilled = None if unfilled is None else unfilled[~rows]
        if unfilled is not None:
            x, y, exact = x[~unfilled], y[~unfilled], exact[~unfilled]
        verdict = judge(x, y, exact)
        self.result.ratio = max(self.result.ratio, verdict.ratio)
        if not verdict.ok:
            self._fail(f"{what}: {verdict}")

    def _same(self, what: str, now: wide.Outcome, before: wide.Outcome) -> None:
        """Equal bits, memory that nothing writes excepted: it held NaN in the first run."""
        for at, (x, y) in enumerate(zip(now.outputs, before.outputs, strict=True)):
            if isinstance(x, torch.Tensor) and not torch.equal(_raw(x), _raw(y)):
                differ = _raw(x) != _raw(y)
                if x.is_floating_point():
                    differ &= ~y.isnan().view_as(differ)
                if differ.any():
                    self._fail(f"{what} differs in {int(differ.sum())} of {x.numel()} elements of output {at}")

    def _fail(self, what: str) -> None:
        self.result.failures.append(what)


def sharing(outcome: wide.Outcome) -> list[str]:
    """For each output whose memory belongs to an input or to an earlier output: which, and how many bytes further."""
    known: dict[int, tuple[str, int]] = {}
    lines = []
    named = [(f"input {i}", t) for i, t in enumerate(outcome.inputs)]
    named += [(f"output {i}", t) for i, t in enumerate(outcome.outputs)]
    for name, tensor in named:
        if not isinstance(tensor, torch.Tensor) or not tensor.numel():
            continue
        storage = tensor.untyped_storage().data_ptr()
        if storage not in known:
            known[storage] = name, tensor.data_ptr()
        elif name.startswith("output"):
            owner, start = known[storage]
            lines.append(f"{name} is {owner} + {tensor.data_ptr() - start}")
    return lines


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory fresh from the allocator holds NaN (integers: their largest value)."""
    before = torch.get_deterministic_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_deterministic_debug_mode("warn")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)


def _geometry(x: torch.Tensor) -> tuple[Any, ...]:
    strides = tuple(st for st, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel())
    return tuple(x.shape), strides, str(x.dtype), str(x.device)


def _copy(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _other(x: torch.Tensor) -> torch.Tensor:
    """Other values in the same range: what counts up, such as positions, is the same for every seed."""
    return x.flip(0) if not x.is_floating_point() else x


def _raw(x: torch.Tensor) -> torch.Tensor:
    """The bits, as integers: NaN equals itself, -0 is not 0."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(whole[x.dtype.itemsize])


def _bits(x: torch.Tensor) -> int:
    """A sum over the bits, which a change would change: enough to notice that a weight was written to."""
    return int(_raw(x).sum(dtype=torch.int64).item())
