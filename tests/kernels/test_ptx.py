"""Two products of one tile become one instruction; whatever is not as expected stays as it is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import triton

from terrazzo.kernels import ptx
from terrazzo.kernels.ptx import MOST_COLUMNS, widened

NOTE = "// the next two products are one %r1"


def products(columns: int, register: str, steps: int = 2, tile: str = "%rd1", rest: str = "%p1, 1, 1, 0, 0") -> str:
    """A group of products: accumulators, a tile for each step, what it is multiplied by."""
    sums = ",".join(f"%{register}{i}" for i in range(columns // 2))
    lines = ["wgmma.fence.sync.aligned;"]
    for step in range(steps):
        operands = f"{{{sums}}}, {tile}{step}, %rd{register}{step}, {rest}"
        # Registers are numbers in Triton's PTX.
        operands = operands.replace(f"%rd{register}", f"%rd{len(register)}{columns}")
        lines.append(f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {operands};")
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;"]) + "\n"


def columns_of(text: str) -> list[int]:
    return [int(columns) for columns in re.findall(r"m64n(\d+)k", text)]


def test_two_products_become_one() -> None:
    text = f"before\n{NOTE}\n{products(128, 'r')}between\n{products(16, 'rr')}after\n"
    changed = widened(text)
    assert columns_of(changed) == [144, 144]
    # Accumulators one after the other; the tile and the first one's other operand.
    one = re.search(r"m64n144k16\S+ \{([^}]*)\}, %rd10, %rd11280, %p1, 1, 1, 0, 0;", changed)
    assert one and one[1].split(",") == [*(f"%r{i}" for i in range(64)), *(f"%rr{i}" for i in range(8))]
    assert changed.count("commit_group") == changed.count("wgmma.fence") == 1
    for kept in ("before", "between", "after", NOTE):
        assert kept in changed


def test_each_note_is_of_the_two_that_follow_it() -> None:
    both = f"{NOTE}\n{products(64, 'r')}{products(32, 'rr')}"
    plain = products(128, "r") + products(16, "rr")
    assert columns_of(widened(plain + both + plain + both)) == [128, 128, 16, 16, 96, 96] * 2


@pytest.mark.parametrize(
    "follows",
    [
        "",
        products(128, "r"),
        products(128, "r") + products(16, "rr", tile="%rd2"),
        products(128, "r") + products(16, "rr", rest="%p2, 1, 1, 0, 0"),
        products(128, "r") + products(16, "rr", steps=1),
        products(MOST_COLUMNS, "r") + products(16, "rr"),
    ],
    ids=["nothing", "one", "another tile", "another predicate", "fewer steps", "too wide"],
)
def test_what_is_not_as_expected_stays(follows: str) -> None:
    text = f"{products(8, 'r')}{NOTE}\n{follows}rest\n"
    assert widened(text) == text


def test_others_may_change_what_triton_compiles_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda *given: heard.append(given))
    ptx._install()
    text = f"{NOTE}\n{products(128, 'r')}{products(16, 'rr')}"
    stages: dict[str, Any] = {"ptx": lambda source, metadata: text}
    triton.knobs.runtime.add_stages_inspection_hook("backend", stages, "options", "language", 90)
    assert [given[0] for given in heard] == ["backend"]
    assert columns_of(stages["ptx"]("llir", {})) == [144, 144]
    # Of a backend that has no such stage nothing is changed.
    stages = {"amdgcn": None}
    triton.knobs.runtime.add_stages_inspection_hook("backend", stages, "options", "language", None)
    assert stages == {"amdgcn": None}
