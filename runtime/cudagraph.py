"""Capture a piece into a CUDA graph, replay it: everything that touches `torch.cuda`'s graphs.

Enters a callable whose tensors keep their addresses from call to call; leaves a `Captured` whose `replay` does the same
work in one launch and whose `output` is where that work's results are. How a graph is made is a `GraphDriver`, so that
the order of events can be followed without a GPU.

Memory: the pieces of a model share one pool. What a capture allocates goes back to the pool as soon as the last
reference is gone, so an output is held by weak reference only (weak.py): by the caller while the model's capture run
goes on, by nobody afterwards.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..lowering.errors import UserError
from .weak import weak_ref


class StaleAddress(UserError, AssertionError):
    """A replay was asked for with tensors at other addresses than the ones its graph was captured with."""

    def __init__(self, piece: str, before: Sequence[int], now: Sequence[int]) -> None:
        moved = [i for i, (old, new) in enumerate(zip(before, now, strict=False)) if old != new]
        # By name: AssertionError is in between and takes no keywords.
        UserError.__init__(
            self,
            f"replay of {piece}",
            f"input addresses are different from the capture's: {len(before)} tensors then, {len(now)} now, "
            f"moved (by position among the tensors): {moved}",
            stage="cudagraph",
            remedy="Give every call the same input buffers: copy new values into them, or set cudagraph_copy_inputs.",
        )


@dataclass(frozen=True)
class GraphDriver:
    """How graphs are made.

    Args:
        new_graph: makes an empty graph with a method `replay()`.
        recording: (graph, pool) to a context in which work is recorded into the graph instead of run.
        refusal: (args) to None, or the reason why these inputs cannot be captured.
        in_capture: says whether the caller is already recording into a graph of its own.
        weaken: makes weak references of an output.
    """

    new_graph: Callable[[], Any]
    recording: Callable[[Any, Any], AbstractContextManager]
    refusal: Callable[[Sequence[Any]], str | None]
    in_capture: Callable[[], bool]
    weaken: Callable[[Any], Any]


def _cuda_refusal(args: Sequence[Any]) -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not any(isinstance(x, torch.Tensor) and x.is_cuda for x in args):
        # The graph of such a piece would be empty, and its replay would leave the outputs of the capture run unchanged.
        return "no input is on a CUDA device"
    return None


# The classes are looked up at each capture, where whoever replaces them in torch.cuda expects it.
CUDA = GraphDriver(
    new_graph=lambda: torch.cuda.CUDAGraph(),
    recording=lambda graph, pool: torch.cuda.graph(graph, pool=pool),
    refusal=_cuda_refusal,
    in_capture=lambda: torch.cuda.is_available() and torch.cuda.is_current_stream_capturing(),
    weaken=weak_ref,
)


@dataclass(frozen=True, slots=True)
class Captured:
    """A captured piece.

    Args:
        replay: runs the recorded work on the current stream.
        output: weak references to where that work leaves its results.
        addresses: of the tensors among the inputs, in order, as they were at the capture.
    """

    replay: Callable[[], None]
    output: Any
    addresses: tuple[int, ...]

    def check_addresses(self, args: Sequence[Any], piece: str) -> None:
        """Raise StaleAddress when a tensor among `args` is not where it was at the capture."""
        now = addresses(args)
        if now != self.addresses:
            raise StaleAddress(piece, self.addresses, now)


def addresses(args: Sequence[Any]) -> tuple[int, ...]:
    """Give the data pointers of the tensors among `args`, in order."""
    return tuple(x.data_ptr() for x in args if isinstance(x, torch.Tensor))


def capture(
    run: Callable[..., Any], args: Sequence[Any], pool: Any, driver: GraphDriver, *, first: bool, last: bool
) -> tuple[Captured, Any]:
    """Record `run(*args)` into a new graph of `pool`.

    Args:
        run: the work; must allocate from torch's caching allocator only, and neither wait nor compile.
        args: its inputs; replays read the same addresses.
        pool: memory pool handle shared by the pieces of a model, or None for a pool of the graph's own.
        driver: how graphs are made.
        first: this is the first piece: the only one that may collect garbage and empty the allocator's cache.
            torch does both when a capture begins, and once per forward pass is enough.
        last: this is the last piece: no later graph reads its output, whose block can go back to the pool at once.

    Returns:
        The captured graph, and the output to hand to the caller: the real one, whose lifetime keeps the pool from
        giving its block to the pieces captured next; for the last piece already a weak reference. Its content is not
        computed: a capture records, it does not run.
    """
    graph = driver.new_graph()
    with ExitStack() as stack:
        if not first:
            stack.enter_context(_no_collections())
        stack.enter_context(driver.recording(graph, pool))
        output = run(*args)
        if last:
            output = driver.weaken(output)
    return Captured(graph.replay, driver.weaken(output), addresses(args)), output


@contextmanager
def _no_collections() -> Iterator[None]:
    """Make `gc.collect` and `torch.cuda.empty_cache` do nothing inside."""
    collect, empty_cache = gc.collect, torch.cuda.empty_cache
    gc.collect = torch.cuda.empty_cache = lambda *args, **kwargs: 0  # type: ignore[assignment]
    try:
        yield
    finally:
        gc.collect, torch.cuda.empty_cache = collect, empty_cache  # type: ignore[assignment]
