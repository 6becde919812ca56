"""The tuners' search spaces, and what they say without a GPU. What they measure, a GPU has to show."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from terrazzo.kernels import gemm_stream
from terrazzo.kernels.gemm import GemmProblem
from terrazzo.kernels.target import Target
from terrazzo.tools.tune_piece import space

H100 = Target.named("h100")


@pytest.mark.parametrize("m", [1, 16, 64, 100, 333, 4096])
@pytest.mark.parametrize(("n", "k", "paired"), [(2048, 2048, False), (4096, 14336, False), (14336, 4096, True)])
def test_every_config_tried_fits_and_is_its_familys(m: int, n: int, k: int, paired: bool) -> None:
    problem = GemmProblem(m, n, k, torch.bfloat16, paired=paired, pair_offset=n, rounds=True)
    found = list(space(problem, H100))
    assert len(found) == len(set(found)) >= 8
    for family, config in found:
        assert family.supports(problem) is None
        if family is gemm_stream:
            assert config.stages > 1 and gemm_stream.smem_bytes(problem, config) <= H100.smem_bytes
            rows = config.block_m if config.tokens_first else config.block_n
            assert rows % (16 * config.warps) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-m", "terrazzo.tools.tune_piece", "--models", "llama-3.2-1b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no CUDA device" in done.stderr
