"""One instruction of the tensor cores for two products of the same rows: a change of Triton's PTX.

Triton's tiles are powers of two, while a warpgroup multiplies by any multiple of eight columns up to 256. Two products
of one tile, by 128 columns and by 16, are two instructions, which both read the tile from shared memory, and the second
takes as long as one of 50 columns or more. Where a kernel notes in its PTX that its next two products are one, because
their columns follow one another in shared memory, their instructions become one, of 144 columns. Triton lets others
change what it compiles between two stages (`add_stages_inspection_hook`). What is not as expected stays as Triton made
it, which is right as well.

Importing this has Triton do so in the process; PTX without such a note passes as it is.
"""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Of one instruction.
MOST_COLUMNS = 256

_NOTE = "// the next two products are one"
# A kernel's constexpr: what Triton's cache has is known by what it was made of, which is this file as well then.
NOTE = f"{_NOTE} ({sha256(Path(__file__).read_bytes()).hexdigest()[:8]}) $0"
_PRODUCT = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<columns>\d+)(?P<kind>k\d+\.\S+) \{(?P<sums>[^}]*)\}, "
    r"(?P<tile>%rd\d+), (?P<other>%rd\d+), (?P<rest>[^;]*);"
)
_REGISTER = re.compile(r"%[rf]\d+")
# What ends a block, or waits for something.
_ELSEWHERE = re.compile(r"\bbra\b|^\$L__BB|wait|\bbar\.", re.MULTILINE)
# The end of a group of products, which a later wait counts, and what has to come before the first.
_COMMIT, _FENCE = "wgmma.commit_group.sync.aligned;", "wgmma.fence.sync.aligned;"


@gluon.jit
def next_two_are_one(NOTE: gl.constexpr):
    """Note that the next two products have the same first operand, and that the rows of the second one's other operand
    follow those of the first one's in shared memory. They are one group to wait for."""
    gl.inline_asm_elementwise(NOTE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


def widened(ptx: str) -> str:
    """PTX in which two products are one where a note says that they are."""
    before, *noted = re.split(f"(?={_NOTE})", ptx)
    return before + "".join(map(_widened, noted))


def left_apart(ptx: str) -> int:
    """How many notes there are in PTX that was to be widened whose two products are two instructions still."""
    _, *noted = re.split(f"(?={_NOTE})", ptx)
    return sum(_PRODUCT.search(groups[1]) is not None for text in noted if len(groups := text.split(_COMMIT, 2)) > 1)


def _widened(ptx: str) -> str:
    """What follows one note."""
    groups = ptx.split(_COMMIT, 2)
    if len(groups) < 3:
        return ptx
    first, second, rest = groups
    steps, others = list(_PRODUCT.finditer(first)), list(_PRODUCT.finditer(second))
    if not steps or [_alike(step) for step in steps] != [_alike(other) for other in others]:
        return ptx
    between = _PRODUCT.sub("", first + second[: others[-1].end()])
    # The second one's accumulators may be set only now, where there is no loop.
    sums = {register for other in others for register in _REGISTER.findall(other["sums"])}
    if sums & set(_REGISTER.findall(between)) or _ELSEWHERE.search(between):
        return ptx
    for step, other in zip(steps, others, strict=True):
        columns = int(step["columns"]) + int(other["columns"])
        if columns > MOST_COLUMNS:
            return ptx
        one = f"wgmma.mma_async.sync.aligned.m64n{columns}{step['kind']} {{{step['sums']},{other['sums']}}}, "
        one += f"{step['tile']}, {step['other']}, {step['rest']};"
        first, second = first.replace(step[0], one), second.replace(other[0], "")
    return first + _COMMIT + second.replace(_FENCE, "") + rest


def _alike(product: re.Match[str]) -> tuple[str, ...]:
    """What two products have in common that can be one."""
    return product["kind"], product["tile"], product["rest"]


def _install() -> None:
    others = triton.knobs.runtime.add_stages_inspection_hook

    def change(*given: Any) -> Any:
        if not given:
            # From 3.7 on Triton asks for a key and a digest of what a hook does, also for kernels that are not ours.
            return others() if others is not None else ("", "")
        if others is not None:
            others(*given)
        stages = given[1]
        if (emit := stages.get("ptx")) is not None:
            stages["ptx"] = lambda source, metadata: widened(emit(source, metadata))

    triton.knobs.runtime.add_stages_inspection_hook = change


_install()
