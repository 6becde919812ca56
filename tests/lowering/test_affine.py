"""Index arithmetic against plain integers, at every point of the variables' ranges."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from terrazzo.lowering.affine import (
    Affine,
    Atom,
    Bounded,
    Div,
    Mod,
    Var,
    bounded,
    contiguous_strides,
    delinearize,
    linear,
    substitution,
    variables,
)


def value(a: Affine, point: tuple[int, ...]) -> int:
    return a.const + sum(c * atom_value(t, point) for t, c in a.terms)


def atom_value(atom: Atom, point: tuple[int, ...]) -> int:
    if isinstance(atom, Var):
        return point[atom.dim]
    assert isinstance(atom, (Div, Mod, Bounded))
    base = value(atom.base, point)
    if isinstance(atom, Div):
        return base // atom.divisor
    return base % atom.divisor if isinstance(atom, Mod) else base


sizes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@st.composite
def affines(draw, size):
    coefficients = [draw(st.integers(-8, 40)) for _ in size]
    return linear(variables(size), coefficients, draw(st.integers(-9, 50)))


@settings(max_examples=400, deadline=None)
@given(st.data(), sizes, st.integers(1, 48), st.integers(1, 12))
def test_division_and_remainder_match_integers_everywhere(data, size, divisor, second):
    base = data.draw(affines(size))
    quotient, rest = base.floordiv(divisor), base.mod(divisor)
    nested = quotient.floordiv(second) * 3 + rest.mod(second) - base.mod(divisor * second)
    for point in itertools.product(*map(range, size)):
        n = value(base, point)
        assert value(quotient, point) == n // divisor
        assert value(rest, point) == n % divisor
        assert value(nested, point) == n // divisor // second * 3 + n % divisor % second - n % (divisor * second)
        lo, hi = nested.range
        assert lo <= value(nested, point) <= hi


@settings(max_examples=200, deadline=None)
@given(sizes, st.randoms(use_true_random=False))
def test_delinearize_inverts_linear_in_any_order_of_dimensions(size, random):
    order = list(range(len(size)))
    random.shuffle(order)
    inner = contiguous_strides([size[d] for d in order])
    strides = [0] * len(size)
    for stride, d in zip(inner, order, strict=True):
        strides[d] = stride
    index = variables(size)
    assert delinearize(linear(index, strides), size, strides) == index


def test_a_view_of_heads_reads_rows_of_its_base_without_division():
    m, h, d = variables((16, 32, 128))
    assert delinearize(m * 4096 + h * 128 + d, (16, 4096), (4096, 1)) == (m, h * 128 + d)


def test_flat_rows_of_heads_keep_the_column_out_of_divisions():
    row, col = variables((14, 16))
    flat = row * 16 + col
    token, head, dim = delinearize(flat, (7, 2, 16), (32, 16, 1))
    assert dim == col
    assert token == row.floordiv(2) and head == row.mod(2)
    assert linear((token, head, dim), (32, 16, 1)) == flat


def test_bounded_is_dropped_when_the_range_proves_it():
    (i,) = variables((8,))
    assert bounded(i, 8) == i
    assert bounded(i - 4, 4) != i - 4
    assert bounded(i - 4, 4).substitute(substitution({0: Affine((), 5)})) == Affine((), 1)


def test_an_index_moved_along_its_own_dimension_is_another():
    (i,) = variables((8,))
    assert (i * 3 + 2).substitute(substitution({0: i - 1})) == i * 3 - 1
    assert i.floordiv(3).substitute(substitution({0: i + 1})) == (i + 1).floordiv(3)
