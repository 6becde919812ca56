"""The tuners' search spaces, and what they say without a GPU. What they measure, a GPU has to show."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from terrazzo.kernels import gemm_persistent, gemm_stream
from terrazzo.kernels.gemm import GemmProblem, measured
from terrazzo.kernels.gemm_boxes import together
from terrazzo.kernels.target import Target
from terrazzo.tools.tune_gemm import table
from terrazzo.tools.tune_piece import space

H100 = Target.named("h100")


@pytest.mark.parametrize("m", [1, 16, 64, 100, 333, 4096])
@pytest.mark.parametrize(("n", "k", "paired"), [(2048, 2048, False), (4096, 14336, False), (14336, 4096, True)])
def test_every_config_tried_fits_and_is_its_familys(m: int, n: int, k: int, paired: bool) -> None:
    problem = GemmProblem(m, n, k, torch.bfloat16, paired=paired, pair_offset=n, rounds=True)
    found = list(space(problem, H100))
    assert len(found) == len(set(found)) >= 8
    for family, config in found:
        # Of streams those are tried as well that no row allows.
        few = replace(problem, m=min(m, gemm_stream.MOST_TOKENS))
        assert family.supports(few if family is gemm_stream else problem) is None
        if family is gemm_stream:
            assert config.stages > 1 and gemm_stream.smem_bytes(problem, config) <= H100.smem_bytes
            rows = config.block_m if config.tokens_first else config.block_n
            assert rows * (2 if together(problem, config) else 1) % (16 * config.warps) == 0


@pytest.mark.parametrize("m", [1, 16, 64, 100])
@pytest.mark.parametrize("paired", [False, True])
def test_tiles_of_eight_bits_are_as_deep_in_bytes(m: int, paired: bool) -> None:
    wide = GemmProblem(m, 4096, 4096, torch.bfloat16, paired=paired, pair_offset=4096)
    found = [config for _, config in space(replace(wide, dtype=torch.float8_e4m3fn), H100)]
    halves = [replace(config, block_k=config.block_k // 2) for config in found]
    assert found and halves == [config for _, config in space(wide, H100)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    for tool in ("tune_piece", "tune_gemm"):
        done = run(tool)
        assert done.returncode == 2
        [said] = done.stderr.splitlines()
        assert said.startswith("error: times: torch sees no CUDA device")


@pytest.mark.parametrize(
    "command",
    [
        "tune_gemm --shapes foo",
        "tune_gemm --m x",
        "tune_gemm --families gemm_skinny",
        "tune_piece --sizes 1,x",
        "bench --contenders terrazzo --kernels inductor",
        "check --procs 0",
    ],
)
def test_a_request_that_cannot_be_right_costs_a_line(command: str) -> None:
    done = run(*command.split())
    assert done.returncode == 2 and "error: " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("tune_piece --sizes 0,1", "argument --sizes: '0,1' is no comma-separated list of sizes from 1 to"),
        ("check --sizes 0,1", "argument --sizes: '0,1' is no comma-separated list of sizes from 1 to"),
        ("bench_range --sizes 1,64 --largest 32", "error: sizes [64]: the range ends at 32"),
        ("tune_gemm --json -", "error: file '-': measurements go to a file"),
        ("tune_piece --json -", "error: file '-': measurements go to a file"),
    ],
)
def test_the_line_is_about_the_request_where_there_is_no_gpu_too(command: str, said: str) -> None:
    done = run(*command.split())
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


def test_rows_are_what_the_table_reads() -> None:
    line = {"family": "gemm_persistent", "m": 512, "n": 64, "k": 32, "paired": True, "us": 2.0, "vendor_us": 3.0}
    line["config"] = vars(gemm_persistent.Config(64, 128, 64, 8, 4, flatten=True))
    (row,) = table([line, line | {"family": "gemm_vendor", "config": {}}])
    found = measured(gemm_persistent.Config, f"header\n{row}", "a source")
    assert found[64, 32, "pair"][512].config == gemm_persistent.Config(64, 128, 64, 8, 4, flatten=True)


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A tool as a user starts it, without this process's settings."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"terrazzo.tools.{tool}", *arguments]
    return subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
