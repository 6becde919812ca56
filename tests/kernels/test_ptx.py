"""Two products of one tile become one instruction; whatever is not as expected stays as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import triton

from terrazzo.kernels import ptx
from terrazzo.kernels.ptx import MOST_COLUMNS, left_apart, widened

NOTE = "// the next two products are one %r1"


def products(
    columns: int,
    first: int,
    steps: int = 2,
    blocks: int = 1,
    tile: int = 10,
    rest: str = "%p1, 1, 1, 0, 0",
    before: Sequence[str] = (),
    file: str = "r",
) -> str:
    """A group of products: for each block of 64 rows its accumulators, from a register on, and for each step a tile and
    what it is multiplied by."""
    lines = [*before, "wgmma.fence.sync.aligned;"]
    for block in range(blocks):
        sums = ",".join(f"%{file}{first + 1000 * block + i}" for i in range(columns // 2))
        for step in range(steps):
            operands = f"{{{sums}}}, %rd{tile + 50 * block + step}, %rd{1000 + columns + step}, {rest}"
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
    changed = widened(plain + both + both)
    assert columns_of(changed) == [128, 128, 16, 16] + [96, 96] * 2 and left_apart(changed) == 0
    assert left_apart(plain) == 0 and left_apart(both + both) == 2


def test_of_more_than_64_rows_each_block_has_its_own() -> None:
    changed = widened(f"{NOTE}\n{products(128, 100, blocks=2)}{products(16, 200, blocks=2)}")
    assert columns_of(changed) == [144] * 4
    assert [match[:6] for match in re.findall(r"\{([^}]*)\}", changed)] == ["%r100,"] * 2 + ["%r1100"] * 2


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
        products(128, 100, blocks=2) + products(16, 200, blocks=2, before=["mov.b32 %r1203, 0;"]),
        products(128, 100) + products(16, 200, before=["mov.f32 %f203, 0;"], file="f"),
        products(128, 100) + products(16, 200, before=["wgmma.wait_group.sync.aligned 0;"]),
        products(128, 100) + products(16, 200, before=["bar.sync 0;"]),
        products(128, 100, before=["@%p3 bra $L__BB0_7;"]) + products(16, 200),
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
        "of the second block",
        "in another file",
        "a wait between",
        "a barrier between",
        "a jump before",
        "a jump between",
        "another block",
    ],
)
def test_what_is_not_as_expected_stays(follows: str) -> None:
    text = f"{products(8, 100)}{NOTE}\n{follows}rest\n"
    assert widened(text) == text
    assert left_apart(text) == (follows.count("commit_group") > 1)


def test_others_may_change_what_triton_compiles_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda *given: heard.append(given))
    ptx._install()
    text = f"{NOTE}\n{products(128, 100)}{products(16, 200)}"
    stages: dict[str, Any] = {"ptx": lambda source, metadata: text}
    triton.knobs.runtime.add_stages_inspection_hook("backend", stages, "options", "language", 90)
    assert [given[0] for given in heard] == ["backend"]
    assert columns_of(stages["ptx"]("llir", {})) == [144, 144]
    # Later versions of Triton ask for a key and a digest.
    assert triton.knobs.runtime.add_stages_inspection_hook() is None and heard[-1] == ()
    # Of a backend that has no such stage nothing is changed.
    stages = {"amdgcn": None}
    triton.knobs.runtime.add_stages_inspection_hook("backend", stages, "options", "language", None)
    assert stages == {"amdgcn": None}
