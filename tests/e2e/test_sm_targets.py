"""Every kernel family compiles for every architecture, within registers, local and shared memory.

Time is bounded by sampling: at most `PER_FAMILY` configs per family and architecture, the first, the last and evenly
spaced ones between, the same in every run. `python -m terrazzo.tools.sass --all --arch 90` compiles them all.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from terrazzo.tools.sass import SHARED_LIMIT_BYTES, compile_isolated, families

PER_FAMILY = 8


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(SHARED_LIMIT_BYTES))
def test_every_family_compiles_within_limits(arch):
    command = [sys.executable, "-m", "terrazzo.tools.sass", "--all", "--arch", str(arch), "--sample", str(PER_FAMILY)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert not [f"{row['family']} {row['label']}: {row['wrong']}" for row in rows if row["wrong"]]
    # Older architectures may lack what a family is built on (TMA); the one the configs were measured on may not.
    if arch == 90:
        assert set(families()) == {row["family"] for row in rows}


def unordered(ptx: str, behind: str) -> list[str]:
    """Writes to shared memory that some path from a line with what `behind` matches on reaches before a barrier of all
    warps."""
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\$L\w+:", line)}
    ahead = [i + 1 for i, line in enumerate(lines) if re.search(behind, line)]
    assert ahead
    found, seen = [], set()
    while ahead:
        at = ahead.pop()
        while at < len(lines) and at not in seen:
            seen.add(at)
            line = lines[at]
            if re.match(r"bar\.sync|barrier\.(cta\.)?sync|ret;", line):
                break
            if re.search(r"(^|\s)(st\.shared|stmatrix|cp\.async\.(bulk|ca|cg))", line):
                found.append(line)
            if jump := re.match(r"(@\S+\s+)?bra(\.uni)?\s+(\$L\w+)", line):
                ahead.append(labels[jump[3]])
                if not jump[1]:
                    break
            at += 1
    return found


@pytest.mark.slow
def test_eight_warps_wait_for_each_others_products_before_the_rings_memory_is_used_again():
    rows = compile_isolated("gemm_stream", 90, match="warps 8", show="ptx")
    assert any("paired" in row.label for row in rows)
    for row in rows:
        assert "wgmma.mma_async" in row.code, row.label
        assert not unordered(row.code, r"wgmma\.(mma_async|wait_group)"), row.label


@pytest.mark.slow
def test_tokens_beside_a_tile_are_multiplied_with_it():
    rows = compile_isolated("gemm_stream", 90, match="x128+16x", show="ptx")
    assert {"paired" in row.label for row in rows} == {"halves" in row.label for row in rows} == {True, False}
    for row in rows:
        assert set(re.findall(r"m64n(\d+)k16", row.code)) == {"144"}, row.label


@pytest.mark.slow
def test_the_last_tiles_held_columns_wait_for_the_others_products():
    """Within the loop what is held changes lanes in memory of its own, behind it in the ring's."""
    rows = compile_isolated("gemm_persistent", 90, match="held", show="ptx")
    assert {"paired" in row.label for row in rows} == {"halves" in row.label for row in rows} == {True, False}
    for row in rows:
        assert not unordered(row.code, r"wgmma\.wait_group\.sync\.aligned 0"), row.label
