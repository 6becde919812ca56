"""Programmatic dependent launch: which weights may be asked for early, and which kernels hold their successors back."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from terrazzo.kernels import gemm_stream
from terrazzo.kernels.gemm import GemmProblem
from terrazzo.kernels.target import Target
from terrazzo.lowering.emit import Plan
from terrazzo.lowering.intake import Examples
from terrazzo.lowering.options import Options
from terrazzo.lowering.pipeline import plan, trace
from terrazzo.runtime.compiled import CompiledPiece

from .equal import copied, traced

H200 = Options(Target.named("h200"))
STEADY = Options(Target.named("h200"), steady=True)


def planned(fn: Any, *args: torch.Tensor, options: Options = H200) -> Plan:
    made = trace(traced(fn, len(args)), Examples.of(traced(fn, len(args)), args))
    return plan(made, {}, options)


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def given(made: Plan) -> list[bool]:
    """Of each product, in order: whether its W is given."""
    problems = [k.problem for k in made.schedule.launches() if isinstance(k.problem, GemmProblem)]
    return [p.w_given for p in problems]


def early(made: Plan) -> list[bool]:
    """Of each product that streams W, in order: whether it asks for W before it waits."""
    leading = made.schedule.leading
    products = [k for k in made.schedule.launches() if k.family == "gemm_stream"]
    return [gemm_stream.asks_early(k.problem, k.name in leading) for k in products]


def held_back(made: Plan) -> list[bool]:
    """Of each launch, in order: whether its successor waits until it has waited."""
    return ["leads=True" in found for found in re.findall(r"^launch_\w+ = .*?^\)", made.source, re.M | re.S)]


def test_weights_are_given_and_results_are_not() -> None:
    assert given(planned(lambda x, w: x @ w, half(4, 256), half(256, 512))) == [True]
    # The second operand comes from the kernel before.
    assert given(planned(lambda x, w: x @ torch.softmax(w, 0), half(4, 256), half(256, 512))) == [False]
    assert given(planned(lambda x, w: (x @ w) @ (w.T @ w), half(4, 256), half(256, 256))) == [True, True, False]


def test_a_view_of_a_weight_is_as_given_as_the_weight() -> None:
    assert given(planned(lambda x, w: x @ w[:256].T, half(4, 256), half(512, 256))) == [True]


def test_a_weight_that_the_piece_writes_is_not_given() -> None:
    def fn(x: Any, w: Any) -> Any:
        y = x @ w
        w.mul_(2)
        return y

    assert given(planned(fn, half(4, 256), half(256, 512))) == [False]


def test_only_a_parameter_that_is_steady_is_asked_for_by_the_first_kernel() -> None:
    def fn(x: Any, w: Any, v: Any) -> Any:
        return (x @ w) @ v

    weights = half(4096, 4096), half(4096, 4096)
    parameters = [torch.nn.Parameter(w, requires_grad=False) for w in weights]
    assert early(planned(fn, half(4, 4096), *weights)) == [False, True]
    assert early(planned(fn, half(4, 4096), *parameters)) == [False, True]
    assert early(planned(fn, half(4, 4096), *weights, options=STEADY)) == [False, True]
    assert early(planned(fn, half(4, 4096), *parameters, options=STEADY)) == [True, True]


def test_the_first_kernel_holds_nothing_back_where_all_weights_are_steady() -> None:
    def fn(x: Any, w: Any, v: Any) -> Any:
        return (torch.softmax(x, -1) @ w) @ v

    weights = half(4096, 4096), half(4096, 2048)
    w, v = (torch.nn.Parameter(one, requires_grad=False) for one in weights)
    assert held_back(planned(fn, half(4, 4096), w, v)) == [True, False, False]
    assert held_back(planned(fn, half(4, 4096), w, v, options=STEADY)) == [False, False, False]
    # The second may be what a plan before this one computes.
    assert held_back(planned(fn, half(4, 4096), w, weights[1], options=STEADY)) == [True, False, False]


def test_a_parameter_that_the_piece_writes_is_not_steady() -> None:
    def fn(x: Any, w: Any) -> Any:
        y = x @ w
        w.mul_(2)
        return y

    w = torch.nn.Parameter(half(4096, 4096), requires_grad=False)
    assert early(planned(fn, half(4, 4096), w, options=STEADY)) == [False]


def test_the_first_kernel_holds_its_successor_back() -> None:
    def fn(x: Any, w: Any) -> Any:
        return torch.softmax(torch.relu(torch.softmax(x, -1) @ w) @ w, -1)

    assert held_back(planned(fn, half(4, 256), half(256, 256))) == [True, False, False, False]


def test_so_does_the_first_after_an_op_that_runs_as_itself() -> None:
    def fn(x: Any, w: Any) -> Any:
        return torch.sort(torch.sigmoid(x) @ w)[0].softmax(-1) @ w.T

    assert held_back(planned(fn, half(4, 256), half(256, 256))) == [True, False, True, False]


def scaled(x: Any, w: Any) -> Any:
    return torch.softmax(x.float(), -1).to(x.dtype) @ w * 40


def multiplied(x: Any, w: Any) -> Any:
    return torch.tanh(x @ w)


@pytest.mark.gpu
@pytest.mark.parametrize("use", [scaled, multiplied])
@pytest.mark.parametrize("apart", [False, True], ids=["one piece", "two pieces"])
def test_no_weight_is_read_before_it_is_written(use: Any, apart: bool, device: torch.device) -> None:
    # A tile of W that was asked for too early would hold the step before's numbers.
    def update(w: Any) -> Any:
        return torch.softmax(w.float(), -1).to(w.dtype) * 100 - w

    def both(x: Any, w: Any) -> tuple[Any, Any]:
        w = update(w)
        return use(x, w), w

    x, w = copied([half(8, 2048), half(2048, 2048)])
    results = []
    for pdl in (False, True):
        options = Options(Target.current(), pdl=pdl)
        first, second = (CompiledPiece(traced(fn, n), args, options=options)
                         for fn, n, args in ((update, 1, (w,)), (use, 2, (x, w))))  # fmt: skip
        whole = CompiledPiece(traced(both, 2), (x, w), options=options)
        step_x, step_w = x, w
        for _ in range(40):
            if apart:
                (step_w,) = as_tuple(first(step_w))
                (step_x,) = as_tuple(second(step_x, step_w))
            else:
                step_x, step_w = whole(step_x, step_w)
        results.append((step_x, step_w))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
