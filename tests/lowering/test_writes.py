"""Ops that write their arguments: called themselves, on copies only of what is needed afterwards."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch

from terrazzo.runtime.compiled import CompiledPiece

from .equal import copied, odd
from .test_intake import same_as_graph


@torch.library.custom_op("terrazzo_test::gate", mutates_args=("hidden",))
def gate(hidden: torch.Tensor, logits: torch.Tensor, by: float = 1.0) -> torch.Tensor:
    out = hidden * logits.sum(-1, keepdim=True)
    hidden.add_(by)
    return out


@gate.register_fake
def _(hidden: torch.Tensor, logits: torch.Tensor, by: float = 1.0) -> torch.Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("terrazzo_test::late", mutates_args=("hidden",))
def late(hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    hidden.add_(1)
    return hidden * logits.sum(-1, keepdim=True)


@late.register_fake
def _(hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("terrazzo_test::both", mutates_args=("a", "b"))
def both(a: torch.Tensor, x: torch.Tensor | None, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    old = a.clone(), b.clone()
    a.mul_(2)
    b.add_(0.0 if x is None else x.sum())
    return old


@both.register_fake
def _(a: torch.Tensor, x: torch.Tensor | None, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(a), torch.empty_like(b)


@torch.library.custom_op("terrazzo_test::scaled", mutates_args=("out", "out_scale"))
def scaled(x: torch.Tensor, out: torch.Tensor, out_scale: torch.Tensor, x_scale: torch.Tensor) -> torch.Tensor:
    out.add_(1)
    out_scale.mul_(3)
    return x * 10 + x_scale


@scaled.register_fake
def _(x: torch.Tensor, out: torch.Tensor, out_scale: torch.Tensor, x_scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(out)


@torch.library.custom_op("terrazzo_test::fill", mutates_args=("out",))
def fill(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x)


@fill.register_fake
def _(x: torch.Tensor, out: torch.Tensor) -> None:
    return None


@torch.library.custom_op("terrazzo_test::each", mutates_args=("outs",))
def each(outs: list[torch.Tensor]) -> None:
    for out in outs:
        out.add_(1)


OPS = torch.ops.terrazzo_test


def of_an_intermediate(x: Any, w: Any) -> Any:
    h = torch.relu(x @ w)
    return OPS.gate(h, h @ w)


def read_later(x: Any, w: Any) -> Any:
    h = torch.relu(x @ w)
    before = h.sum(-1)
    y = OPS.gate(h, h @ w, 0.5)
    return y, h.sum(-1), before


def read_before_and_after(x: Any, w: Any) -> Any:
    h = torch.relu(x @ w)
    # What nothing but a kernel reads is computed where it is read, from what h was.
    before = h * 3
    y = OPS.gate(h, h * 2)
    return y + before, h


def of_an_input(x: Any, w: Any) -> Any:
    return OPS.gate(x, x @ w) + x


def of_two(x: Any, w: Any) -> Any:
    a, b = x.exp(), x @ w
    first, second = OPS.both(a, None, b)
    third, _ = OPS.both(first, a, second)
    return a, b, first + second, third


def of_part_of_a_buffer(x: Any, w: Any) -> Any:
    out = torch.zeros_like(x)
    OPS.fill(x[:, :3] * 2, out[:, 2:5])
    OPS.fill(x[:2], out[3:5])
    return out @ w


def of_a_transposed_buffer(x: Any, w: Any) -> Any:
    out = torch.zeros_like(x)
    OPS.fill(x[:4, :4] * 2, out[1:5, :4].t())
    return out @ w


def of_what_an_op_returned(x: Any, w: Any) -> Any:
    h = OPS.gate(x.sigmoid(), w[:1])
    return OPS.gate(h, h @ w)


def of_the_same_memory(x: Any, w: Any) -> Any:
    h = torch.relu(x @ w)
    return OPS.gate(h, h[:, :1])


def of_what_it_reads_as_well(x: Any, w: Any) -> Any:
    h = torch.relu(x @ w)
    h = h.view(-1, h.shape[-1])
    return OPS.gate(h, h)


def of_what_it_reads_and_something_reads_later(x: Any, w: Any) -> Any:
    h = torch.relu(x @ w)
    return OPS.gate(h, h), h * 2


def of_what_it_reads_a_copy_of(x: Any, w: Any) -> Any:
    h = torch.relu(x @ w)
    other = torch.empty_like(h)
    other.copy_(h)
    return OPS.late(h, other)


def of_what_it_reads_under_names_that_begin_alike(x: Any, w: Any) -> Any:
    a, b = torch.relu(x @ w), x.sigmoid()
    return OPS.scaled(a, a, b, b), OPS.scaled(b, a, b, a)


def of_what_only_a_fake_hands_on(x: Any, w: Any) -> Any:
    h = torch.relu(x @ w)
    return OPS.late(h, torch.native_dropout(h, 0.5, False)[0])


def of_a_list(x: Any, w: Any) -> Any:
    a, b = x * 2, x + w[0]
    OPS.each([a, b])
    return a + b


def graph_of(fn: Any, args: list[Any]) -> torch.fx.GraphModule:
    """What Dynamo hands to a backend."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*copied(args))
    return found[0]


def call_of(piece: CompiledPiece) -> str:
    (loaded,) = piece.plans.values()
    return loaded.plan.source.partition("def call(")[2]


def call_of_what_is_right(fn: Any) -> str:
    """The text of the function's call, after it did to the same arguments what its graph does."""
    args = [odd(6, 8), odd(8, 8, seed=1)]
    piece = CompiledPiece(graph_of(fn, args), args)
    same_as_graph(piece, *args)
    return call_of(piece)


@pytest.mark.parametrize(
    ("fn", "copies"),
    [
        (of_an_intermediate, 0),
        (read_later, 1),
        (read_before_and_after, 1),
        (of_an_input, 1),
        (of_two, 2),
        (of_part_of_a_buffer, 1),
        (of_what_an_op_returned, 1),
        (of_the_same_memory, 1),
        (of_what_it_reads_as_well, 0),
        (of_what_it_reads_and_something_reads_later, 0),
        (of_what_it_reads_a_copy_of, 0),
        (of_what_it_reads_under_names_that_begin_alike, 2),
        (of_what_only_a_fake_hands_on, 1),
    ],
)
def test_it_is_called_itself(fn: Any, copies: int) -> None:
    call = call_of_what_is_right(fn)
    assert "torch.ops.terrazzo_test" in call and "OBJECTS" not in call
    assert call.count(".clone()") == copies


@pytest.mark.parametrize("fn", [of_a_list, of_a_transposed_buffer])
def test_what_is_written_otherwise_is_torchs_affair(fn: Any) -> None:
    assert "OBJECTS" in call_of_what_is_right(fn)


def test_a_value_that_is_written_twice_is_two() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    h = graph.call_function(torch.ops.aten.relu.default, (x,))
    bases = {"_a_base_index": 0, "_b_base_index": 1, "_all_bases": [h, h], "x": None}
    wrapped = graph.call_function(torch.ops.higher_order.auto_functionalized_v2, (OPS.both.default,), bases)
    graph.output(tuple(graph.call_function(operator.getitem, (wrapped, i)) for i in range(4)))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    args = [odd(6, 8)]
    same_as_graph(CompiledPiece(module, args), *args)


def test_copies_do_not_outlive_the_call() -> None:
    assert "del auto_functionalized_v2_writes_0" in call_of_what_is_right(read_later)
