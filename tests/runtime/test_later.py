"""Ranges whose kernels are compiled in the background: who waits for them, and what goes wrong meanwhile."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from triton.runtime.errors import OutOfResources

from terrazzo.kernels import launch, together
from terrazzo.runtime import compiled, making
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools.models import pieces


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """A process in which nothing was compiled yet."""
    monkeypatch.setattr(compiled, "_SHARED", {})


class Waiting:
    """Kernels being compiled: how often they were waited for, and what that raises."""

    def __init__(self):
        self.times, self.raises = 0, None

    def finish(self):
        self.times += 1
        if self.raises is not None:
            raise self.raises


@pytest.fixture
def later(device):
    """A piece whose range is planned and being compiled, the latter, and arguments."""
    graph = pieces("gpt2", tiny=True, dtype=torch.float32)[1]
    piece = CompiledPiece(graph.graph)
    piece.ranged(2, 40, later=True)
    waiting = Waiting()
    piece._warming = dict.fromkeys(piece._regimes, waiting)
    return piece, waiting, graph.make_inputs(5, device)


def test_the_first_call_waits_for_what_is_compiled_later(later):
    piece, waiting, args = later
    assert waiting.times == 0
    for _ in range(2):
        piece(*args)
        assert waiting.times == 1


def test_a_kernel_that_does_not_compile_later_sends_the_piece_back(later):
    piece, waiting, args = later
    waiting.raises = OutOfResources(2, 1, "shared memory")
    piece.ready()
    assert "shared memory" in piece.refusal and piece.known(args) == piece.graph.forward


def test_what_else_goes_wrong_later_is_raised_and_leaves_no_plan(later):
    piece, waiting, args = later
    waiting.raises = RuntimeError("the driver")
    with pytest.raises(RuntimeError, match="the driver"):
        piece.ready()
    assert piece.known(args) is None and not piece._warming


def test_a_fork_is_alone(later):
    held, release = threading.Event(), threading.Event()

    def other():
        with making.making(torch.device("cpu")), launch.noting():
            held.set()
            release.wait()

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        free = making._one_thread.acquire(blocking=False) and together._lock.acquire(blocking=False)
        os._exit(0 if free and not launch._noting else 1)
    release.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
