"""Two products of one tile become one instruction; whatever is not as expected stays as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import triton

from terrazzo.kernels import ptx
from terrazzo.kernels.ptx import MOST_COLUMNS, widened

NOTE = "// the next two products are one %r1"


def products(
    columns: int,
    first: int,
    steps: int = 2,
    tile: int = 10,
    rest: str = "%p1, 1, 1, 0, 0",
    before: Sequence[str] = (),
) -> str:
    """A group of products: their accumulators from a register on, and a tile and what it is multiplied by a step."""
    sums = ",".join(f"%r{first + i}" for i in range(columns // 2))
    lines = [*before, "wgmma.fence.sync.aligned;"]
    for step in range(steps):
        operands = f"{{{sums}}}, %rd{tile + step}, %rd{1000 + columns + step}, {rest}"
        lines.append(f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {operands};")
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;"]) + "\n"


def columns_of(text: str) -> list[int]:
    return [int(columns) for columns in re.findall(r"m64n(\d+)k", text)]


def test_two_products_become_one() -> None:
    text = f"before\n{NOTE}\n{products(128, 100)}between\n{products(16, 200)}after\n"
    changed = widened(text)
    assert columns_of(changed) == [144, 144]
    # Accumulators one after the other; the tile and the first one's other operand.
    one = re.search(r"m64n144k16\S+ \{([^}]*)\}, %rd10, %rd1128, %p1, 1, 1, 0, 0;", changed)
    assert one and one[1].split(",") == [f"%r{i}" for i in (*range(100, 164), *range(200, 208))]
    assert changed.count("commit_group") == changed.count("wgmma.fence") == 1
    for kept in ("before", "between", "after", NOTE):
        assert kept in changed


def test_each_note_is_of_the_two_that_follow_it() -> None:
    both = f"{NOTE}\n{products(64, 100)}{products(32, 200)}"
    plain = products(128, 100) + products(16, 200)
    assert columns_of(widened(plain + both + plain + both)) == [128, 128, 16, 16, 96, 96] * 2


@pytest.mark.parametrize(
    "follows",
    [
        "",
        products(128, 100),
        products(128, 100) + products(16, 200, tile=20),
        products(128, 100) + products(16, 200, rest="%p2, 1, 1, 0, 0"),
        products(128, 100) + products(16, 200, steps=1),
        products(MOST_COLUMNS, 100) + products(16, 200),
        products(128, 100) + products(16, 200, before=["mov.b32 %r203, 0;"]),
        products(128, 100) + products(16, 200, before=["@%p3 bra $L__BB0_7;"]),
        products(128, 100) + products(16, 200, before=["$L__BB0_7:"]),
    ],
    ids=[
        "nothing",
        "one",
        "another tile",
        "another predicate",
        "fewer steps",
        "too wide",
        "sums set between",
        "a jump between",
        "another block",
    ],
)
def test_what_is_not_as_expected_stays(follows: str) -> None:
    text = f"{products(8, 100)}{NOTE}\n{follows}rest\n"
    assert widened(text) == text


def test_others_may_change_what_triton_compiles_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda *given: heard.append(given))
    ptx._install()
    text = f"{NOTE}\n{products(128, 100)}{products(16, 200)}"
    stages: dict[str, Any] = {"ptx": lambda source, metadata: text}
    triton.knobs.runtime.add_stages_inspection_hook("backend", stages, "options", "language", 90)
    assert [given[0] for given in heard] == ["backend"]
    assert columns_of(stages["ptx"]("llir", {})) == [144, 144]
    # Of a backend that has no such stage nothing is changed.
    stages = {"amdgcn": None}
    triton.knobs.runtime.add_stages_inspection_hook("backend", stages, "options", "language", None)
    assert stages == {"amdgcn": None}
