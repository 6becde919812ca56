"""Floats that Dynamo makes arguments: constants of the graph, one piece for each set of values, up to a limit."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from terrazzo.runtime import floats
from terrazzo.runtime.backend import terrazzo
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.runtime.floats import ByFloats, float_arguments, with_floats


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(fn, found):
    def backend(graph, inputs):
        found.append(terrazzo(graph, inputs))
        return found[-1]

    return torch.compile(fn, backend=backend, dynamic=True, fullgraph=True)


def own_ops(piece):
    return [k.name for loaded in piece.plans.values() for k in loaded.plan.schedule.launches() if not k.family]


def test_a_float_is_a_constant_of_the_kernel(device):
    found = []
    run = compiled(lambda x, eps: torch.nn.functional.dropout(x / (x.norm() + eps), eps, False) * (eps * 2), found)
    x = torch.randn(5, device=device)
    torch.testing.assert_close(run(x, 0.25), x / (x.norm() + 0.25) * 0.5)
    [piece] = found[0].pieces.values()
    assert isinstance(found[0], ByFloats) and piece.plans and not own_ops(piece)
    assert "0 ops as themselves" in found[0].summary()


def test_each_value_has_its_piece_until_there_are_too_many(device):
    found = []
    run = compiled(lambda x, a, b: x * a + b, found)
    x = torch.randn(5, device=device)
    for step in range(floats.LIMIT + 3):
        a = 1.5 + step
        torch.testing.assert_close(run(x, a, 0.5), x * a + 0.5)
        torch.testing.assert_close(run(x, a, 0.5), x * a + 0.5)
    assert len(found) == 1, "Dynamo compiled again for a float"
    # One for each of the first values, and one in which `a` is read at run time and `b` still is a constant.
    assert len(found[0].pieces) == floats.LIMIT + 1 and len(found[0].bound) == 1


def test_values_are_told_apart_by_their_bits(device):
    found = []
    run = compiled(lambda x, a: x.copysign(torch.full_like(x, a)), found)
    x = torch.ones(3, device=device)
    assert [run(x, a)[0].item() for a in (0.0, -0.0, 0.0)] == [1.0, -1.0, 1.0]
    assert len(found[0].pieces) == 2


def test_a_tensor_that_is_computed_with_is_no_float():
    graph = fx.symbolic_trace(lambda x, s, t: x * s.item() + t)
    x, s = torch.randn(3), torch.tensor(2.0, dtype=torch.float64)
    assert float_arguments(graph, [x, s, s]) == [1]
    assert float_arguments(graph, [x, s.float(), s]) == []
    assert isinstance(terrazzo(fx.symbolic_trace(lambda x: x + 1), [x]), CompiledPiece)


def test_the_graph_given_stays_as_it_is():
    graph = fx.symbolic_trace(lambda x, s: x * s.item())
    before = str(graph.graph)
    bound = with_floats(graph, {1: 3.0})
    x = torch.randn(3)
    assert torch.equal(bound(x, torch.tensor(7.0)), x * 3) and str(graph.graph) == before
