"""`CompiledPiece`: plans by size and alignment, what falls back, what it says about itself."""

from __future__ import annotations

import gc
import logging
import re
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn

from terrazzo.lowering.errors import Unsupported
from terrazzo.runtime import bound, compiled, lowered, making
from terrazzo.runtime.compiled import CompiledPiece, options_for
from terrazzo.runtime.memory import copied
from terrazzo.tools.models import pieces

UNALIGNED = 1  # fp32 elements: four bytes past a multiple of 16


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """A process in which nothing was compiled yet."""
    monkeypatch.setattr(compiled, "_SHARED", {})


@pytest.fixture
def middle():
    """A piece with a symbolic number of tokens."""
    return pieces("llama-3.2-1b", tiny=True)[1]


def graph_of(fn, count):
    """A function of `count` tensors as FX."""
    arguments = ", ".join(f"x{i}" for i in range(count))
    root = eval(f"lambda {arguments}: fn({arguments})", {"fn": fn})
    return fx.symbolic_trace(root)


def at_offset(offset, *shape, device):
    """A tensor whose memory starts `offset` elements past an aligned address."""
    memory = torch.randn(offset + torch.Size(shape).numel(), device=device)
    return memory[offset:].view(shape)


def test_a_plan_per_size_from_one_trace(middle, device, monkeypatch):
    traced = []
    make_trace = lowered.make_trace
    monkeypatch.setattr(lowered, "make_trace", lambda *args: traced.append(args[2:]) or make_trace(*args))
    piece = CompiledPiece(middle.graph)
    for size in (2, 3, 2, 5):
        piece(*middle.make_inputs(size, device))
    assert [sizes for sizes, _ in piece.plans] == [(2,), (3,), (5,)]
    assert traced == [()]


def test_a_size_of_one_is_traced_for_itself(middle, device, monkeypatch):
    bound = []
    make_trace = lowered.make_trace
    monkeypatch.setattr(lowered, "make_trace", lambda *args: bound.extend(args[2:]) or make_trace(*args))
    CompiledPiece(middle.graph)(*middle.make_inputs(1, device))
    assert [list(binding.values()) for binding in bound] == [[1]]


def test_the_same_sizes_are_looked_up(middle, device):
    piece = CompiledPiece(middle.graph)
    first, second, other = (piece.at(middle.make_inputs(size, device)) for size in (2, 2, 3))
    assert first is second is not other


def test_equal_pieces_share_and_others_do_not(device):
    parts = pieces("llama-3.2-1b", tiny=True)
    made = [CompiledPiece(p.graph) for p in parts]
    for piece, part in zip(made, parts, strict=True):
        piece(*part.make_inputs(2, device))
    first, second, third, *_ = made
    assert second.plans is third.plans is not first.plans


def test_misaligned_inputs_have_plans_of_their_own(device):
    graph = graph_of(lambda x, w: torch.relu(x @ w), 2)
    aligned = [at_offset(0, 4, 32, device=device), at_offset(0, 32, 16, device=device)]
    piece = CompiledPiece(graph, aligned)
    for first, second in ((0, 0), (UNALIGNED, 0), (0, UNALIGNED), (4, 4)):
        args = [at_offset(first, 4, 32, device=device), at_offset(second, 32, 16, device=device)]
        torch.testing.assert_close(piece(*args), graph(*args))
    # Four fp32 elements on, memory is aligned again.
    assert [names for _, names in piece.plans] == [frozenset(), {"x0"}, {"x1"}]


def test_misaligned_tensors_that_the_piece_holds_count(device):
    class Holding(nn.Module):
        def __init__(self, offset):
            super().__init__()
            self.register_buffer("w", at_offset(offset, 32, 16, device=device), persistent=False)

        def forward(self, x):
            return x @ self.w

    x = torch.randn(4, 32, device=device)
    plans = []
    for offset in (0, UNALIGNED):
        graph = fx.symbolic_trace(Holding(offset))
        piece = CompiledPiece(graph, [x])
        torch.testing.assert_close(piece(x), graph(x))
        plans = [names for _, names in piece.plans]
    assert plans == [frozenset(), {"held_w"}]


def test_what_cannot_be_lowered_runs_as_it_was_and_says_why_once(device, monkeypatch, caplog):
    def refuse(*args):
        raise Unsupported("node mul_3", "it is unlucky", stage="define", source="model.py:7")

    monkeypatch.setattr(lowered, "make_trace", refuse)
    graph = graph_of(lambda x: torch.tanh(x * 2), 1)
    piece = CompiledPiece(graph, [torch.zeros(3, 4)])
    with caplog.at_level(logging.WARNING, "terrazzo"):
        # Two alignments ask for two plans.
        for offset in (0, UNALIGNED):
            x = at_offset(offset, 3, 4, device=device)
            assert torch.equal(piece(x), graph(x))
    (record,) = caplog.records
    for said in ("node mul_3", "model.py:7", "it is unlucky", "[define]", "dump_kernels"):
        assert said in record.getMessage()
    assert piece.summary().startswith("runs as the graph it was: ") and not piece.plans


