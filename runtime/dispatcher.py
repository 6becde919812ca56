"""`PiecewiseBackend`: what vLLM (0.9.1 – 0.10.0) calls for each piece of a model, with every call's number of tokens.

A piece has one general callable, which serves any size, and entries for the sizes the configuration names. Which runs:

| call | runs |
|---|---|
| the first one | the general callable; the last piece reports compilation over if no compile size waits |
| size in neither list, or a piece without a dynamic size | the general callable |
| size in `compile_sizes` | terrazzo's plan for that size, compiled at its first call |
| size in `cudagraph_capture_sizes` | its plan: `cudagraph_num_of_warmups` plain runs, one capture, then replays |
| such a size under `skip_cuda_graphs`, or inside the caller's own capture | its plan, plainly |

A capture size is lowered by terrazzo as a compile size is; what vLLM captures there is its general callable. With
`use_cudagraph` off the capture sizes mean nothing and take the general callable, as in vLLM. Where graphs are wanted
but cannot be made (no CUDA device) their sizes still run their plans, and one line says so.

A piece whose arguments hold no size was traced with fixed shapes: its general callable is compiled for them already, no
entry could ever be told apart by size, and no capture size names it. It runs the general callable always.

The first of several sizes selects the entry. The others are expected to follow from it; a call in which they differ
from those the entry was compiled for runs the general callable. So does one with a tensor that starts at a multiple of
16 bytes where that of the entry's first call did not, or the other way round.

A failure to compile falls back to the general callable with one warning per piece. A failure of a compiled plan while
it runs is raised: the piece may have written to its inputs already.

Source of the protocol: vLLM's `AbstractPiecewiseBackend` and the behaviour of its `CUDAPiecewiseBackend`.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..lowering.errors import TerrazzoError, forget_frames
from . import vllm_compat
from .cudagraph import CUDA, Captured, GraphDriver, capture
from .memory import misaligned

_REMEDY = "tools/dump_kernels.py on this piece shows the stage that failed."


@dataclass
class _Entry:
    """What is known about one named size.

    `run` is None until the size's first call; `sizes` are all the sizes of that call, `misaligned` the tensors that did
    not start at a multiple of 16 bytes.
    """

    size: int
    to_compile: bool
    to_capture: bool
    run: Callable[..., Any] | None = None
    fell_back: bool = False
    warmups: int = 0
    captured: Captured | None = None
    sizes: tuple[int, ...] = ()
    misaligned: tuple[int, ...] = ()

    def state(self) -> str:
        """Name the state in a few words."""
        if self.run is None:
            return "not used yet"
        what = "general graph" if self.fell_back else "plan"
        return f"{what} captured" if self.captured else what


def _compile_with_terrazzo(graph: fx.GraphModule) -> Any:
    # Imported when a piece is first compiled: vLLM loads this module in processes that never compile anything.
    from .compiled import CompiledPiece

    return CompiledPiece(graph, guarded=True, steady=True)


class PiecewiseBackend:
    """One piece of a model, dispatched on its number of tokens.

    Args:
        graph: the piece, as FX.
        vllm_config: vLLM's configuration; only `compilation_config`'s `compile_sizes`, `cudagraph_capture_sizes`,
            `use_cudagraph` and `cudagraph_num_of_warmups` are read, so any object with them will do.
        graph_pool: memory pool handle for the captured graphs, or None.
        piecewise_compile_index: which piece this is.
        total_piecewise_compiles: of how many.
        sym_shape_indices: positions of the sizes among the arguments; the first selects the entry. May be empty.
        compiled_graph_for_general_shape: callable that serves any size.
        vllm_backend: vLLM's backend; told when compilation is over. May be None outside vLLM.
        compile_piece: makes the object whose `at(args)` is the plan for the sizes in `args`; by default terrazzo's.
        driver: how CUDA graphs are made.
        kwargs: what other platforms or versions may pass; ignored.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        vllm_config: Any,
        graph_pool: Any,
        piecewise_compile_index: int,
        total_piecewise_compiles: int,
        sym_shape_indices: list[int],
        compiled_graph_for_general_shape: Callable[..., Any],
        vllm_backend: Any,
        *,
        compile_piece: Callable[[fx.GraphModule], Any] = _compile_with_terrazzo,
        driver: GraphDriver = CUDA,
        **kwargs: Any,
    ) -> None:
        config = vllm_config.compilation_config
        self.graph, self.vllm_config, self.vllm_backend = graph, vllm_config, vllm_backend
        self.index, self.total = piecewise_compile_index, total_piecewise_compiles
        self.sym_shape_indices = tuple(sym_shape_indices)
        self._general, self._pool, self._driver = compiled_graph_for_general_shape, graph_pool, driver
        self._compile_piece = compile_piece
        self._piece: Any = None
        self._refusal: Exception | None = None
        self._first, self._last = self.index == 0, self.index == self.total - 1
        self._num_warmups = getattr(config, "cudagraph_num_of_warmups", 0)
        self._debugging, self._several_sizes = vllm_compat.debugging(), len(self.sym_shape_indices) > 1
        self._started = self._ended = self._warned = False

        self._size_of: Callable[[Sequence[Any]], Any] = lambda args: None
        if self.sym_shape_indices:
            self._size_of = operator.itemgetter(self.sym_shape_indices[0])
        to_compile = set(config.compile_sizes or ())
        to_capture = set(config.cudagraph_capture_sizes or ()) if config.use_cudagraph else set()
        self._uncompiled = set(to_compile)
        self.entries = {
            size: _Entry(size, size in to_compile, size in to_capture) for size in sorted(to_compile | to_capture)
        }
        # The hot path's table: the captured sizes, where replays need no check.
        self._replays: dict[int, Captured] = {}

    def __call__(self, *args: Any) -> Any:
        """Run the piece on `args`; see the module's table for how.

        Returns:
            What the piece returns. After a replay: weak references to the graph's own outputs, overwritten by the next.
        Raises:
            StaleAddress: with VLLM_LOGGING_LEVEL=DEBUG, a replay whose inputs are not at the addresses of its capture.
        """
        captured = self._replays.get(self._size_of(args))
        if captured is not None and not vllm_compat.skip_cuda_graphs():
            captured.replay()
            return captured.output
        return self._dispatch(args)

    def _dispatch(self, args: tuple[Any, ...]) -> Any:
        """Run everything that is not an unchecked replay."""
        if not self._started:
            self._started = True
            self._end_compilation_if_over()
            return self._general(*args)
        entry = self.entries.get(self._size_of(args))
        if entry is None:
            return self._general(*args)
        run = entry.run or self._compile(entry, args)
        if self._several_sizes and entry.sizes != self._sizes(args):
            return self._general(*args)
        if not entry.fell_back and entry.misaligned != _misaligned(args):
            return self._general(*args)
        if not entry.to_capture or vllm_compat.skip_cuda_graphs():
            return run(*args)
        if entry.captured is not None:
            if self._debugging:
                entry.captured.check_addresses(args, f"{self._name()} for size {entry.size}")
            entry.captured.replay()
            return entry.captured.output
        return self._warm_up_or_capture(entry, run, args)

    def _compile(self, entry: _Entry, args: tuple[Any, ...]) -> Callable[..., Any]:
        """Give the plan for the entry's size, or the general callable where terrazzo cannot compile it."""
        try:
            entry.run = self._plan(args)
            entry.misaligned = _misaligned(args)
        except Exception as error:
            self._fall_back(entry, error)
            entry.run = self._general
        entry.sizes = self._sizes(args)
        if entry.to_compile:
            self._uncompiled.discard(entry.size)
            # vLLM counts a compile size here; a capture size is none to it, and its figures stay comparable.
            vllm_compat.count("num_backend_compilations")
            self._end_compilation_if_over()
        return entry.run

    def _plan(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        if self._refusal is not None:
            raise self._refusal
        if self._piece is None:
            try:
                self._piece = self._compile_piece(self.graph)
            except Exception as error:
                # No size of this piece can be compiled: it is not tried again for each.
                self._refusal = error
                raise
        return self._piece.at(args)

    def _fall_back(self, entry: _Entry, error: Exception) -> None:
        entry.fell_back = True
        if isinstance(error, TerrazzoError) and error.remedy:
            cause = str(error)
        else:
            cause = f"{type(error).__name__}: {error}. {_REMEDY}"
        logger, level = vllm_compat.logger(), logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        line = "%s is not compiled for size %s and runs the general graph: %s"
        logger.log(level, line, self._name(), entry.size, cause)
        logger.debug("Where it failed:", exc_info=error)
        forget_frames(error)

    def _warm_up_or_capture(self, entry: _Entry, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self._driver.in_capture():
            # A graph around the whole model records the plan itself; graphs do not nest.
            return run(*args)
        reason = self._driver.refusal(args)
        if reason is not None:
            entry.to_capture = False
            line = f"use_cudagraph is ignored: {reason}. Sizes to capture run their compiled plans without a graph."
            vllm_compat.say_once(logging.WARNING, ("no CUDA graphs", reason), line)
            return run(*args)
        if entry.warmups < self._num_warmups:
            entry.warmups += 1
            return run(*args)
        if self._first:
            vllm_compat.logger().debug("Capturing a CUDA graph of every piece for size %s", entry.size)
        captured, output = capture(run, args, self._pool, self._driver, first=self._first, last=self._last)
        entry.captured = captured
        if not (self._debugging or self._several_sizes):
            self._replays[entry.size] = captured
        vllm_compat.count("num_cudagraph_captured")
        return output

    def _sizes(self, args: tuple[Any, ...]) -> tuple[int, ...]:
        return tuple(args[i] for i in self.sym_shape_indices)

    def _end_compilation_if_over(self) -> None:
        if self._last and not self._ended and not self._uncompiled:
            self._ended = True
            vllm_compat.end_compilation(self.vllm_backend, self.vllm_config)

    def _name(self) -> str:
        return f"piece {self.index + 1} of {self.total}"

    def summary(self) -> str:
        """Say in one line what every named size of this piece has come to."""
        states: dict[str, list[str]] = {}
        for size, entry in self.entries.items():
            states.setdefault(entry.state(), []).append(str(size))
        lists = "; ".join(f"{state}: {' '.join(sizes)}" for state, sizes in states.items())
        return f"{self._name()}: {lists or 'general graph only'}"


def _misaligned(args: Sequence[Any]) -> tuple[int, ...]:
    """Positions of the tensors that do not start at a multiple of 16 bytes."""
    return misaligned(args, (i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)))
