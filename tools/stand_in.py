"""What stands in for vLLM where its backend is tried without it: a configuration with what the dispatcher reads."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.runtime.dispatcher import PiecewiseBackend
from terrazzo.tools.models.piece import Piece


def backend(
    piece: Piece,
    total: int,
    *,
    compile_sizes: Collection[int] = (),
    capture_sizes: Collection[int] = (),
    pool: Any = None,
    compiled: CompiledPiece | None = None,
) -> PiecewiseBackend:
    """A piece behind the protocol; its first call runs the piece's own graph, as the general callable.

    Args:
        piece: one of `total`.
        total: how many pieces the model has.
        compile_sizes: numbers of tokens to compile for.
        capture_sizes: numbers of tokens to compile for and capture, after one plain run each.
        pool: memory pool handle that the pieces of a model share.
        compiled: the piece's plans, for whoever wants to look at them afterwards.
    """
    config = SimpleNamespace(
        compile_sizes=list(compile_sizes),
        cudagraph_capture_sizes=list(capture_sizes),
        use_cudagraph=bool(capture_sizes),
        cudagraph_num_of_warmups=1,
    )
    return PiecewiseBackend(
        piece.graph,
        SimpleNamespace(compilation_config=config),
        pool,
        piece.index,
        total,
        list(piece.sym_shape_indices),
        piece.graph.forward,
        None,
        compile_piece=lambda graph: compiled or CompiledPiece(graph),
    )
