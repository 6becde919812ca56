"""When two pieces count as equal: too strict costs time, too lax computes another piece's numbers."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import checkpoint

from terrazzo.lowering.intake import Examples
from terrazzo.runtime.backend import terrazzo
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.runtime.fingerprint import fingerprint
from terrazzo.tools.models import pieces

X = torch.zeros(3, 4)


def digest(fn, *args, root=None):
    """The fingerprint of a function of tensors, as FX reads it."""
    graph = fx.GraphModule(root or nn.Module(), fx.Tracer().trace(fn if root is None else root))
    return fingerprint(graph, Examples(args))


def scaled(x):
    return torch.add(x * 2.0, x, alpha=3).to(torch.float16)


class Holding(nn.Module):
    """x * first + second, under names that can be chosen."""

    def __init__(self, first, second, names=("a", "b")):
        super().__init__()
        self.names = names
        for name, tensor in zip(names, (first, second), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x):
        return x * getattr(self, self.names[0]) + getattr(self, self.names[1])


def test_the_layers_of_a_model_are_one_piece():
    digests = [fingerprint(p.graph, Examples.of(p.graph, None)) for p in pieces("llama-3.2-1b", tiny=True)]
    first, *middle, last = digests
    assert None not in digests and len(middle) > 1
    assert len(set(middle)) == 1 and len({first, middle[0], last}) == 3


def test_what_ops_ask_torch_for_counts():
    plain = digest(scaled, X)
    with torch.autocast("cpu", torch.bfloat16):
        cast = digest(scaled, X)
    with torch.autocast("cpu", torch.float16):
        other = digest(scaled, X)
    torch.set_default_dtype(torch.float64)
    try:
        wide = digest(scaled, X)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len({plain, cast, other, wide}) == 4 and digest(scaled, X) == plain


def test_equal_functions_under_autocast_and_without_return_their_own_dtypes():
    def linear(x, w):
        return torch.nn.functional.linear(x, w)

    compiled, x, w = torch.compile(linear, backend=terrazzo), torch.randn(4, 8), torch.randn(3, 8)
    with torch.no_grad():
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                assert compiled(x, w).dtype == torch.bfloat16
            assert compiled(x, w).dtype == torch.float32


class Both(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def test_what_results_come_in_counts():
    given = [lambda x: [x, x * 2], lambda x: (x, x * 2), lambda x: Both(x, x * 2)]
    kinds = [type(CompiledPiece(fx.symbolic_trace(fn), [X])(X)) for fn in given]
    assert kinds == [list, tuple, Both]


def test_names_do_not_count():
    def renamed(tokens):
        doubled = tokens * 2.0
        return torch.add(doubled, tokens, alpha=3).to(torch.float16)

    assert None is not digest(scaled, X) == digest(renamed, X)


def test_symbols_count_by_their_order():
    def symbolic(*hints):
        env = ShapeEnv()
        symbols = [env.create_symbol(hint, source=ConstantSource(f"size_{hint}")) for hint in hints]
        sizes = [env.create_symintnode(symbol, hint=hint) for symbol, hint in zip(symbols, hints, strict=True)]
        with FakeTensorMode(shape_env=env):
            return [*sizes, torch.empty(sizes)]

    def fn(n, m, x):
        return x + 1

    assert digest(fn, *symbolic(7, 9)) == digest(fn, *symbolic(11, 5))
    n, m, x = symbolic(7, 9)
    assert digest(fn, n, m, x) != digest(fn, m, n, x)


DIFFERENT = {
    "constant": (lambda x: torch.add(x * 2.5, x, alpha=3).to(torch.float16), X),
    "the constant's type": (lambda x: torch.add(x * 2, x, alpha=3).to(torch.float16), X),
    "keyword argument": (lambda x: torch.add(x * 2.0, x, alpha=4).to(torch.float16), X),
    "dtype asked for": (lambda x: torch.add(x * 2.0, x, alpha=3).to(torch.bfloat16), X),
    "op": (lambda x: torch.sub(x * 2.0, x, alpha=3).to(torch.float16), X),
    "which argument": (lambda x: torch.add(x, x * 2.0, alpha=3).to(torch.float16), X),
    "method": (lambda x: torch.add(x * 2.0, x, alpha=3).type(torch.float16), X),
    "input's dtype": (scaled, X.double()),
    "input's shape": (scaled, torch.zeros(4, 3)),
    "input's stride": (scaled, torch.zeros(4, 3).t()),
    "input's device": (scaled, X.to("meta")),
    "parameter": (scaled, nn.Parameter(X)),
    "number, not tensor": (scaled, 3),
}


@pytest.mark.parametrize(("fn", "arg"), DIFFERENT.values(), ids=DIFFERENT)
def test_everything_else_counts(fn, arg):
    assert None is not digest(fn, arg) != digest(scaled, X)


def test_sign_of_zero_and_bools_are_told_apart():
    def adding(number):
        return lambda x: torch.add(x, number)

    digests = {digest(adding(number), X) for number in (0.0, -0.0, 0, False, float("nan"))}
    assert None not in digests and len(digests) == 5


def test_tied_weights_are_another_piece():
    one, two = torch.randn(4), torch.randn(4)
    assert digest(None, X, root=Holding(one, one)) != digest(None, X, root=Holding(one, two))


def test_what_has_no_text_is_never_shared():
    body = nn.Module()
    body.anything = object()
    graph = fx.Graph()
    x, thing = graph.placeholder("x"), graph.get_attr("anything")
    graph.output(graph.call_function(lambda a, b: a, (x, thing)))
    assert fingerprint(fx.GraphModule(body, graph), Examples((X,))) is None


def test_functions_that_share_a_name_are_never_shared():
    def applying(fn):
        graph = fx.Graph()
        graph.output(graph.call_function(fn, (graph.placeholder("x"),)))
        return fingerprint(fx.GraphModule(nn.Module(), graph), Examples((X,)))

    assert applying(lambda x: x + 1) is None
    assert applying(torch.nn.functional.silu) is not None


def check(graph, x):
    """Compiled like eager; gives the piece."""
    piece = CompiledPiece(graph, [x])
    torch.testing.assert_close(piece(x), graph(x))
    assert piece.plans
    return piece


def test_equal_pieces_with_other_names_keep_their_own_tensors(device):
    x = torch.randn(3, 4, device=device)
    holding = [Holding(torch.randn(4), torch.randn(4), names).to(device) for names in (("a", "b"), ("b", "a"), "cd")]
    first, *others = [check(fx.symbolic_trace(module), x) for module in holding]
    assert all(piece.plans is first.plans for piece in others)


def test_tied_then_untied(device):
    x, tied = torch.randn(3, 4, device=device), torch.randn(4, device=device)
    for second in (tied, torch.randn(4, device=device)):
        check(fx.symbolic_trace(Holding(tied, second)), x)


def test_called_modules_keep_their_own_tensors(device):
    x = torch.randn(3, 4, device=device)
    linear = nn.Linear(4, 4).requires_grad_(False).to(device)
    for module in (linear, copy.deepcopy(linear), nn.Linear(4, 4).requires_grad_(False).to(device), nn.Tanh()):
        if module is not linear and isinstance(module, nn.Linear):
            module.weight.add_(1)
        check(fx.symbolic_trace(nn.Sequential(module)), x)


def test_bodies_of_higher_order_ops_count(device):
    x = torch.randn(3, 4, device=device)
    torch._dynamo.reset()
    for body in (lambda y: y * 2 + 1, lambda y: y * 3 - 1):

        def fn(x, body=body):
            return checkpoint(body, x, use_reentrant=False)

        torch.testing.assert_close(torch.compile(fn, backend=terrazzo)(x), body(x))
    torch._dynamo.reset()


def test_what_an_op_writes_counts():
    def of(schema: str) -> str | None:
        library = torch.library.Library("terrazzo_test_schema", "DEF")
        library.define(schema)
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.zeros(3)
        graph.call_function(torch.ops.terrazzo_test_schema.op.default, (x, x))
        graph.output((x,))
        module = fx.GraphModule(nn.Module(), graph)
        try:
            return fingerprint(module, Examples.of(module, None))
        finally:
            library._destroy()

    first, again, other = (of(f"op(Tensor(a!) a, {b} b) -> ()") for b in ("Tensor", "Tensor", "Tensor(b!)"))
    assert first == again != other