def test_shapes_that_depend_on_data_fall_back_and_are_right(device, caplog):
    graph = graph_of(lambda x: x[x > 0] * 2, 1)
    x = torch.randn(5, 3, device=device)
    piece = CompiledPiece(graph, [x])
    with caplog.at_level(logging.WARNING, "terrazzo"):
        assert torch.equal(piece(x), graph(x))
    assert "data" in caplog.text and "graph it was" in piece.summary()


def test_a_defect_is_not_hidden_by_a_fall_back(device, monkeypatch):
    monkeypatch.setattr(lowered, "make_trace", lambda *args: 1 / 0)
    x = torch.randn(3, device=device)
    with pytest.raises(ZeroDivisionError):
        CompiledPiece(graph_of(torch.relu, 1), [x])(x)


def shifts(written, read):
    """Right only while what is read is not what is written."""
    written.copy_(written * 2)
    return read + 1


@pytest.mark.parametrize(
    ("written", "read"),
    [((0, 8), (8, 16)), ((0, 8), (0, 8)), ((0, 8), (4, 12)), ((4, 12), (0, 8)), ((0, 8), (7, 15))],
    ids=["apart", "same", "behind", "before", "by one"],
)
def test_inputs_that_overlap_what_is_written(device, written, read):
    def arguments():
        memory = torch.arange(16.0, device=device)
        return memory, [memory[slice(*written)], memory[slice(*read)]]

    graph = graph_of(shifts, 2)
    examples = [torch.zeros(8, device=device) for _ in range(2)]
    piece = CompiledPiece(graph, examples)
    piece(*examples)
    (ours, args), (theirs, same) = arguments(), arguments()
    assert torch.equal(piece(*args), graph(*same))
    assert torch.equal(ours, theirs)
    assert piece.plans, "it is for one call only that the graph runs"


def test_overlapping_inputs_run_the_graph_itself(device, monkeypatch):
    graph = graph_of(shifts, 2)
    examples = [torch.zeros(8, device=device) for _ in range(2)]
    piece = CompiledPiece(graph, examples)
    ran = []
    monkeypatch.setattr(piece.graph, "forward", lambda *args: ran.append(args))
    memory = torch.zeros(24, device=device)
    piece(memory[:8], memory[8:16])
    assert not ran
    piece(memory[:8], memory[4:12])
    assert len(ran) == 1


def test_the_first_run_writes_an_input_once(device):
    graph = graph_of(lambda x: x.add_(1), 1)
    x = torch.zeros(5, device=device)
    piece = CompiledPiece(graph, [x.clone()])
    assert piece(x) is x or torch.equal(piece.graph(torch.zeros_like(x)), x)
    assert torch.equal(x, torch.ones_like(x))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[3:].as_strided((2, 13), (27, 2)),
        lambda x: x.unfold(0, 4, 1),
        lambda x: x[1:9].view(2, 4).t().expand(3, 4, 2),
        lambda x: x[:0],
        lambda x: x[5],
    ],
)
def test_a_copy_has_the_strides_and_the_alignment(make, whole, device):
    x = make(torch.arange(64.0, device=device))
    copy = copied(x, whole)
    assert (copy.shape, copy.stride()) == (x.shape, x.stride())
    assert torch.equal(copy, x)
    assert not x.numel() or (copy.data_ptr() - x.data_ptr()) % 16 == 0


def test_what_is_written_may_have_gaps(device):
    def fn(x):
        x.zero_()
        return x.unsqueeze(0).expand(3, 2, 13)

    memory = torch.ones(60, device=device)
    x = memory[1:55].view(2, 27)[:, ::2][:, :13]
    shown = CompiledPiece(graph_of(fn, 1), [x])(x)
    assert shown.data_ptr() == x.data_ptr()
    assert memory.sum() == 60 - 26


def test_the_summary_counts_kernels_and_ops_as_themselves(middle, device):
    piece = CompiledPiece(middle.graph)
    assert piece.summary() == "not called yet"
    for size in (2, 3):
        piece(*middle.make_inputs(size, device))
    launches = [len(loaded.plan.schedule.launches()) for loaded in piece.plans.values()]
    counts = [f"({size},): {n} kernels, 0 ops as themselves" for size, n in zip((2, 3), launches, strict=True)]
    assert piece.summary() == "; ".join(counts)


def test_the_summary_names_fixed_shapes_and_foreign_ops(device, caplog):
    caplog.set_level("INFO", logger="terrazzo")
    x = torch.randn(6, 5, device=device)
    piece = CompiledPiece(graph_of(lambda x: torch.sort(x * 2).values, 1), [x])
    torch.testing.assert_close(piece(x), torch.sort(x * 2).values)
    assert piece.summary() == "fixed: 1 kernels, 1 ops as themselves"
    # The log says which, and why.
    assert re.search(r"1 ops as themselves; \w+: no lowering rule for aten", caplog.text)


