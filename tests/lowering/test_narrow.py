"""What lies in memory in a narrower dtype than it is computed in, and that no result changes by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from terrazzo.kernels.target import Target
from terrazzo.lowering import pipeline
from terrazzo.lowering.cost import traffic
from terrazzo.lowering.emit import Plan
from terrazzo.lowering.fuse import Fused
from terrazzo.lowering.intake import Examples
from terrazzo.lowering.options import Options
from terrazzo.lowering.pipeline import plan, trace
from terrazzo.runtime import compiled
from terrazzo.runtime.compiled import CompiledPiece

from .equal import copied, traced

H200 = Options(Target.named("h200"))


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def residual(x: Any, r: Any, w: Any) -> tuple[Any, ...]:
    """A sum that its own kernel goes on with in fp32, and that the kernel after a product reads rounded."""
    total = (x @ w).float() + r.float()
    normed = (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
    return total, normed, torch.tanh(normed @ w)


def rounded(x: Any, r: Any, w: Any) -> Any:
    total, _, y = residual(x, r, w)
    return torch.softmax(y.float() + total.to(x.dtype).float(), -1)


def both(x: Any, r: Any, w: Any) -> Any:
    total, _, y = residual(x, r, w)
    return torch.softmax(y.float() + total.to(x.dtype).float() + total, -1)


def returned(x: Any, r: Any, w: Any) -> Any:
    total, _, y = residual(x, r, w)
    return torch.softmax(y.float() + total.to(x.dtype).float(), -1), total


def sixteen(x: Any, r: Any, w: Any) -> Any:
    total, _, y = residual(x, r, w)
    return torch.softmax(y.float() + total.to(torch.bfloat16).float(), -1) + total.to(torch.float16).float()


def planned(fn: Any, *args: torch.Tensor) -> Plan:
    graph = traced(fn, len(args))
    return plan(trace(graph, Examples.of(graph, args)), {}, H200)


def sums(made: Plan) -> set[torch.dtype]:
    """Dtypes in which sums of the stream lie in memory: values that are as large as x and no product's operand."""
    values = made.schedule.values
    stored = {s.value for k in made.schedule.launches() for g in k.segments for s in g.stores}
    return {values.layouts[name].dtype for name in stored if name.startswith("add")}


ARGUMENTS = half(64, 512), half(64, 512), half(512, 512)


def test_a_sum_that_others_read_rounded_is_stored_rounded() -> None:
    assert sums(planned(rounded, *ARGUMENTS)) == {torch.bfloat16}


@pytest.mark.parametrize("fn", [both, returned, sixteen])
def test_a_sum_that_somebody_reads_as_it_is_is_not(fn: Any) -> None:
    assert sums(planned(fn, *ARGUMENTS)) == {torch.float32}


def test_bytes_are_those_that_the_kernels_move() -> None:
    made = planned(rounded, *ARGUMENTS)
    launches, values = made.schedule.launches(), made.schedule.values
    first, last = (sum(traffic(g, values) for g in k.segments) for k in (launches[0], launches[-1]))
    graph, journal = traced(rounded, 3), pipeline.Journal()
    plan(trace(graph, Examples.of(graph, ARGUMENTS), journal=journal), {}, H200, journal=journal)
    wide = journal.result("fuse")
    assert first + last < sum(traffic(g, wide.values) for k in (launches[0], launches[-1]) for g in k.segments)


@pytest.mark.parametrize("fn", [rounded, both, returned, sixteen])
def test_no_bit_of_a_result_changes(fn: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(fused: Fused) -> Fused:
        return fused

    args, results = copied([half(8, 64), half(8, 64), half(64, 64)]), []
    for changes in ({}, {"narrow": narrow}):
        monkeypatch.setattr(compiled, "_SHARED", {})
        for name, stage in changes.items():
            monkeypatch.setattr(pipeline, name, stage)
        results.append(CompiledPiece(traced(fn, 3), args)(*args))
    pairs = zip(*(v if isinstance(v, tuple) else (v,) for v in results), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
