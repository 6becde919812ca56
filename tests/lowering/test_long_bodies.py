"""Graphs whose kernels would have no end: chains of cheap values, joins of many parts, conditions within conditions."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from terrazzo.lowering import pipeline
from terrazzo.lowering.group import BODY_LIMIT
from terrazzo.lowering.rules_shape import PARTS
from terrazzo.runtime.compiled import CompiledPiece

from .equal import odd, same, traced


def lines(piece: Any) -> int:
    [loaded] = piece.plans.values()
    return loaded.plan.source.count("\n")


def test_a_chain_of_writes_into_columns() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for i in range(130):
            x.select(1, i).copy_(y[i] * 2)
        return x

    piece = same(fn, odd(3, 130), odd(130, 3))
    assert lines(piece) < 3 * BODY_LIMIT


def test_a_join_of_very_many_parts_runs_as_itself() -> None:
    for join in (torch.stack, torch.cat):
        same(lambda x, join=join: join([x[i] for i in range(PARTS + 1)]), odd(PARTS + 1, 3), itself=True)
        same(lambda x, join=join: join([x[i] for i in range(PARTS)]), odd(PARTS, 3))


def test_conditions_within_conditions() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        for _ in range(11):
            x = F.pad(x[:, 1:] + x[:, :-1], (0, 1))
        return x

    piece = same(fn, odd(3, 17))
    assert lines(piece) < 4 * BODY_LIMIT


@pytest.mark.parametrize("count", [150, 2 * BODY_LIMIT])
def test_a_chain_of_very_many_ops(count: int) -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(count):
            x = torch.maximum(x, y)
        return x

    limit = sys.getrecursionlimit()
    same(fn, odd(4), odd(4))
    assert sys.getrecursionlimit() == limit


def test_ops_that_nest_too_deep_leave_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "DEPTH", 0)

    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(300):
            x = torch.maximum(x, y)
        return x

    piece = CompiledPiece(traced(fn, 2), [odd(4), odd(4)])
    assert torch.equal(piece(odd(4), odd(4, seed=1)), torch.maximum(odd(4), odd(4, seed=1)))
    assert "nest deeper than 0 calls" in piece.refusal


def test_a_chain_that_reads_each_value_at_two_places_takes_no_time() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(40):
            x = x.roll(1) + y
        return x

    same(fn, odd(4), odd(4))