@pytest.mark.parametrize("nest", [list, tuple, lambda v: {"a": v[0], "b": [v[1], None]}, lambda v: v[0]],
                         ids=["list", "tuple", "dict", "bare"])  # fmt: skip
def test_results_keep_their_structure(device, nest):
    graph = graph_of(lambda x: nest([x + 1, x * 2]), 1)
    x = torch.randn(3, device=device)
    ours, theirs = CompiledPiece(graph, [x])(x), graph(x)
    kinds = [type(v) for v in (ours, *ours.values())] if isinstance(ours, dict) else [type(ours)]
    assert kinds == ([dict, torch.Tensor, list] if isinstance(theirs, dict) else [type(theirs)])
    torch.testing.assert_close(ours, theirs)


def test_options_are_for_the_arguments_device(device):
    target = options_for([3, torch.zeros(2, device=device)]).target
    assert target.interpreted == (device.type == "cpu")


def test_an_argument_may_be_called_what_anothers_pointer_is(device):
    graph = fx.symbolic_trace(lambda r, r_ptr: r_ptr.exp() + r)
    args = torch.randn(4, 8, device=device), torch.randn(4, 8, device=device)
    piece = CompiledPiece(graph, args)
    torch.testing.assert_close(piece(*args), args[1].exp() + args[0])
    assert not piece.refusal


def drawing(x):
    return torch.rand_like(x) + x


def choosing(x):
    return torch.sort(x, stable=True)[1] + 1


def a_collective(x):
    return torch.ops._c10d_functional.all_reduce(x, "sum", "0") + 1


@pytest.mark.parametrize(("fn", "once"), [(drawing, True), (choosing, False), (a_collective, True)])
def test_what_draws_numbers_or_may_do_more_runs_once_a_call(fn, once, device, monkeypatch):
    piece = CompiledPiece(graph_of(fn, 1), [torch.randn(8, device=device)])
    lowering = piece._shared(piece.examples.values)
    loaded = lowering.loaded((), frozenset())
    assert loaded.plan.facts.foreign == 1 and loaded.plan.facts.once == once
    target = SimpleNamespace(interpreted=False)
    piece._lowered = SimpleNamespace(options=SimpleNamespace(target=target))
    warmed, ran = [], []
    monkeypatch.setattr(compiled, "warm", lambda *args: warmed.append(args))
    piece._warmed(ran.append, loaded, [torch.randn(8, device=device)], frozenset())
    assert (len(warmed), len(ran)) == (1, 0 if once else 1)


def test_random_numbers_are_eagers_from_the_first_call_on(device):
    piece, x = CompiledPiece(graph_of(drawing, 1), [torch.zeros(8, device=device)]), torch.zeros(8, device=device)
    for _ in range(2):
        torch.manual_seed(3)
        ours = piece(x)
        torch.manual_seed(3)
        assert torch.equal(ours, drawing(x))


def test_the_device_of_the_tensors_is_current_while_a_plan_runs(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert bound.on_device(lambda x: x + 1, second)(1) == 2 and entered == []
    assert bound.on_device(lambda x: x + 1, first)(1) == 2 and entered == [first]
    with making.entered(first):
        assert entered == [first, first]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert bound.on_device(len, first) is len and bound.on_device(len, torch.device("cpu")) is len


def counting(x):
    return torch.nonzero(x) * 2


def test_a_piece_that_cannot_be_traced_keeps_no_call(device):
    piece, seen = CompiledPiece(graph_of(counting, 1), [torch.ones(3, device=device)]), []
    for _ in range(3):
        x = torch.ones(3, device=device)
        seen.append(weakref.ref(x))
        piece(x)
        # At another alignment it is asked for a plan again.
        y = at_offset(UNALIGNED, 3, device=device)
        seen.append(weakref.ref(y))
        piece(y)
        del x, y
    gc.collect()
    assert piece.refusal and not any(alive() is not None for alive in seen)


def test_a_piece_that_is_gone_leaves_its_weights(monkeypatch):
    monkeypatch.setattr(compiled, "_SHARED", weakref.WeakValueDictionary())
    linear = nn.Linear(8, 8).requires_grad_(False)
    weight = weakref.ref(linear.weight)
    piece, twin = (CompiledPiece(fx.symbolic_trace(linear), [torch.ones(2, 8)]) for _ in range(2))
    piece(torch.ones(2, 8))
    twin(torch.ones(2, 8))
    assert piece._lowered is twin._lowered
    del linear, piece, twin
    gc.collect()
    assert weight() is None and not compiled._SHARED


def test_threads_that_meet_a_size_together_make_one_plan(middle, device, monkeypatch):
    planned, make_plan = [], lowered.make_plan
    monkeypatch.setattr(lowered, "make_plan", lambda *args, **more: planned.append(1) or make_plan(*args, **more))
    piece, args = CompiledPiece(middle.graph), middle.make_inputs(5, device)
    gate, runs = threading.Barrier(3), []

    def meet():
        gate.wait()
        runs.append(piece.at(args))

    threads = [threading.Thread(target=meet) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(planned) == 1 and len(runs) == 3 and len(set(runs)) == 1
