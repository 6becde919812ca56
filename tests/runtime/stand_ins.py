"""What stands in for terrazzo's compiler, the general graph and torch.cuda's graphs in the dispatcher's tests."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import fx

from terrazzo.runtime.cudagraph import GraphDriver
from terrazzo.runtime.dispatcher import PiecewiseBackend

GRAPH = fx.symbolic_trace(lambda n, x: x + 1)


class Journal(list):
    """What happened, in order."""

    def __init__(self):
        super().__init__()
        self.refuse_cuda = self.refuse_piece = None
        self.refuse_sizes, self.outer_capture = {}, False
        self.collections, self.pools = [], []

    def general(self, *args):
        self.append(("general", args[0]))
        return [args[1]]

    def compile_piece(self, graph):
        self.append(("piece", graph is GRAPH))
        if self.refuse_piece:
            raise self.refuse_piece
        return SimpleNamespace(at=self.at)

    def at(self, args):
        size = args[0]
        self.append(("compile", size))
        if size in self.refuse_sizes:
            raise self.refuse_sizes[size]

        def plan(*now):
            self.append(("plan", size))
            return [now[1]]

        return plan

    def driver(self):
        @contextmanager
        def recording(graph, pool):
            gc.collect("begin")
            torch.cuda.empty_cache("begin")
            self.pools.append(pool)
            self.append("begin")
            yield
            self.append("end")

        def weaken(value):
            self.append("weaken")
            return ("weak", value[-1])

        def new_graph():
            return SimpleNamespace(replay=lambda: self.append("replay"))

        return GraphDriver(
            new_graph=new_graph,
            recording=recording,
            refusal=lambda args: self.refuse_cuda,
            in_capture=lambda: self.outer_capture,
            weaken=weaken,
        )

    def since(self):
        """Give and forget what happened since the last look."""
        events = list(self)
        self.clear()
        return events


def make(journal, *, compile_sizes=(), capture_sizes=(), warmups=1, index=0, total=3, sym=(0,), cudagraph=True, **more):
    """Build a backend and leave its first call behind."""
    config = SimpleNamespace(
        compile_sizes=list(compile_sizes),
        cudagraph_capture_sizes=list(capture_sizes),
        use_cudagraph=cudagraph,
        cudagraph_num_of_warmups=warmups,
    )
    saved = more.pop("saved", [])
    backend = PiecewiseBackend(
        GRAPH,
        SimpleNamespace(compilation_config=config),
        "pool",
        index,
        total,
        list(sym),
        journal.general,
        SimpleNamespace(compiler_manager=SimpleNamespace(save_to_file=lambda: saved.append(1))),
        compile_piece=journal.compile_piece,
        driver=journal.driver(),
        **more,
    )
    backend(7, "first")
    assert journal.since() == [("general", 7)]
    return backend
