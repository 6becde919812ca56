"""Regimes of a range: each size is served by a plan that is right there, what has no plan for all sizes says why, and
configs are those of the actual size."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from terrazzo.kernels.gemm import GemmProblem
from terrazzo.kernels.target import Target
from terrazzo.lowering.choices import LOSS, MOST, Choice, _measured, at_size, by_size, choose
from terrazzo.lowering.emit import Plan
from terrazzo.lowering.intake import Examples
from terrazzo.lowering.options import Options
from terrazzo.lowering.pipeline import plan, trace
from terrazzo.lowering.ranged import LIMIT, Regime, regimes
from terrazzo.lowering.select import Kernel, is_looped
from terrazzo.lowering.size import Span, Undecided
from terrazzo.lowering.specialize import failed_guard
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools.models import pieces

from .equal import compare, copied, doubled, odd

# Sizes up to which the hand-written pieces are run at every one.
LAST = 40


def symbolic(fn: Callable[..., Any], args: Sequence[Any]) -> fx.GraphModule:
    """The function with the first dimension of its first argument (and of those as long) symbolic."""
    args = copied(args)
    sizes = {id(a): a.shape[0] for a in args if isinstance(a, torch.Tensor)}
    tokens = sizes[id(args[0])]
    dynamic = {i: {0: torch.export.Dim.DYNAMIC} for i, a in enumerate(args) if a.dim() and a.shape[0] == tokens}
    found: list[fx.GraphModule] = []

    def take(graph: fx.GraphModule, given: Sequence[Any]) -> Any:
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    marked = list(args)
    for i in dynamic:
        torch._dynamo.mark_dynamic(marked[i], 0)
    torch.compile(fn, backend=take, fullgraph=True)(*marked)
    return found[0]


def at_every_size(
    fn: Callable[..., Any], make: Callable[[int], list[Any]], lo: int = 2, hi: int = LAST
) -> tuple[CompiledPiece, tuple[Regime, ...]]:
    """Plans the range, then compares with eager at each size."""
    graph = symbolic(fn, make(23))
    piece = CompiledPiece(graph)
    found = piece.ranged(lo, hi)
    planned = set(piece.plans)
    assert [r.lo for r in found] == [lo, *(r.hi + 1 for r in found[:-1])] and found[-1].hi == hi
    order = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    for size in range(lo, hi + 1):
        ours, theirs, exactly = (copied(make(size)) for _ in range(3))

        def given(tensors: list[Any], size: int = size) -> list[Any]:
            left = iter(tensors)
            return [size if isinstance(v, torch.SymInt) else next(left) for v in piece.examples.values]

        assert len(order) == len(given(ours))
        with torch.no_grad():
            results = piece(*given(ours)), fn(*theirs), fn(*doubled(exactly))
        compare(*(r if isinstance(r, tuple) else (r,) for r in results))
    assert any(r.plan is None for r in found) or set(piece.plans) == planned, "a size was planned at its call"
    return piece, found


def x8(size: int) -> list[Any]:
    return [odd(size, 8, seed=size)]


SERVED: dict[str, tuple[Callable[..., Any], Callable[[int], list[Any]]]] = {
    "elements": (lambda x: torch.tanh(x) * 2 + x, x8),
    "odd columns": (lambda x: x * 3 + 1, lambda n: [odd(n, 7, seed=n)]),
    "a bias": (lambda x, b: F.silu(x + b), lambda n: [odd(n, 8), odd(8)]),
    "a comparison": (lambda x: torch.where(x > x.abs() / 2, x, -x), x8),
    "heads": (lambda x: x.view(-1, 2, 4).sum(-1), x8),
    "heads first, as a view": (lambda x: (x * 2).view(-1, 2, 4).transpose(0, 1), x8),
    "halves": (lambda x: F.silu(x[:, :4]) * x[:, 4:], x8),
    "softmax": (lambda x: torch.softmax(x, -1), x8),
    "norm": (lambda x, w: F.layer_norm(x + 1, (8,), w), lambda n: [odd(n, 8), odd(8)]),
    "product": (lambda x, w: F.relu(x @ w), lambda n: [odd(n, 8), odd(8, 5)]),
    "pair": (lambda x, w: F.silu((x @ w)[:, :3]) * (x @ w)[:, 3:], lambda n: [odd(n, 8), odd(8, 6)]),
    "table": (lambda i, w: F.embedding(i, w) * 2, lambda n: [torch.arange(n) % 5, odd(5, 6)]),
    "cat of columns": (lambda x: torch.cat([x[:, 4:], -x], 1), x8),
    "an op as itself": (lambda x: torch.sort(x * 2, -1).values + 1, x8),
    "written": (lambda x: x.add_(1) * 2, x8),
    "a view returned": (lambda x: (x * 2).view(-1, 2, 4)[:, 1], x8),
    "memory only": (lambda x: (torch.empty(x.shape[0], 3).shape[1] + x, x.new_empty(x.shape[0], 2, 3).zero_()), x8),
    "the size itself": (lambda x: (x + 1, x.shape[0] * 2), x8),
    "the first rows": (lambda x: x[:2] * 2, x8),
    "doubled rows": (lambda x: x.repeat_interleave(2, 1) + 1, x8),
}


@pytest.mark.parametrize("name", SERVED)
def test_one_plan_serves_every_size(name: str) -> None:
    _, found = at_every_size(*SERVED[name])
    assert all(r.plan is not None for r in found), [r.why for r in found]


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "cat of rows": (lambda x: torch.cat([x, x * 2], 0), "body"),
    "a mean over tokens": (lambda x: x.mean(0), "size"),
    "a sum over tokens": (lambda x: x.sum(0), "reduces"),
    "a softmax over tokens": (lambda x: torch.softmax(x, 0), "reduces"),
    "transposed": (lambda x: x.t().contiguous() * 2, "body"),
    "an arange": (lambda x: torch.arange(x.shape[0], device=x.device).flip(0) + x[:, 0].long(), "body"),
    "reversed rows": (lambda x: x.flip(0) * 2, "body"),
    "the last row": (lambda x: x[-1] * 2, "body"),
    "times the size": (lambda x: x * x.shape[0], "body"),
    "compared with the size": (lambda x: x > x.shape[0], "number"),
    "a square": (lambda x: x @ x.t() + 1, "size"),
    "tokens as depth": (lambda x: x.t() @ x, "extent"),
    "rows cut in two": (lambda x: x.reshape(2, x.shape[0] // 2, 8) * 2, "divided"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_plan_serves_says_why_and_is_right(name: str) -> None:
    fn, why = REFUSED[name]
    make, step = (x8, 1) if name != "rows cut in two" else (lambda n: x8(n), 2)
    if step == 2:
        graph = symbolic(fn, make(24))
        piece = CompiledPiece(graph)
        found = piece.ranged(2, LAST)
        sizes = range(2, LAST, 2)
        for size in sizes:
            (x,) = copied(make(size))
            args = [size if isinstance(v, torch.SymInt) else x for v in piece.examples.values]
            torch.testing.assert_close(piece(*args)[0], fn(x))
    else:
        piece, found = at_every_size(fn, make, hi=12)
    reasons = [r.why for r in found if r.plan is None]
    assert reasons and all(why in reason for reason in reasons), reasons


def test_a_size_at_which_planning_decides_otherwise_begins_a_regime() -> None:
    # From 8 tokens on it is a slice, below there are fewer.
    piece, found = at_every_size(lambda x: x[:8] * 2, x8, hi=20)
    assert {r.lo for r in found} >= {8} or all(r.plan is None for r in found)
    assert any(r.plan is not None and r.lo >= 8 and r.hi == 20 for r in found)
    assert piece.plans or all(r.plan for r in found)


def test_each_regime_comes_before_the_next_is_planned_the_largest_sizes_first() -> None:
    planned: list[tuple[int, int]] = []

    def make(size: Any) -> Any:
        lo, hi = (size, size) if isinstance(size, int) else (size.span.lo, size.span.hi)
        planned.append((lo, hi))
        for cut in (9, 3):
            if lo < cut <= hi:
                raise Undecided("the size", cut)
        return object()

    came = [((r.lo, r.hi), [*planned]) for r in regimes(make, 1, 20)]
    assert [at for at, _ in came] == [(9, 20), (3, 8), (1, 2)]
    assert [before[-1] for _, before in came] == [(9, 20), (3, 8), (1, 2)]


# Published models, planned for an H200, not run: with measured products, without, and with experts as themselves.
MODELS = ("llama-3.1-8b", "gpt2", "mixtral-8x7b")


@cache
def planner(name: str, kind: str) -> tuple[Callable[[Any], Plan], Options]:
    piece = next(p for p in pieces(name, layers=3) if p.kind == kind)
    options, examples = Options(Target.named("h200")), Examples.of(piece.graph, None)
    traced = trace(piece.graph, examples)
    (symbol,), (theirs,) = traced.symbols, examples.symbols()

    def make(size: Any) -> Plan:
        if failed_guard(traced, {symbol: size}) is None:
            return plan(traced, {symbol: size}, options, title="x")
        if not isinstance(size, int):
            raise Undecided("the guards")
        return plan(trace(piece.graph, examples, {theirs: size}), {}, options, title="x")

    return make, options


@cache
def published(name: str, kind: str = "middle") -> tuple[Regime, ...]:
    make, _ = planner(name, kind)
    return tuple(sorted(regimes(make, 1, 16384), key=lambda regime: regime.lo))


@pytest.mark.parametrize("name", MODELS)
def test_the_regimes_of_a_model_are_few_and_cover_the_range(name: str) -> None:
    found = published(name)
    assert len(found) <= LIMIT
    assert [r.lo for r in found] == [1, *(r.hi + 1 for r in found[:-1])] and found[-1].hi == 16384
    assert all(r.plan is not None for r in found)


def configured(kernel: Kernel, size: int) -> Choice:
    """What a launch of a ranged plan looks up."""
    own = Choice(kernel.family, kernel.config, kernel.pdl, kernel.why)
    return next((choice for bound, choice in kernel.by_size if size <= bound), own)


def some_sizes(regime: Regime) -> list[int]:
    steps = (0, 0.03, 0.1, 0.3, 0.5, 0.7, 1)
    found = {regime.lo + int((regime.hi - regime.lo) * share) for share in steps}
    return sorted(found | {s for s in (16, 17, 96, 300, 333, 1000, 3001, 9000) if regime.lo <= s <= regime.hi})


@pytest.mark.parametrize("name", MODELS)
def test_the_config_is_that_of_the_size_that_runs(name: str) -> None:
    options = planner(name, "middle")[1]
    for regime in published(name):
        for kernel in regime.plan.schedule.launches():
            for size in some_sizes(regime) if kernel.family else ():
                problem = at_size(kernel.problem, size)
                if kernel.group.contract is not None:
                    family = importlib.import_module(f"terrazzo.kernels.{configured(kernel, size).family}")
                    assert family.supports(problem) is None
                own = choose(kernel.family, problem, options, is_looped(kernel))
                given = configured(kernel, size)
                if kernel.group.contract is None:
                    assert given.family == own.family
                    continue
                bound = next((b for b, _ in kernel.by_size if size <= b), regime.hi)
                if _measured(given, at_size(kernel.problem, bound), options):
                    # A measurement counts more than the estimates below it.
                    continue
                times = [
                    importlib.import_module(f"terrazzo.kernels.{c.family}").estimate_us(
                        problem, c.config, options.target
                    )
                    for c in (given, own)
                ]
                # The grid is asked at both ends of its steps, and a choice may lose LOSS there.
                assert times[0] <= (1 + LOSS + 0.02) * times[1], f"%{kernel.name} at {size}: {given} for {own}"


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (5120, 5120), (768, 768)])
def test_a_product_by_size_is_never_one_that_its_family_refuses(n: int, k: int) -> None:
    problem = GemmProblem(Span(1, 16384, 16384).size(), n, k, torch.bfloat16, rounds=True)  # type: ignore[arg-type]
    table = by_size("", problem, Options(Target.named("h100")))
    below = 1
    for bound, choice in table:
        family = importlib.import_module(f"terrazzo.kernels.{choice.family}")
        assert not any(family.supports(at_size(problem, size)) for size in (below, bound)), (below, bound, choice)
        below = bound + 1
    assert next(choice.family for bound, choice in table if bound >= 16) == "gemm_stream"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("n", "k"), [(2048, 4096), (5120, 2048), (4096, 14336), (128, 2048)])
def test_few_tokens_get_the_tile_of_their_size_without_measurements_too(n: int, k: int, dtype: torch.dtype) -> None:
    options = Options(Target.named("h200"))
    problem = GemmProblem(Span(1, 16384, 16384).size(), n, k, dtype)  # type: ignore[arg-type]
    table = by_size("", problem, options)
    for size in (1, 2, 8, 9, 16, 17, 24, 32, 33, 64, 65, 100, 128):
        given = next(choice for bound, choice in table if size <= bound)
        assert given.key == choose("", at_size(problem, size), options).key, size


@pytest.mark.parametrize(("device", "n", "k"), [("h100", 6144, 4096), ("h200", 3072, 2048)])
def test_few_tokens_take_no_config_from_what_was_measured_for_many(device: str, n: int, k: int) -> None:
    options = Options(Target.named(device))
    problem = GemmProblem(Span(2, 16384, 16384).size(), n, k, torch.bfloat16)  # type: ignore[arg-type]
    for bound, given in by_size("", problem, options):
        own = choose("", at := at_size(problem, bound), options)
        assert given.key == own.key or not _measured(own, at, options), bound


@pytest.mark.parametrize("name", MODELS)
def test_a_launch_has_few_configs(name: str) -> None:
    for regime in published(name):
        for kernel in regime.plan.schedule.launches():
            assert len({choice.key for _, choice in kernel.by_size}) <= MOST


def put(source: str, size: int) -> str:
    """A ranged plan's bodies and call with a number for the size."""
    text = re.sub(r"\n    size = .*|from .*BySize", "", source.split('"""', 2)[2])
    text = re.sub(r"(launch_\w+\()size, ", r"\1", text)
    sized = r"\(size(?: \* \d+)? [+-] \d+\)|size \* \d+|\bsize\b"
    text = re.sub(sized, lambda m: str(eval(m[0], {"size": size})), text)
    text = re.sub(r"^from terrazzo.kernels import .*", "", text, flags=re.M)
    return re.sub(r"launch_\w+ = .*?\n\)\n", "", text, flags=re.S).replace("\n\n", "\n")


@pytest.mark.parametrize("name", MODELS)
def test_a_ranged_plan_is_the_exact_plan_of_its_largest_size(name: str) -> None:
    make, _ = planner(name, "middle")
    for regime in published(name)[1:]:
        exact = make(regime.hi)
        assert put(regime.plan.source, regime.hi) == put(exact.source, 0)


def test_looped_rows_have_plans_for_a_range() -> None:
    graph = symbolic(lambda x: x.sum(-1), [torch.zeros(3, 40000)])
    found = CompiledPiece(graph).ranged(2, 64)
    kernels = [k for r in found for k in r.plan.schedule.launches()]
    assert kernels and all(is_looped(k) for k in kernels)
