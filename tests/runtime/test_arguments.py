"""A piece called directly says what is wrong with its arguments, instead of reading memory that is not theirs."""

from __future__ import annotations

import enum
import math

import numpy
import pytest
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

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


def multiplied(x, n):
    return x * n


@pytest.mark.parametrize(("planned", "given"), [(3, 5), (3, 3.0), (2.0, 7.0), (0.0, -0.0), (True, False), (True, 1)])
def test_a_number_that_the_plan_holds_is_the_only_one_it_takes(device, planned, given):
    x = torch.ones(4, device=device)
    piece = CompiledPiece(fx.symbolic_trace(multiplied), [x, planned])
    assert torch.equal(piece(x, planned), x * planned)
    with pytest.raises(UserError, match=f"of number 1: it is {given}, not {planned}"):
        piece(x, given)


class Color(enum.IntEnum):
    RED = 3


@pytest.mark.parametrize(("planned", "given"), [(3, numpy.int64(3)), (3, Color.RED), (2.0, numpy.float64(2.0))])
def test_numbers_of_other_types_are_the_numbers_they_are(device, planned, given):
    x = torch.ones(4, device=device)
    assert torch.equal(CompiledPiece(fx.symbolic_trace(multiplied), [x, planned])(x, given), x * planned)


def test_a_number_that_nothing_reads_is_any(device):
    x = torch.ones(4, device=device)
    assert torch.equal(CompiledPiece(fx.symbolic_trace(lambda x, n: x * 2), [x, 3])(x, 5), x * 2)


def test_not_a_number_is_the_number_it_was(device):
    x = torch.ones(4, device=device)
    assert CompiledPiece(fx.symbolic_trace(multiplied), [x, math.nan])(x, math.nan).isnan().all()


def test_equal_pieces_with_other_numbers_have_plans_of_their_own(device):
    x = torch.ones(4, device=device)
    results = [CompiledPiece(fx.symbolic_trace(multiplied), [x, n])(x, n) for n in (2.0, 7.0)]
    assert [r[0].item() for r in results] == [2.0, 7.0]


def sized(device, made):
    """A piece of the tensors that are made for a symbolic number of rows."""
    env = ShapeEnv()
    graph = fx.symbolic_trace(lambda n, x, y: x * n + y)
    rows = env.create_symintnode(env.create_symbol(5, ConstantSource("rows"), DimDynamic.DYNAMIC), hint=5)
    with FakeTensorMode(shape_env=env):
        examples = [rows, *made(rows)]
    for node, example in zip(graph.graph.find_nodes(op="placeholder"), examples, strict=True):
        node.meta["example_value"] = example
    return CompiledPiece(graph)


def test_sizes_that_are_one_size_are_equal(device):
    piece = sized(device, lambda n: (torch.empty(n, 8, device=device), torch.empty(n, 8, device=device)))
    x = torch.ones(64, 8, device=device)
    assert torch.equal(piece(64, x, x), x * 65) and torch.equal(piece(numpy.int64(64), x, x), x * 65)
    for args, fact in [
        ((64, x, x[:3]), r"number 2: its shape is \(3, 8\), not \(64, 8\)"),
        ((3, x, x), r"number 1: its shape is \(64, 8\), not \(3, 8\)"),
        ((64.0, x, x), "number 0: it is float, not an int"),
    ]:
        with pytest.raises(UserError, match=fact):
            piece(*args)


def test_strides_that_are_computed_from_a_size_are_those(device):
    piece = sized(
        device, lambda n: (torch.empty(4, n, 8, device=device), torch.empty(4, 2 * n, device=device)[:, :1, None])
    )
    x, y = torch.ones(4, 6, 8, device=device), torch.ones(4, 12, device=device)
    assert torch.equal(piece(6, x, y[:, :1, None]), x * 7)
    with pytest.raises(UserError, match=r"number 1: its strides are \(8, 32, 1\), not \(48, 8, 1\)"):
        piece(6, x.transpose(0, 1).contiguous().transpose(0, 1), y[:, :1, None])
    with pytest.raises(UserError, match=r"number 2: its strides are"):
        piece(6, x, torch.ones(4, 13, device=device)[:, :1, None])


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
