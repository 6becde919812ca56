"""Expressions as people read them."""

from __future__ import annotations

import torch

from terrazzo.kernels.target import Target
from terrazzo.lowering.affine import Affine, variables
from terrazzo.lowering.expr import apply, cast, load
from terrazzo.lowering.intake import Examples
from terrazzo.lowering.options import Options
from terrazzo.lowering.pipeline import Journal, plan, trace
from terrazzo.lowering.show import LONGEST, expression

from .equal import odd, traced

ROW, COL = variables((4, 8))


def of(name: str, offset: Affine, dtype: torch.dtype = torch.float32):
    return load(name, offset, dtype)


def test_operators_casts_and_indices():
    x, y = of("x", ROW * 8 + COL, torch.bfloat16), of("y", COL + (-3))
    total = apply("add", cast(x, torch.float32), y, dtype=torch.float32)
    scaled = apply("mul", total, apply("rsqrt", total, dtype=torch.float32), dtype=torch.float32)
    text = "(float32(%x[8 i0 + i1]) + %y[i1 - 3]) * rsqrt(float32(%x[8 i0 + i1]) + %y[i1 - 3])"
    assert expression(scaled) == text
    assert expression(of("x", ROW * 8 + Affine((), 0) + (COL * 3).floordiv(4))) == "%x[8 i0 + ((3 i1) // 4)]"
    assert expression(of("z", Affine((), 0))) == "%z[0]"


def test_what_shares_its_parts_does_not_explode():
    expr = of("x", COL)
    for _ in range(200):
        expr = apply("add", expr, expr, dtype=torch.float32)
    assert len(expression(expr)) <= LONGEST + 2
    deep, offset = of("x", COL), COL * 1000
    for _ in range(600):
        deep = apply("add", deep, of("y", COL), dtype=torch.float32)
    for _ in range(60):
        offset = offset.floordiv(3) + (offset * 7 + 5).mod(1009)
    assert all(len(expression(long)) <= LONGEST + 2 for long in (deep, of("x", offset)))


def test_a_stage_shows_what_each_value_is():
    def fn(x, table, ids, w):
        picked = torch.cat((x, torch.nn.functional.embedding(ids, table)), -1)
        return torch.relu(picked @ w), picked.sum(-1), torch.sort(x)[0]

    args = [odd(4, 8), odd(16, 8), torch.arange(4), odd(16, 8)]
    graph, journal = traced(fn, 4), Journal()
    plan(trace(graph, Examples.of(graph, args)), {}, Options(Target.named("h200")), journal=journal)
    shown = {name: str(result) for name, result, _ in journal.stages}["define"]
    assert "map %embedding [4, 8] float32 = %x1[8 %x2[i0] + i1]" in shown
    assert "reduce %sum_1_total [4] float32 = sum over i1 < 16 of " in shown
    assert "contract %mm [4, 8] float32 = %cat [4, 16] @ %x3 [16, 8]" in shown
    assert "extern %sort = aten.sort.default(%x0)" in shown and "item %" in shown
