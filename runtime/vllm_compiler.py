"""terrazzo as the compiler of today's vLLM (`CompilerInterface`): pieces in, callables out.

vLLM asks for each piece once per range of token counts (all that a step may have, by default) and once per single size;
all of a piece's callables are one `SizedPiece`, which chooses by the size that runs:

| size | runs |
|---|---|
| in a range | the plan of its regime: all are made when vLLM asks for it, and compiled by the piece's first call |
| in `compile_sizes`, or captured, where its range has no plan | its own plan, made at its first call |
| another, or an input at an alignment not seen before vLLM serves | the piece's graph |
| any, of a piece that cannot be lowered | the piece's graph, after one warning |

vLLM runs each size that it names on real arguments before it captures or serves it, so nothing is compiled later: not
in a capture, and not for a request. Graphs are vLLM's own affair: a plan runs inside them as it does outside.

`VllmCompiler` derives from vLLM's interface and is made when it is first asked for; importing this module does not
import vLLM.

Source: vLLM 0.22.1, `vllm/compilation/compiler_interface.py` and `piecewise_backend.py`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._guards import tracing
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..lowering.errors import forget_frames
from . import compilers, vllm_compat
from .cache import Shelf
from .compiled import CompiledPiece


def __getattr__(name: str) -> Any:
    if name != "VllmCompiler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.compilation.compiler_interface import CompilerInterface

    made = type(name, (Compiler, CompilerInterface), {"__module__": __name__, "__doc__": Compiler.__doc__})
    globals()[name] = made
    return made


class Compiler:
    """Compiles the pieces of one model; vLLM makes one for each graph that it cuts."""

    name = "terrazzo"

    def __init__(self) -> None:
        self.config: Any = None
        self.most = 1
        self.pieces: list[SizedPiece] = []
        self.shelf: Shelf | None = None
        self.seconds = 0.0
        # vLLM makes its compiler with the model, long before there is something to compile.
        compilers.open_for(self)

    def compute_hash(self, vllm_config: Any) -> str:
        """What of us decides what is compiled: vLLM's caches are apart for each. Called before the first piece."""
        self.config = vllm_config.compilation_config
        self.most = vllm_config.scheduler_config.max_num_batched_tokens
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("terrazzo", "torch", "triton")]
        return hashlib.sha256(" ".join(versions).encode()).hexdigest()

    def initialize_cache(self, cache_dir: str, disable_cache: bool = False, prefix: str = "") -> None:
        """Told where vLLM keeps what it compiled: plans go to a folder of their own there."""
        self.shelf = None if disable_cache else Shelf(Path(cache_dir) / self.name)

    def compile(
        self,
        graph: fx.GraphModule,
        example_inputs: Sequence[Any],
        compiler_config: Any,
        compile_range: Any,
        key: str | None = None,
    ) -> tuple[Callable[..., Any], tuple[str, str] | None]:
        """The piece's callable, the same one for every range and size, and a handle: key, and where plans are kept.

        Args:
            graph: the piece; its placeholders carry symbolic `example_value`s.
            example_inputs: read where a placeholder carries none.
            compiler_config: Inductor's affair.
            compile_range: `start` to `end`, both included; in vLLM 0.12 a size, or None for all that a step may have.
            key: what vLLM calls the result.
        """
        piece = next((p for p in self.pieces if p.graph is graph), None)
        if piece is None:
            piece = SizedPiece(graph, example_inputs, self)
            self.pieces.append(piece)
        if compile_range is None:
            piece.serve(1, self.most)
        elif not isinstance(compile_range, int) and compile_range.start < compile_range.end:
            piece.serve(compile_range.start, compile_range.end)
        return piece, (key, str(self.shelf.folder)) if key and self.shelf is not None else None

    def load(
        self,
        handle: Any,
        graph: fx.GraphModule,
        example_inputs: Sequence[Any],
        graph_index: int,
        compile_range: Any,
    ) -> Callable[..., Any]:
        """What `compile` gave, by a handle of an earlier process. Plans are found by what they compute, whatever the
        handle says; those that are gone or damaged are made anew, so this never fails where `compile` would not."""
        return self.compile(graph, example_inputs, None, compile_range)[0]

    def may_compile(self, tokens: int) -> bool:
        """Whether this size gets a plan of its own, and now is the time to make it."""
        if self.config is None or tokens in (self.config.compile_sizes or ()):
            return True
        captured = tokens in (self.config.cudagraph_capture_sizes or ())
        return captured and vllm_compat.still_capturing()

    def met(self, piece: SizedPiece, tokens: int | None) -> None:
        """Told of every piece's first call; says, at the last one's, what it all came to."""
        if piece is not self.pieces[-1]:
            return
        compilers.close_for(self)
        counts = [p.counts(tokens) for p in self.pieces]
        kernels, foreign = (sum(c[i] for c in counts) for i in range(2))
        kinds = len({id(p.piece.plans) for p in self.pieces})
        graphs = counts.count((0, 0))
        vllm_compat.logger().info(
            "terrazzo: %d pieces (%d different) compiled in %.1f s; at %s tokens %d kernels, %d ops as themselves%s",
            *(len(self.pieces), kinds, self.seconds, tokens or "any number of", kernels, foreign),
            f", {graphs} pieces as their graphs" if graphs else "",
        )


