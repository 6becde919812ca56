"""A number for a whole range: what it answers is so at every size, and nothing turns it into one integer."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, Max, Mod, PythonMod

from terrazzo.lowering.affine import Affine, Var, contiguous_strides, delinearize, linear, variables
from terrazzo.lowering.size import Size, Span, Undecided, alike, common_divisor, evaluated, integer, typical

from .test_affine import value

OPERATIONS = [operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, max, min]
COMPARISONS = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]


@st.composite
def spans(draw: Callable[[Any], Any]) -> Span:
    lo = draw(st.integers(0, 9))
    hi = lo + draw(st.integers(1, 40))
    return Span(lo, hi, draw(st.integers(lo, hi)))


def number(draw: Callable[[Any], Any], span: Span) -> Any:
    return span.size() * draw(st.integers(-4, 8)) + draw(st.integers(-20, 40))


def plain(x: Any, size: int) -> Any:
    return x.at(size) if isinstance(x, Size) else x


@settings(max_examples=400, deadline=None)
@given(st.data(), spans(), st.sampled_from(OPERATIONS))
def test_arithmetic_is_that_of_integers_at_every_size(data: st.DataObject, span: Span, operation: Any) -> None:
    a, b = number(data.draw, span), number(data.draw, span)
    assume(isinstance(a, Size) or isinstance(b, Size))
    try:
        made = operation(a, b)
    except Undecided:
        return
    for size in range(span.lo, span.hi + 1):
        assert plain(made, size) == operation(plain(a, size), plain(b, size))


@settings(max_examples=400, deadline=None)
@given(st.data(), spans(), st.sampled_from(COMPARISONS))
def test_a_comparison_has_one_answer_or_says_where_it_changes(data: st.DataObject, span: Span, compare: Any) -> None:
    a, b = number(data.draw, span), number(data.draw, span)
    assume(isinstance(a, Size) or isinstance(b, Size))
    answers = [compare(plain(a, size), plain(b, size)) for size in range(span.lo, span.hi + 1)]
    if len(set(answers)) == 1:
        assert compare(a, b) == answers[0]
        return
    with pytest.raises(Undecided) as raised:
        compare(a, b)
    cut = raised.value.cut
    assert cut is not None and span.lo < cut <= span.hi
    assert len(set(answers[: cut - span.lo])) == 1, "the part below the cut has no one answer"


def test_most_questions_of_index_arithmetic_are_answered() -> None:
    size = Span(2, 16384, 16384).size()
    assert size > 1 and size >= 2 and size != 1 and bool(size) and size != 0
    assert (size * 4096) // 4096 == size and (size * 4096) % 4096 == 0 and (size * 4096) // size == 4096
    assert (size * 4096 - 1) // 4096 == size - 1 and 1 // size == 0 and 1 % size == 1
    assert divmod(size * 6 + 5, size * 2 + 3)[0] == 2
    assert max(size, 1) is size and math.prod((size, 32, 128)) == size * 4096
    assert sorted([size * 4096, 1, 4096]) == [1, 4096, size * 4096]


def test_a_span_of_one_size_is_an_integer() -> None:
    assert type(Span(7, 7, 7).size()) is int
    assert type(Span(2, 9, 9).size() - Span(2, 9, 9).size()) is int


@pytest.mark.parametrize(
    "use",
    [
        int, float, complex, range, operator.index, math.sqrt, math.floor, round, torch.empty, hex, "abc".__getitem__,
        lambda s: s / 2, lambda s: 1.0 / s, lambda s: 2.0 * s, lambda s: s + 0.5, lambda s: s & 15, lambda s: 1 << s,
        lambda s: s.bit_length(), lambda s: s**2, lambda s: s * s, lambda s: s // 2, lambda s: s % 2,
        lambda s: 100 // s,
        lambda s: s < 10, lambda s: s == 10, lambda s: s // 0, lambda s: math.gcd(s, 4), lambda s: [0] * s,
    ],
)  # fmt: skip
def test_it_never_becomes_one_number(use: Callable[[Any], Any]) -> None:
    with pytest.raises((Undecided, TypeError)):
        use(Span(2, 64, 64).size())


def test_what_it_says() -> None:
    size = Span(2, 64, 16).size()
    assert [str(size), f"{size * 3}", repr(size - 1), str(size * 2 + 5)] == [
        "size",
        "size * 3",
        "(size - 1)",
        "(size * 2 + 5)",
    ]
    assert eval(str(size * 2 + 5), {"size": 7}) == 19
    assert typical(size * 3) == 48 and typical(5) == 5
    assert integer(size) is size and integer(sympy.Integer(3)) == 3 and type(integer(sympy.Integer(3))) is int
    assert (size * 3).ends == (6, 192) and (5 - size).ends == (-59, 3)


def test_alike_is_equal_everywhere() -> None:
    size = Span(2, 64, 16).size()
    assert alike(size * 2, size + size) and alike(3, 3) and alike(sympy.Integer(3), 3)
    assert not alike(size, 16) and not alike(16, size) and not alike(size, size * 2) and not alike(3, 4)
    assert len({size * 4, 4 * size, 64}) == 2


def test_what_is_remembered_for_one_span_answers_for_no_other() -> None:
    low, high = Span(2, 8, 8).size(), Span(9, 64, 64).size()
    assert len({low * 4, high * 4}) == 2 and low != high and not alike(low, high)
    assert len({low * 4, Span(2, 8, 8).size() * 4}) == 1
    with pytest.raises(TypeError, match="meet"):
        low + high
    # Rows of 4 in a view of 8 rows at most: the same numbers, another answer.
    first, second = (delinearize(Affine.of(Var(0, s * 4)), (s, 4), (4, 1)) for s in (low, high))
    assert first != second


def test_a_common_divisor_divides_at_every_size() -> None:
    size = Span(2, 64, 16).size()
    assert common_divisor(12, 18) == 6 and common_divisor(size * 4 + 6, 8) == 2 and common_divisor(size, 8) == 1


S = sympy.Symbol("s77", integer=True, positive=True)


@pytest.mark.parametrize(
    "expr",
    [S, 4096 * S + 3, Max(1, S) * 2, FloorDiv(4 * S, 2), Mod(S * 8, 4), PythonMod(8 * S + 3, 4), S >= 2, sympy.Ne(S, 1),
     sympy.And(S > 1, S < 100), sympy.Or(S > 200, S >= 2)],
)  # fmt: skip
def test_a_traces_expressions(expr: sympy.Basic) -> None:
    made = evaluated(expr, {S: Span(2, 64, 16).size()})
    for size in range(2, 65):
        assert plain(made, size) == expr.xreplace({S: sympy.Integer(size)})


@pytest.mark.parametrize(
    "expr", [S**2, S / 2, FloorDiv(S, 2), sympy.Eq(Mod(S, 2), 0), sympy.sqrt(S), S > 5, sympy.Eq(S, 9)]
)
def test_a_traces_expressions_that_are_not_linear(expr: sympy.Basic) -> None:
    with pytest.raises(Undecided):
        evaluated(expr, {S: Span(2, 64, 16).size()})


def whole(a: Affine, size: int) -> Affine:
    """An index at one size: its numbers put in, nothing else changed."""

    def atom(t: Any) -> Any:
        if isinstance(t, Var):
            return Var(t.dim, plain(t.size, size))
        return type(t)(whole(t.base, size), plain(t.divisor if hasattr(t, "divisor") else t.size, size))

    return Affine(tuple((atom(t), plain(c, size)) for t, c in a.terms), plain(a.const, size))


@settings(max_examples=60, deadline=None)
@given(st.data(), spans(), st.permutations(range(3)), st.lists(st.integers(1, 5), min_size=2, max_size=2))
def test_views_of_a_tensor_with_a_size(data: st.DataObject, span: Span, order: list[int], sizes: list[int]) -> None:
    """The index of an element at the offset of another view of it, for all sizes at once."""
    shape = [span.size(), *sizes]
    shape = [shape[i] for i in order]
    numel = math.prod(shape)
    flat = data.draw(st.booleans())
    other = (numel,) if flat else tuple(data.draw(st.permutations(shape)))
    try:
        strides = contiguous_strides(shape)
        index = delinearize(linear(variables(other), contiguous_strides(other)), shape, strides)
        back = linear(index, strides)
    except Undecided:
        return
    for size in range(span.lo, min(span.hi, span.lo + 6) + 1):
        at = [plain(s, size) for s in other]
        for number, point in enumerate(itertools.product(*map(range, at))):
            assert value(whole(back, size), point) == number
            assert all(
                0 <= value(whole(i, size), point) < max(plain(s, size), 1) for i, s in zip(index, shape, strict=True)
            )
