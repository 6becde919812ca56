"""The tool that compiles without a GPU: what it reports, what it refuses, and its use from an interpreting process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import triton

from terrazzo.kernels.jobs import CompileJob
from terrazzo.lowering.errors import UserError
from terrazzo.tools.sass import SHARED_LIMIT_BYTES, _resolve, compile_for, compile_isolated, sample

JOBS = """
import triton
import triton.language as tl

from terrazzo.kernels.jobs import CompileJob


@triton.jit
def bias(x, t):
    return x + (tl.load(t[0]) if t[1] is None else 0)


@triton.jit
def pointwise(x, t, y, n, BLOCK: tl.constexpr, BODY: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, BODY(tl.load(x + i, mask=i < n), t), mask=i < n)


@triton.jit
def gemm(a, b, c, k_size, BLOCK: tl.constexpr, K: tl.constexpr):
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, k_size, K):
        acc = tl.dot(a.load([0, k]), b.load([0, k]).T, acc)
    c.store([0, 0], acc.to(tl.bfloat16))


def descriptors(block):
    operand = f"tensordesc<bf16[{block},64]>"
    return {"a": operand, "b": operand, "c": f"tensordesc<bf16[{block},{block}]>", "k_size": "i32"}


def compile_jobs(arch):
    types = {"x": "*fp32", "t": ("*fp32", "constexpr"), "y": "*fp32", "n": "i32"}
    constexprs = {"BLOCK": 1024, "BODY": bias}
    yield CompileJob("mine", "aligned", pointwise, types, constexprs, divisible=("x", "y", "n"))
    yield CompileJob("mine", "unaligned", pointwise, types, constexprs)
    yield CompileJob("mine", "fits", gemm, descriptors(128), {"BLOCK": 128, "K": 64}, 8, 3)
    yield CompileJob("mine", "too deep", gemm, descriptors(128), {"BLOCK": 128, "K": 64}, 8, 8)
    yield CompileJob("mine", "broken", pointwise, {**types, "x": "*fp32"}, {"BLOCK": 1000, "BODY": bias})
    yield CompileJob("mine", "spills", gemm, descriptors(256), {"BLOCK": 256, "K": 64}, 4, 3)
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("jobs") / "mine.py"
    path.write_text(JOBS)
    return str(path)


@pytest.fixture(scope="module")
def rows(jobs) -> dict:
    return {row.label: row for row in compile_isolated(jobs, 90, show="ptx")}


def test_every_job_has_its_row_in_order(rows):
    assert list(rows) == ["aligned", "unaligned", "fits", "too deep", "broken", "spills"]


def test_alignment_and_bodies_reach_the_compiler(rows):
    assert not rows["aligned"].wrong + rows["unaligned"].wrong
    assert "ld.global.v4" in rows["aligned"].code
    assert "ld.global.v4" not in rows["unaligned"].code


def test_resources_are_reported(rows):
    fits = rows["fits"]
    assert not fits.wrong
    assert 0 < fits.registers <= 255
    assert fits.spills_bytes == 0
    # Three stages of two operand tiles of 128 x 64 bf16.
    assert 3 * 2 * 128 * 64 * 2 <= fits.shared_bytes <= SHARED_LIMIT_BYTES[90]


def test_what_breaks_a_limit_says_so(rows):
    assert "232448" in rows["too deep"].wrong
    assert "local memory" in rows["spills"].wrong
    assert "power of 2" in rows["broken"].wrong


def test_matching_disassembles_one(jobs):
    (row,) = compile_isolated(jobs, 90, match="fits", show="sass")
    assert "HGMMA" in row.code


def test_the_command_fails_when_a_job_does(jobs):
    command = [sys.executable, "-m", "terrazzo.tools.sass", "--jobs", jobs, "--arch", "80", "--match", "broken"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "power of 2" in done.stdout


def test_an_unknown_family_gets_the_known_ones():
    command = [sys.executable, "-m", "terrazzo.tools.sass", "--family", "nosuch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there are:" in done.stderr


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="this process compiles")
def test_an_interpreting_process_is_told_what_to_call():
    with pytest.raises(UserError, match="compile_isolated"):
        compile_for(None, {}, {}, 90)


def test_compile_for_in_a_compiling_process(jobs):
    code = f"""
        import sys
        sys.path.insert(0, {os.path.dirname(jobs)!r})
        import mine
        from terrazzo.tools.sass import compile_for, compile_job
        report = compile_job(next(iter(mine.compile_jobs(100))), 100)
        assert "EXIT" in report.sass and report.registers > 0 and ".target sm_100a" in report.ptx
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)


def test_signatures_resolve_to_paths():
    types, constants, attributes = _resolve(
        ["x", "N", "t", "n"], {"x": "*bf16", "t": ("*bf16", ("i32", "constexpr")), "n": "i32"}, {"N": 4}, ["x", "t"]
    )
    assert list(types) == ["x", "N", "t", "n"]
    assert constants == {(1,): 4, (2, 1, 1): None}
    assert set(attributes) == {(0,), (2, 0), (2, 1, 0)}


def test_a_signature_that_names_other_parameters_is_refused():
    with pytest.raises(UserError, match=r"unknown: \['z'\], without a type: \['y'\]"):
        _resolve(["x", "y"], {"x": "i32", "z": "i32"}, {}, [])


def test_sampling_is_even_and_repeatable():
    jobs = [CompileJob("f", str(i), None, {}) for i in range(10)]
    assert sample(jobs, 0) == list(range(10))
    assert sample(jobs, 4) == [0, 3, 6, 9]
    assert sample(jobs, 1) == [0]
