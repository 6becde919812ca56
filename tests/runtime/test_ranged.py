"""`CompiledPiece.ranged`: what is planned when, what a call looks up, and that every binary is there beforehand."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import fx

from terrazzo.kernels.launch import Kernel
from terrazzo.lowering.errors import Unsupported, UserError
from terrazzo.runtime import compiled, lowered
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools.models import pieces
from terrazzo.tools.piece_check import check_sizes

from .test_compiled import UNALIGNED, at_offset, graph_of


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """A process in which nothing was compiled yet."""
    monkeypatch.setattr(compiled, "_SHARED", {})


@pytest.fixture
def middle(device):
    """A piece with a symbolic number of tokens."""
    return pieces("gpt2", tiny=True, dtype=torch.float32, device=device)[1]


@pytest.fixture
def planning(monkeypatch):
    """The sizes planned for, in order; a plan for a range as its first and last size."""
    sizes = []
    make_plan = lowered.make_plan

    def noting(traced, binding, *args, **more):
        sizes.extend(v if isinstance(v, int) else (v.span.lo, v.span.hi) for v in binding.values())
        return make_plan(traced, binding, *args, **more)

    monkeypatch.setattr(lowered, "make_plan", noting)
    return sizes


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt2", "mixtral-8x7b"])
def test_sizes_at_the_bounds_of_a_range_are_right(name, device):
    piece = pieces(name, tiny=True, dtype=torch.float32, device=device)[1]
    results = check_sizes(piece, (1, 2, 3, 16, 17, 64, 65, 70), device, (1, 70))
    assert [r.failures for r in results] == [[]] * 8
    # Beyond the range a size has its own plan.
    assert check_sizes(piece, (71,), device, (1, 70))[0].ok


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt2", "mixtral-8x7b"])
def test_every_size_of_a_range_on_the_gpu(name, device):
    piece = pieces(name, tiny=True, dtype=torch.bfloat16, device=device)[1]
    results = check_sizes(piece, (*range(1, 71), 127, 128, 129, 255, 257, 1000, 1024), device, (1, 1024))
    assert not [f"{r.size}: {r.failures}" for r in results if not r.ok]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_no_call_in_a_range_compiles_or_loads_a_kernel(kind, device, monkeypatch):
    piece = pieces("llama-3.2-1b", device=device)[kind]
    run = CompiledPiece(piece.graph)
    assert all(r.plan is not None for r in run.ranged(1, 4096))
    monkeypatch.setattr(Kernel, "compile", lambda *args: pytest.fail("a kernel is compiled at a call"))
    with torch.no_grad():
        for size in (1, 2, 3, 15, 16, 17, 100, 128, 129, 333, 1000, 1024, 1025, 2049, 3001, 4095, 4096):
            args = piece.make_inputs(size, device)
            run(*args)
            if size == 333:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    run(*args)


def test_a_range_is_planned_at_once_and_never_again(middle, device, planning):
    piece = CompiledPiece(middle.graph)
    piece.ranged(1, 40)
    assert planning and all(size == (2, 40) or size in ((2, 32), (33, 40)) for size in planning)
    planning.clear()
    for size in (1, 2, 7, 40):
        piece(*middle.make_inputs(size, device))
    assert planning == []
    piece(*middle.make_inputs(41, device))
    assert planning == [41]


def test_a_regime_is_told_of_before_the_next_is_planned(middle, planning):
    piece = CompiledPiece(middle.graph)
    one = piece._shared(piece.examples.values)
    told = []
    found = one.regimes(1, 150, frozenset(), lambda plan, call, lo, hi: told.append((lo, hi, len(planning))))
    assert [(r.lo, r.hi) for r, _ in found] == [(1, 1), (2, 128), (129, 150)]
    # The whole range and each part were planned; one token has no size to note.
    assert told == [(129, 150, 2), (2, 128, 3), (1, 1, 3)]
    # An equal piece asks again: what was told of once is on its way.
    assert one.regimes(1, 150, frozenset(), lambda *_: pytest.fail("told twice")) is found


def test_a_call_finds_its_regime(middle, device):
    piece = CompiledPiece(middle.graph)
    found = piece.ranged(1, 150)
    assert [(r.lo, r.hi) for r in found] == [(1, 1), (2, 128), (129, 150)]
    runs = [piece.at(middle.make_inputs(size, device)) for size in (1, 2, 128, 129, 150)]
    assert runs[1] is runs[2] and runs[3] is runs[4] and len(set(runs)) == 3
    assert piece.serving(7) is found[1].plan and piece.serving(151) is None


def test_a_range_beside_another_keeps_its_plans(middle, device, planning):
    piece = CompiledPiece(middle.graph)
    low, high = piece.ranged(2, 16), piece.ranged(17, 40)
    planning.clear()
    for size in (2, 16, 17, 40):
        piece(*middle.make_inputs(size, device))
    assert planning == [] and piece.serving(2) is low[0].plan and piece.serving(40) is high[0].plan
    # The later one serves what both hold, and the earlier one what is left.
    within = piece.ranged(8, 20)
    assert [piece.serving(size) for size in (7, 8, 20, 21)] == [
        low[0].plan, within[0].plan, within[0].plan, high[0].plan,
    ]  # fmt: skip
    assert piece.summary().count("kernels") == 3


def test_a_size_that_has_a_plan_keeps_it(middle, device, planning):
    piece = CompiledPiece(middle.graph)
    run = piece.at(middle.make_inputs(7, device))
    piece.ranged(2, 40)
    assert piece.at(middle.make_inputs(7, device)) is run
    assert piece.at(middle.make_inputs(8, device)) is not run


def test_equal_pieces_share_a_range(device, planning):
    first, second = (pieces("gpt2", tiny=True, dtype=torch.float32, layers=3, device=device)[i] for i in (1, 2))
    CompiledPiece(first.graph).ranged(2, 40)
    planning.clear()
    twin = CompiledPiece(second.graph)
    twin.ranged(2, 40)
    assert planning == []
    args = second.make_inputs(5, device)
    ours, theirs = twin(*args), second.graph(*args)
    torch.testing.assert_close(ours[-1], theirs[-1])


def test_other_alignments_bring_their_own_plans_once(middle, device, planning):
    piece = CompiledPiece(middle.graph)
    piece.ranged(2, 40)
    args = middle.make_inputs(5, device)
    hidden = max(
        (i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.shape[0] == 5), key=lambda i: args[i].dim()
    )
    planning.clear()
    for size in (5, 6):
        args = middle.make_inputs(size, device)
        moved = at_offset(UNALIGNED, *args[hidden].shape, device=device)
        args[hidden] = moved.copy_(args[hidden])
        torch.testing.assert_close(piece(*args)[-1], middle.graph(*args)[-1])
    assert planning and all(isinstance(size, tuple) for size in planning)


def test_a_piece_of_fixed_shapes_has_no_range(device, planning):
    x = torch.randn(3, 4, device=device)
    piece = CompiledPiece(graph_of(lambda x: x + 1, 1), [x])
    (found,) = piece.ranged(1, 8)
    assert found.plan is None and "0 sizes" in found.why and planning == []
    assert torch.equal(piece(x), x + 1)


@pytest.mark.parametrize(("lo", "hi"), [(3, 2), (-1, 4), (1.0, 4), (1, True)])
def test_what_is_no_range_is_a_mistake(middle, lo, hi):
    with pytest.raises(UserError, match=f"{lo} to {hi}"):
        CompiledPiece(middle.graph).ranged(lo, hi)


def test_a_piece_that_cannot_be_lowered_says_so_once(middle, device, monkeypatch, caplog):
    def refuse(*args):
        raise Unsupported("node mul_3", "it is unlucky", stage="define")

    monkeypatch.setattr(lowered, "make_trace", refuse)
    piece = CompiledPiece(middle.graph)
    with caplog.at_level(logging.WARNING, "terrazzo"):
        (found,) = piece.ranged(2, 40)
        args = middle.make_inputs(4, device)
        assert torch.equal(piece(*args)[-1], middle.graph(*args)[-1])
    assert found.plan is None and "it is unlucky" in found.why and len(caplog.records) == 1
    assert piece.summary().startswith("runs as the graph it was: ")


def test_a_range_of_which_a_part_cannot_be_planned_is_tried_once(middle, device, monkeypatch, caplog):
    tried, make_plan = [], lowered.make_plan

    def refuse(traced, binding, *args, **more):
        tried.append(binding)
        if any(not isinstance(size, int) and size.span.hi <= 128 for size in binding.values()):
            raise Unsupported("node mul_3", "it is unlucky with few tokens", stage="define")
        return make_plan(traced, binding, *args, **more)

    monkeypatch.setattr(lowered, "make_plan", refuse)
    caplog.set_level(logging.WARNING, "terrazzo")
    for planned in (True, False):
        tried.clear()
        piece = CompiledPiece(middle.graph)
        (found,) = piece.ranged(2, 150)
        assert found.plan is None and "few tokens" in found.why and bool(tried) == planned
        for size in (4, 140):
            args = middle.make_inputs(size, device)
            assert torch.equal(piece(*args)[-1], middle.graph(*args)[-1])


def test_the_summary_names_regimes(middle):
    piece = CompiledPiece(middle.graph)
    piece.ranged(17, 40)
    assert piece.summary() == "17-40: 6 kernels, 0 ops as themselves"


def test_an_equal_pieces_inputs_are_written_apart(device, monkeypatch):
    """What a plan writes is known by the names of the piece that it was made for."""

    def named(*names):
        graph = fx.Graph()
        written, read = (graph.placeholder(n) for n in names)
        doubled = graph.call_function(torch.mul, (written, 2))
        graph.call_method("copy_", (written, doubled))
        graph.output(graph.call_function(torch.add, (read, 1)))
        return fx.GraphModule(torch.nn.Module(), graph)

    examples = [torch.zeros(8, device=device) for _ in range(2)]
    CompiledPiece(named("a", "b"), examples)(*examples)
    twin = CompiledPiece(named("c", "d"), examples)
    memory, same = torch.arange(16.0, device=device), torch.arange(16.0, device=device)
    got = twin(memory[:8], memory[4:12])
    assert torch.equal(got, named("c", "d")(same[:8], same[4:12])) and torch.equal(memory, same)


COVERED = """
import json, sys, torch
from terrazzo.kernels import launch
from terrazzo.kernels.target import Target
from terrazzo.lowering.intake import Examples
from terrazzo.lowering.options import Options
from terrazzo.runtime.lowered import planned_range
from terrazzo.runtime.load import load
from terrazzo.runtime.warm import hollow, telling
from terrazzo.tools.models import pieces

torch.cuda.current_device = lambda: 0
target = Target.named("h200")
Target.current = staticmethod(lambda device=None: target)
made = []

def note(self, grid, *args):
    made.append((id(self._compiled), launch._describe(args, hollow=True)[1]))

launch.Kernel.__call__ = note

def binaries(plan, call, size):
    made.clear()
    call(*hollow(plan.facts, size))
    return set(made)

missing = []
for graph in [pieces(name)[1].graph for name in ("llama-3.2-1b", "gpt2")]:
    for regime in planned_range(graph, Examples.of(graph, None), 2, 2100, Options(target)):
        call = load(regime.plan)
        told = telling(regime.plan.facts, regime.lo, regime.hi)
        there = set().union(*(binaries(regime.plan, call, size) for size in told))
        sizes = sorted({*range(regime.lo, min(regime.hi, 40)), *range(regime.lo, regime.hi, 137), regime.hi})
        missing += [size for size in sizes if not binaries(regime.plan, call, size) <= there]
print(json.dumps(missing))
"""


def test_the_sizes_compiled_for_launch_every_binary():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COVERED], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
