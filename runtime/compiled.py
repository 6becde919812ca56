"""A piece, compiled on demand for the sizes it is called with.

    piece = CompiledPiece(graph)          # traced at its first call, once for all sizes
    run = piece.at(args)                  # the plan for the sizes in args, made at their first use
    out = run(*args)

    piece.ranged(1, 16384)              # or: plans for all these sizes, made and compiled now; `at` only looks them up

Pieces that are equal but for their names share trace and plans within the process. What cannot be lowered at all
runs as the graph it was, with one warning; what cannot be lowered in part runs those ops as themselves, counted in
`summary()`. So does a single call in which an input that the piece writes overlaps another.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import triton
from torch import fx

from ..kernels.target import Target
from ..kernels.together import compiling_together
from ..lowering.emit import Plan
from ..lowering.errors import Unsupported, UserError, forget_frames
from ..lowering.intake import Examples, held
from ..lowering.options import Options
from ..lowering.ranged import Regime
from .arguments import Arguments
from .bound import apart, at_start, on_device, structured
from .cache import Shelf
from .compilers import asked
from .fingerprint import fingerprint
from .lowered import Loaded, Lowered, Runner
from .making import making
from .memory import copied, misaligned
from .warm import Warming, warm

log = logging.getLogger("terrazzo")

# What a kernel that does not compile raises.
UNCOMPILED = (triton.CompilationError, triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError)


# Smallest and largest size, and inputs that are not aligned.
_Range = tuple[int, int, tuple[int, ...]]


@dataclass(frozen=True)
class _Regimes:
    """A range, ready to run: the largest size of each regime, what runs there (None: nothing yet), and what it is."""

    bounds: list[int]
    runs: list[Runner | None]
    regimes: tuple[Regime, ...]


# While a piece of them lives.
_SHARED: MutableMapping[tuple[str, Options], Lowered] = WeakValueDictionary()


class CompiledPiece:
    """One piece of a model.

    Args:
        graph: torch-level or ATen FX; its placeholders carry `example_value` or `val`, or examples are given.
        example_inputs: what the arguments look like, where the placeholders do not say.
        options: what to compile for; by default the device of the arguments.
        shelf: where plans for ranges are kept from one process to the next; by default nowhere.
        guarded: whoever calls has checked the arguments, as Dynamo does; they are not checked again.
        steady: parameters keep their values while pieces run (`Options.steady`); options say it themselves.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        example_inputs: Sequence[Any] | None = None,
        *,
        options: Options | None = None,
        shelf: Shelf | None = None,
        guarded: bool = False,
        steady: bool = False,
    ) -> None:
        if not isinstance(graph, fx.GraphModule):
            raise UserError("CompiledPiece", f"it was given {type(graph).__name__}, not a torch.fx.GraphModule",
                            stage="runtime", remedy="Trace the module, or use torch.compile.")  # fmt: skip
        self.graph, self.shelf = graph, shelf
        self.examples = Examples.of(graph, example_inputs)
        self._arguments = None if guarded else Arguments(graph, self.examples)
        self._options, self._steady = options, steady
        self._places = list(self.examples.symbols().values())
        self._tensors = [i for i, v in enumerate(self.examples.values) if isinstance(v, torch.Tensor)]
        self._names: list[str] = []
        self._lowered: Lowered | None = None
        self._runs: dict[tuple[Any, ...], Runner] = {}
        # The newest first.
        self._ranges: list[tuple[int, int]] = []
        self._regimes: dict[_Range, _Regimes] = {}
        self._unserved: Regime | None = None
        # Being compiled.
        self._warming: dict[_Range, Warming] = {}
        # Why the piece runs as the graph it was; empty while it does not.
        self.refusal = ""

    def at(self, args: Sequence[Any]) -> Runner:
        """The callable for the sizes in these arguments; compiled at their first use, then looked up.

        Args:
            args: the piece's arguments, as `__call__` takes them.

        Returns:
            A function of the piece's arguments at these sizes, which returns what the piece returns, and checks
            nothing: dtypes, fixed sizes and strides must be those of the examples. Outputs come from the caching
            allocator (aliases of inputs excepted), so a caller may capture it in a CUDA graph.
        """
        key = self._key(args)
        run = self._runs.get(key)
        if run is None:
            run = self._in_range(*key)
        if run is None:
            with making(self._device()):
                run = self._runs.get(key) or self._compile(*key, args)
                self._runs[key] = run
        return run

    def known(self, args: Sequence[Any]) -> Runner | None:
        """What `at` gives where nothing has to be compiled for it; None elsewhere."""
        sizes, misaligned = key = self._key(args)
        run = self._runs.get(key)
        if run is None and (found := self._range(sizes)) is not None and (*found, misaligned) in self._regimes:
            run = self._in_range(sizes, misaligned)
        return run

    def _key(self, args: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes, and inputs that are not aligned."""
        sizes = tuple(args[p] if d is None else args[p].shape[d] for p, d in self._places)
        return sizes, misaligned(args, self._tensors)

    def ranged(self, lo: int, hi: int, *, later: bool = False) -> tuple[Regime, ...]:
        """Plans for every number of tokens from `lo` to `hi`, made and compiled now, for aligned inputs.

        From then on `at` and calls with such a size plan and compile nothing, but where the size already had a plan of
        its own. Inputs that are not aligned bring the same for theirs at their first call. There may be several ranges;
        where two hold a size, the later one serves it.

        Args:
            lo, hi: both included.
            later: planned now, compiled in the background; the first call waits, or `ready` before it.

        Returns:
            the regimes; those without a plan say why, and their sizes are planned one by one when they come.

        Raises:
            UserError: the range is empty, or its ends are no integers.
        """
        if type(lo) is not int or type(hi) is not int or not 0 <= lo <= hi:
            raise UserError("a range of sizes", f"{lo!r} to {hi!r}", stage="runtime", remedy="Give ints 0 <= lo <= hi.")
        if len(self._places) != 1:
            why = f"the piece has {len(self._places)} sizes, a range is of one"
            self._unserved = Regime(lo, hi, None, why)
            return (self._unserved,)
        self._ranges = [(lo, hi), *(known for known in self._ranges if known != (lo, hi))]
        with making(self._device()):
            self._serve((lo, hi, ()))
            if not later:
                self.ready()
            return self._regimes[lo, hi, ()].regimes

    def ready(self) -> None:
        """Wait until nothing that `ranged` began is left to compile or to load."""
        if not self._warming:
            return
        with making(self._device()):
            while self._warming:
                asked, warming = next(iter(self._warming.items()))
                try:
                    warming.finish()
                except UNCOMPILED as cause:
                    self._regimes[asked] = self._lost(asked, cause)
                except Exception:
                    # Nothing half-loaded is served.
                    del self._regimes[asked]
                    raise
                finally:
                    # Last: whoever finds nothing to wait for takes what is there.
                    del self._warming[asked]

    def _in_range(self, sizes: tuple[int, ...], misaligned: tuple[int, ...]) -> Runner | None:
        """The plan of a range for this size, if there is one."""
        found = self._range(sizes)
        if found is None:
            return None
        asked = *found, misaligned
        if asked not in self._regimes or self._warming:
            with making(self._device()):
                if asked not in self._regimes:
                    self._serve(asked)
                self.ready()
        served = self._regimes[asked]
        return served.runs[bisect_left(served.bounds, sizes[0])]

    def _range(self, sizes: tuple[int, ...]) -> tuple[int, int] | None:
        """The range that serves this size."""
        return next((found for found in self._ranges if found[0] <= sizes[0] <= found[1]), None)

    def _serve(self, asked: _Range) -> None:
        """Plan a range for these alignments, and begin to compile it."""
        lo, hi, misaligned = asked
        try:
            lowered = self._shared(self.examples.values)
            own, names = self._alignment(lowered, misaligned)
            key = lo, hi, names
            if lowered.options.target.interpreted:
                found = lowered.regimes(*key)
            else:
                warming = lowered.warming.get(key) or Warming(self._device(), names)
                found = lowered.regimes(*key, warming.begin)
                lowered.warming[key] = self._warming[asked] = warming
            runs = [None if loaded is None else self._bound(loaded, own) for _, loaded in found]
            made = _Regimes([r.hi for r, _ in found], runs, tuple(r for r, _ in found))
        except (Unsupported, *UNCOMPILED) as cause:
            made = self._lost(asked, cause)
        self._regimes[asked] = made

    def _lost(self, asked: _Range, cause: Exception) -> _Regimes:
        """The range of a piece that runs as the graph it was."""
        lo, hi, _ = asked
        return _Regimes([hi], [self._fall_back(cause)], (Regime(lo, hi, None, str(cause)),))

    def __call__(self, *args: Any) -> Any:
        """Run the piece; returns what its graph returns.

        Raises:
            UserError: dtypes, fixed sizes or strides are not those of the examples, or gradients would be needed.
        """
        if self._arguments is not None:
            self._arguments.check(args)
        return self.at(args)(*args)

    def summary(self) -> str:
        """Plans so far: sizes, kernels, ops that run as themselves."""
        if self.refusal:
            return f"runs as the graph it was: {self.refusal}"
        parts = []
        for (sizes, _), loaded in (self._lowered.plans if self._lowered else {}).items():
            parts.append(f"{sizes or 'fixed'}: {_counted(loaded.plan)}")
        for served in self._regimes.values():
            parts += [_said(regime) for regime in served.regimes]
        if self._unserved is not None:
            parts.append(_said(self._unserved))
        return "; ".join(parts) or "not called yet"

    @property
    def plans(self) -> dict[tuple[Any, ...], Loaded]:
        """Plans so far, by sizes and misaligned inputs."""
        return self._lowered.plans if self._lowered else {}

    def serving(self, *sizes: int) -> Plan | None:
        """The plan that serves these sizes, once there is one: their own, or that of their range."""
        for (planned, _), loaded in self.plans.items():
            if planned == sizes:
                return loaded.plan
        found = self._range(sizes) if len(sizes) == 1 else None
        regimes = [regime for asked, served in self._regimes.items() if asked[:2] == found for regime in served.regimes]
        return next((regime.plan for regime in regimes if regime.lo <= sizes[0] <= regime.hi), None)

    def _compile(self, sizes: tuple[int, ...], misaligned: tuple[int, ...], args: Sequence[Any]) -> Runner:
        try:
            lowered = self._shared(args)
            own, unaligned = self._alignment(lowered, misaligned)
            loaded = lowered.loaded(sizes, unaligned)
        except Unsupported as cause:
            return self._fall_back(cause)
        nodes, said = len(self.graph.graph.nodes), "; ".join((_counted(loaded.plan), *loaded.plan.themselves))
        log.info("a piece of %d nodes, sizes %s: %s", nodes, sizes or "fixed", said)
        return self._bound(loaded, own, args, unaligned)

    def _alignment(self, lowered: Lowered, misaligned: Sequence[int]) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
        """The tensors that the piece holds, by the name they have in the plans, and what of all is not aligned."""
        # By order: an equal piece may hold its tensors under other names.
        own = dict(zip(held(lowered.graph), held(self.graph).values(), strict=True))
        unaligned = {name for name, tensor in own.items() if tensor.data_ptr() & 15}
        return own, frozenset(unaligned | {self._names[i] for i in misaligned})

    def _bound(
        self,
        loaded: Loaded,
        own: dict[str, torch.Tensor],
        args: Sequence[Any] | None = None,
        unaligned: frozenset[str] = frozenset(),
    ) -> Runner:
        """The plan with the piece's own tensors, warmed on `args` where they are given, and safe from overlap."""
        constants = tuple(own.get(name, tensor) for name, tensor in loaded.plan.constants.items())
        facts, run = loaded.plan.facts, structured(loaded, constants)
        if args is not None:
            run = self._warmed(run, loaded, args, unaligned)
        if facts.absolute:
            run = at_start(run, self.graph.forward, self._tensors, constants)
        if facts.mutated:
            written = [i for i in self._tensors if self._names[i] in facts.mutated]
            run = apart(run, self.graph.forward, self._tensors, written)
        return on_device(run, self._device())

    def _shared(self, args: Sequence[Any]) -> Lowered:
        if self._lowered is None:
            options = self._options or options_for(args, self._steady)
            digest = fingerprint(self.graph, self.examples)
            lowered = Lowered(self.graph, self.examples, options, digest, self.shelf)
            self._lowered = lowered if digest is None else _SHARED.setdefault((digest, options), lowered)
            # In the plans an equal piece's arguments have the names of the first.
            self._names = [n.name for n in self._lowered.graph.graph.nodes if n.op == "placeholder"]
        return self._lowered

    def _warmed(self, run: Runner, loaded: Loaded, args: Sequence[Any], unaligned: frozenset[str]) -> Runner:
        """One run on these arguments, so that nothing is left to compile or to allocate when the caller captures a
        graph; of what must not run once more than it is called, the kernels alone.

        What the piece would write in place is written to a copy. A kernel that does not compile sends the whole piece
        back to its graph.
        """
        if self._lowered is None or self._lowered.options.target.interpreted:
            return run
        facts = loaded.plan.facts
        if facts.absolute and any(args[i].storage_offset() for i in self._tensors):
            return run  # the graph runs instead
        named = zip(self._names, args, strict=True)
        trial = [copied(a, facts.absolute) if name in facts.mutated else a for name, a in named]
        try:
            if facts.foreign:
                # Ops that run as themselves must not read memory that nobody filled.
                warm(loaded.plan, loaded.call, self._device(), unaligned)
            else:
                with compiling_together(asked()):
                    run(*trial)
            if not facts.once:
                run(*trial)
        except UNCOMPILED as cause:
            return self._fall_back(cause)
        return run

    def _device(self) -> torch.device:
        """Where the plans' scratch memory is."""
        devices = [v.device for v in self.examples.values if isinstance(v, torch.Tensor)]
        return next((d for d in devices if d.type == "cuda"), torch.device("cuda"))

    def _fall_back(self, cause: Exception) -> Runner:
        if not self.refusal:
            remedy = "python -m terrazzo.tools.dump_kernels on this piece shows the stage"
            log.warning(
                "a piece of %d nodes runs as the graph it was: %s; %s", len(self.graph.graph.nodes), cause, remedy
            )
        self.refusal = str(cause)
        # It is kept for equal pieces.
        forget_frames(cause)
        return self.graph.forward


def options_for(args: Sequence[Any], steady: bool = False) -> Options:
    """Options for the device these arguments live on, and for parameters that are `steady` or not.

    Raises:
        UserError: torch sees no CUDA device, and kernels are not interpreted.
        Unsupported: it sees one, and they are all on the CPU.
    """
    devices = {a.device for a in args if isinstance(a, torch.Tensor)}
    cuda = next((d for d in devices if d.type == "cuda"), None)
    target = Target.current(cuda)
    if devices and cuda is None and not target.interpreted:
        raise Unsupported("the piece", f"its tensors are on {', '.join(map(str, devices))}", stage="runtime")
    return Options(target, allow_tf32=torch.backends.cuda.matmul.allow_tf32, steady=steady)


def _said(regime: Regime) -> str:
    """A regime in a few words."""
    if regime.plan is None:
        return f"{regime}: planned one by one, as {regime.why}"
    return f"{regime}: {_counted(regime.plan)}"


def _counted(plan: Plan) -> str:
    return f"{plan.facts.kernels} kernels, {plan.facts.foreign} ops as themselves"
