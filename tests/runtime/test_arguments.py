"""A piece called directly says what is wrong with its arguments, instead of reading memory that is not theirs."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from terrazzo.lowering.errors import UserError
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools.models import pieces


def double(x):
    return x * 2


def doubling(device):
    return CompiledPiece(fx.symbolic_trace(double), [torch.zeros(4, 6, device=device)])


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda: torch.zeros(7, 6), r"its shape is \(7, 6\), not \(4, 6\)"),
        (lambda: torch.zeros(4), r"its shape is \(4,\), not \(4, 6\)"),
        (lambda: torch.zeros(4, 6, dtype=torch.float16), "torch.float16, not torch.float32"),
        (lambda: torch.zeros(6, 4).t(), r"its strides are \(1, 4\)"),
        (lambda: 3, "it is int, not a tensor"),
        (lambda: torch.zeros(4, 6, requires_grad=True), "inference only"),
    ],
)
def test_what_is_wrong_with_an_argument_is_said(device, make, fact):
    given = make()
    given = given.to(device).detach().requires_grad_(given.requires_grad) if isinstance(given, torch.Tensor) else given
    with pytest.raises(UserError, match=fact):
        doubling(device)(given)


def test_the_number_of_arguments_is_said(device):
    with pytest.raises(UserError, match="0 were given, the piece takes 1"):
        doubling(device)()


def test_what_varies_and_what_torch_varies_passes(device):
    x = torch.ones(4, 6, device=device)
    assert torch.equal(doubling(device)(x), 2 * x)
    row = torch.ones(1, 6, device=device).as_strided((1, 6), (99, 1))
    piece = CompiledPiece(fx.symbolic_trace(double), [torch.zeros(1, 6, device=device)])
    assert torch.equal(piece(row), 2 * row)
    middle = pieces("llama-3.2-1b", tiny=True, device=device)[1]
    piece = CompiledPiece(middle.graph)
    with torch.no_grad():
        for size in (3, 5):
            piece(*middle.make_inputs(size, device))


def test_parameters_that_want_gradients_are_refused_outside_of_no_grad(device):
    graph = fx.symbolic_trace(torch.nn.Linear(8, 8).to(device))
    piece = CompiledPiece(graph, [torch.zeros(2, 8, device=device)])
    with pytest.raises(UserError, match="inference only"):
        piece(torch.zeros(2, 8, device=device))
    with torch.no_grad():
        piece(torch.zeros(2, 8, device=device))


def test_a_graph_without_examples_and_a_module_are_refused():
    with pytest.raises(UserError, match="nothing says what x looks like"):
        CompiledPiece(fx.symbolic_trace(double))
    with pytest.raises(UserError, match=r"Linear, not a torch\.fx\.GraphModule"):
        CompiledPiece(torch.nn.Linear(2, 2))
