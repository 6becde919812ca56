"""`torch.compile(model, backend="terrazzo")`: through the entry point, as users have it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from terrazzo.lowering.errors import UserError
from terrazzo.runtime import backend, compiled, lowered
from terrazzo.runtime.compiled import CompiledPiece

WIDTH = 24


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """A process in which nothing was compiled yet."""
    monkeypatch.setattr(compiled, "_SHARED", {})
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def made(monkeypatch):
    """The pieces that the backend makes."""
    pieces: list[CompiledPiece] = []

    class Kept(CompiledPiece):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pieces.append(self)

    monkeypatch.setattr(backend, "CompiledPiece", Kept)
    return pieces


@pytest.fixture
def traces(monkeypatch):
    """How often a piece is traced, and whether with its sizes bound."""
    bound: list[bool] = []

    def counted(graph, examples, binding=None, **kwargs):
        bound.append(binding is not None)
        return make_trace(graph, examples, binding, **kwargs)

    make_trace = lowered.make_trace
    monkeypatch.setattr(lowered, "make_trace", counted)
    return bound


class Block(nn.Module):
    """Norm, product, activation, residual; positions are a buffer."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, 40), nn.Linear(40, width, bias=False)
        self.register_buffer("position", torch.randn(width))

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(self.norm(x + self.position))))


def rows(count, device, width=WIDTH):
    return torch.randn(count, width, device=device)


def kernels_alone(pieces):
    """Every piece runs as kernels of ours."""
    launches = [k for p in pieces for loaded in p.plans.values() for k in loaded.plan.schedule.launches()]
    return bool(launches) and all(k.family for k in launches)


def test_torch_lists_the_backend():
    assert "terrazzo" in torch._dynamo.list_backends()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_a_module_by_the_backends_name(made, device, mode):
    block = Block().to(device).eval()
    run = torch.compile(block, backend="terrazzo", fullgraph=True)
    with mode():
        x = rows(5, device)
        torch.testing.assert_close(run(x), block(x))
        block.position.zero_()
        torch.testing.assert_close(run(x), block(x), msg="a buffer was written after the compilation")
    assert len(made) == 1 and kernels_alone(made)


def test_a_function_that_needs_no_gradient_runs_without_no_grad(made, device):
    fn = torch.compile(lambda x: x.relu().sum(1), backend="terrazzo")
    x = rows(3, device)
    torch.testing.assert_close(fn(x), x.relu().sum(1))
    assert kernels_alone(made)


def test_one_trace_serves_every_batch_size(made, traces, device):
    block = Block().to(device)
    run = torch.compile(block, backend="terrazzo", dynamic=True, fullgraph=True)
    with torch.no_grad():
        for count in (5, 2, 17, 5, 8):
            x = rows(count, device)
            torch.testing.assert_close(run(x), block(x))
    assert len(made) == 1, "Dynamo compiled again for a size"
    assert traces == [False], "terrazzo traced again for a size"
    assert [sizes for sizes, _ in made[0].plans] == [(5,), (2,), (17,), (8,)]
    assert kernels_alone(made)


def test_equal_modules_share_their_plans(made, traces, device):
    first, second = Block().to(device), Block().to(device)
    with torch.no_grad():
        for block in (first, second):
            # Dynamo's cache would serve the second with the first's graph, whose inputs the weights are.
            torch._dynamo.reset()
            run, x = torch.compile(block, backend="terrazzo", dynamic=False), rows(4, device)
            torch.testing.assert_close(run(x), block(x))
    assert len(made) == 2 and made[0].plans is made[1].plans and len(made[0].plans) == len(traces) == 1
    assert not torch.equal(first(x), second(x)), "with equal weights a mix-up would go unseen"


def test_modules_that_differ_share_nothing(made, device):
    with torch.no_grad():
        for width in (WIDTH, WIDTH + 8):
            block, x = Block(width).to(device), rows(4, device, width)
            torch.testing.assert_close(torch.compile(block, backend="terrazzo", dynamic=False)(x), block(x))
    assert made[0].plans is not made[1].plans


def test_a_graph_break_makes_two_pieces(made, device):
    def broken(x, weight):
        y = x @ weight
        torch._dynamo.graph_break()
        return torch.softmax(y, -1)

    x, weight = rows(3, device), torch.randn(WIDTH, 7, device=device)
    torch.testing.assert_close(torch.compile(broken, backend="terrazzo")(x, weight), broken(x, weight))
    assert len(made) == 2 and kernels_alone(made)


def test_another_dtype_is_another_piece(made, device):
    run = torch.compile(lambda x: (x * 2).sum(1), backend="terrazzo", dynamic=False)
    for dtype in (torch.float32, torch.float16):
        x = rows(3, device).to(dtype)
        assert run(x).dtype == dtype
    assert len(made) == 2 and kernels_alone(made)


def refused(run, *args):
    """The error of ours inside what Dynamo raises, after a look at what the user reads."""
    with pytest.raises(BackendCompilerFailed) as raised:
        run(*args)
    error = raised.value.inner_exception
    assert isinstance(error, UserError) and str(error) in str(raised.value)
    return error


def test_gradients_are_refused_with_what_to_do(made, device):
    block = Block().to(device)
    error = refused(torch.compile(block, backend="terrazzo"), rows(2, device))
    # norm.weight, up.weight, up.bias, down.weight
    assert "4 inputs require gradients" in error.fact and "torch.no_grad()" in error.remedy
    assert not made


def test_a_module_compiled_without_gradients_is_refused_with_them(made, device):
    run = torch.compile(Block().to(device), backend="terrazzo")
    with torch.no_grad():
        run(rows(2, device))
    assert "require gradients" in refused(run, rows(2, device)).fact
    assert len(made) == 1


@pytest.mark.parametrize(
    ("given", "named"),
    [({"options": {"max_autotune": True}}, "'max_autotune': True"), ({"mode": "max-autotune"}, "mode='max-autotune'")],
    ids=["options", "mode"],
)
def test_options_are_refused_by_name(made, device, given, named):
    run = torch.compile(Block().to(device), backend="terrazzo", **given)
    with torch.no_grad():
        error = refused(run, rows(2, device))
    assert named in error.fact and error.remedy
    assert not made


def test_a_product_added_in_place_is_not_rounded_between(made, device):
    """Of `addcdiv_` with a factor torch 2.13's Dynamo makes a prim of its own, whose operands would be rounded."""
    x, a, b = (torch.randn(5, 5).to(device, torch.bfloat16) for _ in range(3))
    wanted = x.clone().addcdiv_(a, b + 4, value=3.14)
    torch.compile(lambda x, a, b: x.addcdiv_(a, b + 4, value=3.14), backend="terrazzo")(x, a, b)
    torch.testing.assert_close(x, wanted, rtol=2**-7, atol=0.01)
    (piece,) = made
    (loaded,) = piece.plans.values()
    assert loaded.plan.facts.foreign == 0
