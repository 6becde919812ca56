"""Pieces in every dialect they come in: Dynamo's torch-level FX and ATen, custom ops that write their arguments, opaque
arguments, what is returned sharing memory, sizes 0 and 1, pieces that are equal, pieces that cannot be lowered."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from terrazzo.lowering import pipeline
from terrazzo.lowering.errors import Unsupported
from terrazzo.lowering.intake import Examples, intake
from terrazzo.lowering.specialize import failed_guard
from terrazzo.runtime import lowered
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools.models.fakes import SizeSpec, TensorSpec, with_fakes

from .equal import DEVICE, compare, copied, odd, traced

SIZES = (5, 3, 16, 1, 0)


@torch.library.custom_op("terrazzo_test::attend_into", mutates_args=("out",))
def attend_into(query: torch.Tensor, out: torch.Tensor, layer: str) -> None:
    out.copy_(query.cumsum(0) * len(layer))


@attend_into.register_fake
def _(query: torch.Tensor, out: torch.Tensor, layer: str) -> None:
    return None


@torch.library.custom_op("terrazzo_test::shift_and_sum", mutates_args=("x",))
def shift_and_sum(x: torch.Tensor, by: float) -> torch.Tensor:
    x.add_(by)
    return x.sum(-1)


@shift_and_sum.register_fake
def _(x: torch.Tensor, by: float) -> torch.Tensor:
    return x.new_empty(x.shape[:-1])


def spec(*shape: Any) -> TensorSpec:
    """A contiguous fp32 tensor whose first dimension may be 's'."""
    strides, step = [], 1
    for size in reversed(shape[1:]):
        strides.append(step)
        step *= size
    return TensorSpec(shape, (*([step] if shape else []), *reversed(strides)), torch.float32, DEVICE)


def piece_of(build: Callable[[fx.Graph], Any], *specs: Any) -> CompiledPiece:
    """A hand-written graph whose placeholders carry fake values."""
    graph = fx.Graph()
    graph.output(build(graph))
    return CompiledPiece(with_fakes(fx.GraphModule(torch.nn.Module(), graph), list(specs)))


def same_as_graph(piece: CompiledPiece, *args: Any) -> None:
    """Asserts that the piece does to these arguments what its graph does."""
    ours, theirs = copied(args), copied(args)
    with torch.no_grad():
        results = (piece(*ours), ours), (piece.graph(*theirs), theirs)
    compare(*results, close=True)
    assert "as the graph it was" not in piece.summary()


def torch_level(g: fx.Graph) -> Any:
    """As vLLM hands a piece over."""
    x, s, w, b = (g.placeholder(n) for n in "xswb")
    flat = g.call_method("view", (x, -1, 8))
    h = g.call_function(torch._C._nn.linear, (flat, w, b))
    left = g.call_function(operator.getitem, (h, (Ellipsis, slice(None, 6, None))))
    right = g.call_function(operator.getitem, (h, (slice(None), None, slice(6, None, 2))))
    split = g.call_method("split", (h, [2, 10]), {"dim": -1})
    tail = g.call_function(operator.getitem, (split, 1))
    size = g.call_method("size", (left,))
    out = g.call_function(torch.empty, (size,), {"dtype": torch.float32, "device": DEVICE})
    shaped = g.call_method("view", (out, s, 2, 3))
    heads = g.call_method("view", (g.call_method("contiguous", (left,)), s, 2, 3))
    filled = g.call_method("copy_", (shaped, heads))
    last = g.call_function(operator.getitem, (h, (slice(None), -1)))
    scaled = g.call_function(operator.mul, (last, s))
    return (filled, right, g.call_method("sum", (tail,), {"dim": -1, "keepdim": True}), scaled, s)


def test_dynamos_dialect_at_every_size() -> None:
    piece = piece_of(torch_level, spec("s", 8), SizeSpec("s"), spec(12, 8), spec(12))
    for size in SIZES:
        same_as_graph(piece, odd(size, 8), size, odd(12, 8, seed=1), odd(12, seed=2))
    assert len(piece.plans) == len(SIZES)


def test_torch_size_as_an_argument_and_one_bare_result() -> None:
    def build(g: fx.Graph) -> Any:
        x = g.placeholder("x")
        return g.call_method("expand", (x, torch.Size([4, 3, 5])))

    same_as_graph(piece_of(build, spec(3, 5)), odd(3, 5))


def aten(fn: Callable[..., Any], *args: Any) -> CompiledPiece:
    """The function as ATen FX with symbolic sizes."""
    return CompiledPiece(make_fx(fn, tracing_mode="symbolic")(*copied(args)))


def test_aten_at_every_size() -> None:
    def fn(x: Any, w: Any) -> Any:
        h = torch.nn.functional.silu(x @ w).view(x.shape[0], 2, 3)
        return h.transpose(0, 1).reshape(-1), torch.arange(x.shape[0], device=x.device) + h[:, 0, 0], x.shape[0] * 2

    piece = aten(fn, odd(7, 4), odd(4, 6))
    assert any("sym_size" in str(n.target) for n in piece.graph.graph.nodes)
    for size in SIZES:
        same_as_graph(piece, odd(size, 4), odd(4, 6, seed=1))


def test_aten_that_writes_in_place() -> None:
    def fn(x: Any, y: Any) -> Any:
        x[1:].mul_(2)
        y.add_(x)
        return x.t() @ y

    piece = aten(fn, odd(7, 4), odd(7, 4))
    for size in SIZES:
        same_as_graph(piece, odd(size, 4), odd(size, 4, seed=1))


def attends(g: fx.Graph) -> Any:
    """A buffer made here is filled by an op that writes its argument, as attention does."""
    x = g.placeholder("x")
    out = g.call_function(torch.empty_like, (x,))
    query = g.call_function(torch.relu, (x,))
    g.call_function(torch.ops.terrazzo_test.attend_into, (query, out, "layers.3"))
    return (g.call_function(operator.add, (out, query)), out)


def test_an_op_that_writes_a_buffer_of_the_piece() -> None:
    piece = piece_of(attends, spec("s", 6))
    for size in SIZES:
        same_as_graph(piece, odd(size, 6))
    assert "1 ops as themselves" in piece.summary()


def test_an_op_that_writes_an_input_or_a_view_of_it_and_returns() -> None:
    def build(g: fx.Graph) -> Any:
        x, y = g.placeholder("x"), g.placeholder("y")
        view = g.call_function(operator.getitem, (y, (slice(None), slice(1, 4))))
        total = g.call_function(torch.ops.terrazzo_test.shift_and_sum, (view, 0.5))
        g.call_function(torch.ops.terrazzo_test.attend_into, (y, x, "ab"))
        return (g.call_function(operator.mul, (total, 2)), g.call_method("relu", (x,)))

    piece = piece_of(build, spec("s", 6), spec("s", 6))
    for size in SIZES:
        same_as_graph(piece, odd(size, 6), odd(size, 6, seed=1))


class Metadata:
    """What a piece may be handed besides tensors and sizes."""


def test_an_argument_that_is_neither_tensor_nor_size_is_passed_over() -> None:
    fn = traced(lambda x, metadata, flag: x * 2, 3)
    args = odd(3, 4), Metadata(), None
    piece = CompiledPiece(fn, args)
    assert [i.kind for i in intake(fn, Examples.of(fn, args)).inputs] == ["tensor", "opaque", "opaque"]
    same_as_graph(piece, *args)


def test_a_script_object_reaches_the_op_that_takes_it() -> None:
    opaque = pytest.importorskip("torch._library.opaque_object")

    class Factor(opaque.OpaqueBase):
        def __init__(self, value: float) -> None:
            self.value = value

    # A schema names the class, and knows no local ones.
    Factor.__qualname__ = "Factor"
    opaque.register_opaque_type(Factor, typ="reference")

    def scale(x: torch.Tensor, by: Factor) -> torch.Tensor:
        return x * by.value

    scale.__annotations__ = {"x": torch.Tensor, "by": Factor, "return": torch.Tensor}
    op = torch.library.custom_op("terrazzo_test::scale", scale, mutates_args=())
    op.register_fake(lambda x, by: torch.empty_like(x))
    graph = fx.Graph()
    x, by = graph.placeholder("x"), graph.placeholder("by")
    graph.output((graph.call_function(torch.relu, (graph.call_function(torch.ops.terrazzo_test.scale, (x, by)),)),))
    piece = CompiledPiece(fx.GraphModule(torch.nn.Module(), graph), [odd(3, 4).to(DEVICE), Factor(3.0)])
    for value in (3.0, -4.0):
        got = piece(odd(3, 4).to(DEVICE), Factor(value))
        assert torch.equal(got[0], torch.relu(odd(3, 4).to(DEVICE) * value))
    assert piece.summary() == "fixed: 1 kernels, 1 ops as themselves"


def test_what_is_returned_shares_what_it_shares_in_eager() -> None:
    def fn(x: Any, y: Any) -> Any:
        z = (x + 1).view(6, 2)
        return y, x[1:, ::2], x, x.t(), z, z.t()[1], z.view(-1), y

    same_as_graph(CompiledPiece(traced(fn, 2), [odd(3, 4), odd(2)]), odd(3, 4), odd(2))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects the bindings of traces: None for one with symbolic sizes."""
    bindings: list[Any] = []
    real = lowered.make_trace

    def trace(graph: Any, examples: Any, binding: Any = None, *rest: Any) -> Any:
        bindings.append(dict(binding) if binding is not None else None)
        return real(graph, examples, binding, *rest)

    monkeypatch.setattr(lowered, "make_trace", trace)
    return bindings


