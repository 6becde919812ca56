"""Elements that several reads touch together, against counting them one by one."""

from __future__ import annotations

import itertools

import pytest
import torch

from terrazzo.lowering.affine import Affine, Bounded, Indirect, Var
from terrazzo.lowering.cost import distinct, footprint
from terrazzo.lowering.expr import Load

ROW, COL = Affine.of(Var(0, 6)), Affine.of(Var(1, 8))


def touched(offsets: list[Affine]) -> int:
    """The same by enumeration; a bounded atom's base stays within its bound here."""

    def value(offset: Affine, row: int, col: int) -> int | None:
        total = offset.const
        for atom, step in offset.terms:
            base = atom.base if isinstance(atom, Bounded) else Affine.of(atom)
            [at] = [{0: row, 1: col}[a.dim] for a in base.atoms() if isinstance(a, Var)] or [0]
            at += base.const
            if isinstance(atom, Bounded) and not 0 <= at < atom.size:
                return None
            total += step * at
        return total

    found = {value(o, r, c) for o in offsets for r, c in itertools.product(range(6), range(8))}
    return len(found - {None})


@pytest.mark.parametrize(
    "offsets",
    [
        [ROW * 8 + COL],
        [ROW * 8 + COL, ROW * 8 + COL],
        [ROW * 16 + COL, ROW * 16 + COL + 8],
        [ROW * 32 + COL, ROW * 32 + COL + 4],
        [ROW * 32 + COL, ROW * 32 + COL + 20],
        [COL * 6 + ROW],
        [ROW * 16 + COL * 2],
        [ROW, COL],
        [ROW * 16 + Affine.of(Bounded(COL, 4)), ROW * 16 + Affine.of(Bounded(COL - 4, 4)) + 4],
    ],
    ids=str,
)
def test_each_element_counts_once(offsets: list[Affine]) -> None:
    assert distinct(offsets) == touched(offsets)


def test_never_more_than_read_by_read() -> None:
    twice = [ROW * 8 + COL, COL * 6 + ROW]
    assert distinct(twice) <= sum(map(footprint, twice))


def test_a_row_looked_up_by_many_is_touched_once() -> None:
    # Four heads of each of six tokens look up the token's row of a table: 6 rows of 8, not 24.
    head_of_token = Affine.of(Var(0, 24))
    position = Load(torch.int64, value="positions", offset=head_of_token.floordiv(4))
    row = Affine.of(Indirect(position, 1000))
    assert footprint(row * 8 + COL) == 6 * 8
    assert footprint(Affine.of(Indirect(position, 2)) * 8 + COL) == 2 * 8


def test_what_shares_variables_is_no_more_than_they_are() -> None:
    assert footprint(ROW * 3 + Affine.of(Bounded(ROW + 1, 4))) == 6
    assert footprint((ROW * 8 + COL).floordiv(4) + (ROW * 8 + COL).mod(4) * 100) == 48
