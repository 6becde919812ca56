"""The Dynamo backend itself: what it makes of a graph, and what it refuses. `tests/e2e/test_torch_compile.py` is the
way users reach it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import fx, nn

from terrazzo.lowering.errors import UserError
from terrazzo.runtime.backend import terrazzo
from terrazzo.runtime.compiled import CompiledPiece


def graph(fn=lambda x, w: torch.relu(x) @ w):
    return fx.symbolic_trace(fn)


def inputs(device, *, grad=False):
    return [torch.randn(3, 4, device=device), nn.Parameter(torch.randn(4, 2, device=device), requires_grad=grad)]


def test_a_graph_becomes_a_piece_that_is_compiled_when_called(device):
    args = inputs(device)
    made = terrazzo(graph(), args)
    assert isinstance(made, CompiledPiece) and not made.plans
    torch.testing.assert_close(made(*args), graph()(*args))
    assert len(made.plans) == 1


def test_numbers_among_the_inputs(device):
    x = torch.randn(3, 4, device=device)
    torch.testing.assert_close(terrazzo(graph(lambda n, x: x * n), [3, x])(3, x), x * 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_gradients_count_only_where_they_are_recorded(device, mode):
    args = inputs(device, grad=True)
    recorded = mode is contextlib.nullcontext
    with mode(), pytest.raises(UserError) if recorded else contextlib.nullcontext() as raised:
        torch.testing.assert_close(terrazzo(graph(), args)(*args), graph()(*args))
    if recorded:
        assert "1 inputs require gradients" in raised.value.fact and raised.value.stage == "backend"
        assert "torch.no_grad()" in raised.value.remedy


@pytest.mark.parametrize("given", [{"mode": "reduce-overhead"}, {"options": {"x": 1}}, {"mode": "a", "options": {}}])
def test_options_are_refused_with_their_values(device, given):
    with pytest.raises(UserError) as raised:
        terrazzo(graph(), inputs(device), **given)
    assert all(f"{name}={value!r}" in raised.value.fact for name, value in given.items())