def test_one_trace_serves_all_sizes_whose_guards_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = counted(monkeypatch)

    def build(g: fx.Graph) -> Any:
        return (g.call_function(operator.add, (g.placeholder("x"), 41.5)),)

    piece = piece_of(build, spec("s", 4))
    for size in (2, 3, 64, 1001):
        same_as_graph(piece, odd(size, 4))
    assert bindings == [None]
    # 0 and 1 are traced for themselves: broadcasting and contiguity differ.
    for size in (1, 0):
        same_as_graph(piece, odd(size, 4))
    assert [list(b.values()) for b in bindings[1:]] == [[1], [0]]


def test_a_guard_that_fails_means_a_trace_for_that_size(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = counted(monkeypatch)

    def build(g: fx.Graph) -> Any:
        # Whether the last chunk is as large as the others is taken for granted, as it was for the size traced with.
        return (g.call_method("chunk", (g.call_method("sin", (g.placeholder("x"),)), 3)),)

    piece, sizes = piece_of(build, spec("s", 4)), (8, 9, 3, 14, 2)
    for size in sizes:
        same_as_graph(piece, odd(size, 4))
    symbolic = pipeline.trace(piece.graph, piece.examples)
    [symbol] = symbolic.symbols
    anew = [size for size in sizes if failed_guard(symbolic, {symbol: size})]
    assert 0 < len(anew) < len(sizes)
    assert [list(b.values()) for b in bindings if b is not None] == [[size] for size in anew]
    assert bindings.count(None) == 1


def test_equal_pieces_share_plans_whatever_their_nodes_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = counted(monkeypatch)

    def build(name: str, factor: float) -> CompiledPiece:
        def graph(g: fx.Graph) -> Any:
            x = g.create_node("placeholder", name, (), name=name)
            return (g.create_node("call_function", operator.mul, (x, factor), name=f"{name}_mul"),)

        return piece_of(graph, spec("s", 3))

    first, second, other = build("hidden", 7.25), build("residual", 7.25), build("hidden", 7.5)
    for piece in (first, second, other):
        same_as_graph(piece, odd(5, 3))
    assert first.plans is second.plans
    assert other.plans is not first.plans
    assert bindings == [None, None]


def test_pieces_of_equal_text_keep_their_own_weights() -> None:
    def holding(seed: int) -> CompiledPiece:
        root = torch.nn.Module()
        root.register_buffer("scale", odd(3, seed=seed).to(DEVICE))
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output(graph.call_function(operator.mul, (x, graph.get_attr("scale"))))
        return CompiledPiece(fx.GraphModule(root, graph), [odd(4, 3).to(DEVICE)])

    for seed in (1, 2):
        same_as_graph(holding(seed), odd(4, 3))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.nonzero() * 2,
        lambda x: x[x > 0] + 1,
        lambda x: torch.unique(x).sum(),
        lambda x: x.new_zeros(x.sum().to(torch.int64).abs().item()),
    ],
)
def test_shapes_that_depend_on_data_run_as_they_were_and_say_why(
    fn: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    args = [odd(4, 3).to(DEVICE)]
    piece = CompiledPiece(traced(fn, 1), args)
    with caplog.at_level(logging.WARNING, "terrazzo"):
        got = piece(*args)
        piece(*args)
    compare(got, fn(*args))
    assert piece.summary().startswith("runs as the graph it was: ")
    [warning] = [r.getMessage() for r in caplog.records if r.name == "terrazzo"]
    assert "depend" in warning and "[intake]" in warning


def test_a_symbol_that_no_argument_holds_is_refused() -> None:
    doubled = ["mul", 2, "s"]
    piece = piece_of(lambda g: (g.call_method("sin", (g.placeholder("x"),)),), TensorSpec(
        (doubled, 3), (3, 1), torch.float32, DEVICE
    ))  # fmt: skip
    with pytest.raises(Unsupported, match="no argument holds"):
        intake(piece.graph, piece.examples)


@pytest.mark.parametrize("fn", [lambda x: x.unsqueeze_(0), lambda x: x.t_(), lambda x: x.resize_(2, 2)])
def test_changing_the_geometry_of_an_input_is_refused(fn: Callable[..., Any]) -> None:
    graph = traced(fn, 1)
    with pytest.raises(Unsupported, match="changes the shape of an input"):
        intake(graph, Examples.of(graph, [odd(3, 3)]))
