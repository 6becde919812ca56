"""Rows of measurements: for whom they are, and what follows from there being one."""

from __future__ import annotations

from dataclasses import replace

import torch

from terrazzo.kernels import gemm_simple, gemm_stream
from terrazzo.kernels.gemm import GemmProblem, in_bucket, measured, row_of
from terrazzo.kernels.gemm_pick import pick
from terrazzo.kernels.gemm_stream_table import few_tokens
from terrazzo.kernels.target import Target

H200 = Target.named("h200")


def test_products_with_rows_stream_for_more_tokens() -> None:
    down = GemmProblem(160, 4096, 14336, torch.bfloat16, summed=64)
    pair = GemmProblem(160, 14336, 4096, torch.bfloat16, paired=True, pair_offset=14336, scaled=True)
    for problem in (down, pair, replace(down, m=129)):
        name, config, why = pick(problem, H200)
        assert name == "gemm_stream" and config.extra_m and "measured" in why
        assert few_tokens(problem.n * problem.accumulators, problem.k, H200) == 192
    for other in (replace(down, m=193), replace(down, n=4608), replace(down, layout="kn")):
        assert gemm_stream.supports(other) is not None
    # On another device neither is taken for more tokens than it was measured for there.
    h100, other = Target.named("h100"), replace(down, k=12288, m=192, summed=0)
    assert pick(other, H200)[0] == "gemm_stream" and pick(other, h100)[0] != "gemm_stream"
    assert pick(replace(other, m=160), h100)[0] == "gemm_stream" and few_tokens(24576, 4096, h100) == 160


def test_few_tokens_are_never_fewer_than_without_rows() -> None:
    for name, table in gemm_stream.CONFIGS.items():
        for n, k, kind in table:
            assert few_tokens(n * (2 if kind == "pair" else 1), k, Target.named(name)) >= gemm_stream.MOST_TOKENS


def test_a_row_is_of_one_shape_and_serves_the_bucket_that_holds_m() -> None:
    table = measured(gemm_simple.Config, "N K kind m bm bn bk st wp us cuBLAS\n64 32 one 16 16 16 16 1 4 2.0 3.0", "")
    half = GemmProblem(9, 64, 32, torch.float16)
    hit = in_bucket(row_of(table, half), (16, 64), 9)
    assert hit is not None
    assert (hit.config, hit.us) == (gemm_simple.Config(16, 16, 16, 1, 4), 2.0)
    assert in_bucket(row_of(table, half), (16, 64), 17) is None
    assert not row_of(table, replace(half, dtype=torch.float32)) and not row_of(table, replace(half, layout="kn"))