class SizedPiece:
    """One piece, dispatched on its number of tokens; see the module's table."""

    def __init__(self, graph: fx.GraphModule, example_inputs: Sequence[Any], compiler: Compiler) -> None:
        self.graph, self.compiler = graph, compiler
        self.piece = CompiledPiece(graph, example_inputs, shelf=compiler.shelf, guarded=True, steady=True)
        values = self.piece.examples.values
        self._size = next((i for i, v in enumerate(values) if isinstance(v, torch.SymInt)), None)
        self._tried: set[int | None] = set()
        self._met = self._failed = False

    def serve(self, lo: int, hi: int) -> None:
        """Make plans for every size of a range now."""
        start = time.perf_counter()
        # vLLM compiles inside Dynamo, whose own fake tensors have nothing to do with those of a trace.
        with tracing(None), unset_fake_temporarily():
            self._guarded(lambda: self.piece.ranged(lo, hi, later=True))
        self.compiler.seconds += time.perf_counter() - start

    def __call__(self, *args: Any) -> Any:
        """Run the piece; returns what its graph returns."""
        run = self.piece.known(args) if self._met else None
        return run(*args) if run is not None else self._choose(args)(*args)

    def _choose(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """What runs on arguments of a first call, and on those for which no plan was made yet."""
        tokens = args[self._size] if self._size is not None else None
        if not self._met:
            # What vLLM asked for was compiled while it went on.
            start = time.perf_counter()
            self._guarded(self.piece.ready)
            self.compiler.seconds += time.perf_counter() - start
        run = self.piece.known(args) or self._own(args, tokens) or self.graph.forward
        if not self._met:
            self._met = True
            self.compiler.met(self, tokens)
        return run

    def _own(self, args: tuple[Any, ...], tokens: int | None) -> Callable[..., Any] | None:
        """A plan for this very size, where now is the time to make it."""
        if self._failed or tokens in self._tried or not (tokens is None or self.compiler.may_compile(tokens)):
            return None
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        # Once for each: what differs in another size or in alignment only would be compiled while requests wait.
        self._tried.add(tokens)
        start = time.perf_counter()
        run = self._guarded(lambda: self.piece.at(args))
        self.compiler.seconds += time.perf_counter() - start
        return run

    def _guarded(self, step: Callable[[], Any]) -> Any:
        """What the step returns; None, with one warning, when it fails: vLLM serves the piece's graph then."""
        try:
            return step()
        except Exception as error:
            self._failed = True
            what = f"a piece of {len(self.graph.graph.nodes)} nodes runs as the graph it was"
            vllm_compat.logger().warning("terrazzo: %s: %s: %s", what, type(error).__name__, error)
            vllm_compat.logger().debug("Where it failed:", exc_info=error)
            forget_frames(error)
            return None

    def counts(self, tokens: int | None) -> tuple[int, int]:
        """Kernels, and ops as themselves, of the plan for this size; both 0 where the graph runs."""
        plan = self.piece.serving(*(() if tokens is None else (tokens,)))
        return (plan.facts.kernels, plan.facts.foreign) if plan is not None else (0, 0)
