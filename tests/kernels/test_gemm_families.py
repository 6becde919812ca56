"""The GEMM families against an fp64 oracle: layouts, pairing, split-K, odd sizes, untouched memory, repeats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from terrazzo.kernels import gemm_persistent, gemm_simple, gemm_skinny, gemm_stream
from terrazzo.kernels.gemm import GemmProblem, reference
from terrazzo.kernels.gemm_boxes import together
from terrazzo.lowering.errors import Unsupported

from .oracle import check

SKINNY = gemm_skinny.Config(16, 64, 64, 3, 4, 1)
SPLIT = gemm_skinny.Config(16, 64, 64, 3, 4, 3)
WIDE = gemm_skinny.Config(64, 64, 64, 2, 4, 2)
STREAM = gemm_stream.Config(16, 64, 128, 4, 4, 1)
STREAM_SPLIT = gemm_stream.Config(8, 64, 64, 3, 4, 3)
TOKENS_FIRST = gemm_stream.Config(64, 32, 64, 3, 4, 2, tokens_first=True)
TALL = gemm_stream.Config(128, 64, 128, 2, 4, 1)
TALL_TOKENS = gemm_stream.Config(128, 32, 64, 3, 4, 2, tokens_first=True)
BESIDE_TOKENS = gemm_stream.Config(64, 64, 64, 3, 4, 2, extra_m=16)
TALL_BESIDE = gemm_stream.Config(128, 64, 64, 2, 4, 1, extra_m=64)
PERSISTENT = gemm_persistent.Config(64, 64, 64, 3, 4, group_m=2)
FLAT = gemm_persistent.Config(64, 128, 64, 2, 4, flatten=True, runs=2)
QUARTERS = gemm_persistent.Config(64, 128, 64, 2, 4, flatten=True, runs=4)
BESIDE = gemm_persistent.Config(64, 64, 64, 3, 4, extra_n=32)
# Four programs in the interpreter: whole waves are multiples of four tiles.
TAIL = gemm_persistent.Config(64, 64, 64, 3, 4, programs_per_sm=4, tail_n=32)
SIMPLE = gemm_simple.Config(32, 64, 32, 2, 4)

FAMILIES = [
    pytest.param(gemm_skinny, SKINNY, id="skinny"),
    pytest.param(gemm_skinny, SPLIT, id="split"),
    pytest.param(gemm_skinny, WIDE, id="split-wide"),
    pytest.param(gemm_stream, STREAM, id="stream", marks=pytest.mark.gpu),
    pytest.param(gemm_stream, STREAM_SPLIT, id="stream-split", marks=pytest.mark.gpu),
    pytest.param(gemm_stream, TOKENS_FIRST, id="stream-tokens-first", marks=pytest.mark.gpu),
    pytest.param(gemm_stream, TALL, id="stream-tall", marks=pytest.mark.gpu),
    pytest.param(gemm_stream, TALL_TOKENS, id="stream-tall-tokens-split", marks=pytest.mark.gpu),
    pytest.param(gemm_stream, BESIDE_TOKENS, id="stream-beside-split", marks=pytest.mark.gpu),
    pytest.param(gemm_stream, TALL_BESIDE, id="stream-tall-beside", marks=pytest.mark.gpu),
    pytest.param(gemm_persistent, PERSISTENT, id="persistent"),
    pytest.param(gemm_persistent, FLAT, id="persistent-flat"),
    pytest.param(gemm_persistent, QUARTERS, id="persistent-quarters"),
    pytest.param(gemm_persistent, TAIL, id="persistent-tail"),
    pytest.param(gemm_simple, SIMPLE, id="simple"),
]
# One token, primes, one beside a power of two, several tiles each way; K stays a multiple of 8 for TMA.
SIZES = [(1, 61, 72), (7, 97, 200), (17, 65, 136), (67, 128, 64)]
LARGE = [(1, 4096, 4096), (61, 3072, 2048), (128, 2048, 8192), (509, 6144, 4096)]
CANARY = 64


@triton.jit
def store(acc, acc2, m, n, mask, t):
    tl.store(t[0] + m * t[1] + n, acc.to(t[0].dtype.element_ty), mask=mask)


@triton.jit
def silu_residual(acc, acc2, m, n, mask, t):
    at = m * t[1] + n
    value = acc / (1 + tl.exp(-acc)) + tl.load(t[2] + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(t[0] + at, value.to(t[0].dtype.element_ty), mask=mask)


@triton.jit
def add_in_place(acc, acc2, m, n, mask, t):
    at = t[0] + m * t[1] + n
    tl.store(at, (tl.load(at, mask=mask, other=0.0) + acc).to(t[0].dtype.element_ty), mask=mask)


@triton.jit
def silu_mul(acc, acc2, m, n, mask, t):
    tl.store(t[0] + m * t[1] + n, (acc / (1 + tl.exp(-acc)) * acc2).to(t[0].dtype.element_ty), mask=mask)


def operands(problem: GemmProblem, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(problem.m, problem.k).to(device, problem.dtype)
    w = (torch.randn(problem.w_shape) / problem.k**0.5).to(device, problem.dtype)
    return x, w


def poisoned(problem: GemmProblem, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A NaN-filled result with canaries around it, and the whole buffer."""
    size = problem.batch * problem.m * problem.n
    buffer = torch.full((size + 2 * CANARY,), float("nan"), dtype=problem.dtype, device=device)
    return buffer[CANARY : CANARY + size].view(-1, problem.n), buffer


def run(
    family: ModuleType,
    config: Any,
    problem: GemmProblem,
    device: torch.device,
    body: Any,
    torch_body: Callable,
    **kw: Any,
) -> torch.Tensor:
    """Launch on fresh operands, compare, and return the result."""
    x, w = operands(problem, device)
    y, buffer = poisoned(problem, device)
    residual = torch.randn(problem.m, problem.n).to(device, problem.dtype)
    family.prepare(body, config, problem)(x, w, (y, problem.n, residual))
    eager = reference(problem, x, w, lambda *parts: torch_body(residual, *parts))
    oracle = reference(problem, x.double(), w.double(), lambda *parts: torch_body(residual.double(), *parts))
    check(y, eager, oracle)
    assert torch.cat([buffer[:CANARY], buffer[-CANARY:]]).isnan().all(), "written outside of the result"
    return y


def plain(residual: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
    return acc


def with_residual(residual: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(acc) + residual


def glu(residual: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize(("family", "config"), FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(family: ModuleType, config: Any, size: tuple[int, int, int], device: torch.device) -> None:
    run(family, config, GemmProblem(*size, torch.float16), device, store, plain)


@pytest.mark.parametrize(("family", "config"), FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(family: ModuleType, config: Any, dtype: torch.dtype, device: torch.device) -> None:
    problem = GemmProblem(19, 80, 144, dtype)
    if family is gemm_stream and dtype == torch.float32:
        assert family.supports(problem) == "dtype torch.float32 is not float16, bfloat16 or float8_e4m3fn"
        return
    if dtype == torch.float32:
        config = replace(config, block_m=16, block_k=32)
    run(family, config, problem, device, silu_residual, with_residual)


@pytest.mark.parametrize(("family", "config"), FAMILIES)
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_paired(family: ModuleType, config: Any, layout: str, device: torch.device) -> None:
    # The pair starts beyond the first accumulator's last column, and the last tile reaches beyond W.
    problem = GemmProblem(5, 72, 136, torch.float16, layout, paired=True, pair_offset=80)
    run(family, config, problem, device, silu_mul, glu)


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_columns_first(family: ModuleType, config: Any, device: torch.device) -> None:
    run(family, config, GemmProblem(9, 88, 104, torch.float16, "kn"), device, silu_residual, with_residual)


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_one_preparation_serves_every_m(family: ModuleType, config: Any, device: torch.device) -> None:
    problem = GemmProblem(70, 72, 64, torch.float16)
    x, w = operands(problem, device)
    launch = family.prepare(store, config, problem)
    expected = reference(problem, x.double(), w.double())
    for m in (0, 1, 2, 17, 64, 70):
        y = torch.full((m + 1, problem.n), float("nan"), dtype=x.dtype, device=device)
        launch(x[:m], w, (y, problem.n))
        assert y[m].isnan().all(), "a row beyond m was written"
        torch.testing.assert_close(y[:m].double(), expected[:m], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_each_row_is_stored_by_one_tile(family: ModuleType, config: Any, device: torch.device) -> None:
    # The last tile's rows begin before the end of the tile before it, and a tile's second half within its first.
    problem = GemmProblem(193, 72, 64, torch.float16)
    x, w = operands(problem, device)
    launch = family.prepare(add_in_place, config, problem)
    expected = reference(problem, x.double(), w.double())
    for m in (1, 31, 32, 33, 63, 64, 65, 96, 100, 127, 128, 129, 193):
        y = torch.ones(m, problem.n, dtype=torch.float32, device=device)
        launch(x[:m], w, (y, problem.n))
        torch.testing.assert_close(y.double() - 1, expected[:m], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_rows_of_a_wider_matrix(family: ModuleType, config: Any, device: torch.device) -> None:
    problem = GemmProblem(6, 64, 64, torch.float16, x_strides=(0, 192, 1))
    wide = torch.randn(6, 192).to(device, torch.float16)
    w = torch.randn(64, 64).to(device, torch.float16)
    y, _ = poisoned(problem, device)
    family.prepare(store, config, problem)(wide[:, 64:128], w, (y, problem.n))
    x = wide[:, 64:128]
    check(y, reference(problem, x, w), reference(problem, x.double(), w.double()))


@pytest.mark.parametrize(
    ("family", "config"), [f for f in FAMILIES if "split" in f.id or f.id == "stream-tokens-first"]
)
@pytest.mark.parametrize("paired", [False, True])
def test_split_sums_repeat_bit_by_bit(family: ModuleType, config: Any, paired: bool, device: torch.device) -> None:
    n, k = (72, 456) if device.type == "cpu" else (4096, 14336)
    problem = GemmProblem(13, n, k, torch.float16, paired=paired, pair_offset=n)
    x, w = operands(problem, device)
    launch = family.prepare(silu_mul if paired else store, config, problem)
    results = []
    for _ in range(3):
        y, _ = poisoned(problem, device)
        launch(x, w, (y, n))
        results.append(y)
    assert all(torch.equal(results[0], other) for other in results[1:])
    combine = (lambda gate, up: glu(gate, gate, up)) if paired else (lambda acc: acc)
    check(results[0], reference(problem, x, w, combine), reference(problem, x.double(), w.double(), combine))


@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("size", [(1, 8, 72), (70, 104, 64), (67, 200, 136)])
def test_two_accumulators_side_by_side(size: tuple[int, int, int], layout: str, device: torch.device) -> None:
    # Tiles of 64 + 32 columns: N ends in the first part, in the second, and in a tile of its own.
    run(gemm_persistent, BESIDE, GemmProblem(*size, torch.float16, layout), device, silu_residual, with_residual)


@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("config", [BESIDE, replace(BESIDE, extra_n=16, flatten=True, runs=2)])
def test_pairs_side_by_side(config: Any, layout: str, device: torch.device) -> None:
    # N ends in the first part of a tile, in the second, or with it, each before the other half of the pair begins.
    for n in (40, 72, 64 + config.extra_n, 200):
        problem = GemmProblem(67, n, 136, torch.float16, layout, paired=True, pair_offset=n + 8)
        run(gemm_persistent, config, problem, device, silu_mul, glu)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(5, 72, 136), (80, 8, 64), (161, 200, 136), (192, 512, 512)])
@pytest.mark.parametrize(
    "config",
    [
        gemm_stream.Config(64, 32, 64, 3, 4, 1),
        gemm_stream.Config(64, 32, 64, 3, 4, 2, extra_m=16),
        gemm_stream.Config(128, 64, 64, 2, 8, 3, extra_m=32),
    ],
)
def test_pairs_that_share_the_rows_of_a_product(config: Any, size: tuple[int, int, int], device: torch.device) -> None:
    # N ends within a tile, and the other half of the pair begins behind columns of neither.
    for offset in (size[1], size[1] + 8):
        problem = GemmProblem(*size, torch.bfloat16, paired=True, pair_offset=offset)
        assert together(problem, config)
        run(gemm_stream, config, problem, device, silu_mul, glu)


@pytest.mark.parametrize("paired", [False, True], ids=["one", "pair"])
@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("config", [replace(TAIL, tail_n=16), replace(TAIL, flatten=True, runs=2, group_m=1)])
def test_narrower_tiles_at_the_end(config: Any, layout: str, paired: bool, device: torch.device) -> None:
    # In the interpreter 1, 2, 3, 4, 5, 6 and 7 tiles: only narrower ones, whole ones only, a wave of whole ones with
    # narrower after it or, where they would be too many, whole ones again. N ends within a narrower tile.
    sizes = [(3, 40), (67, 56), (130, 40), (67, 88), (257, 40), (130, 104), (400, 40)]
    # On 132 multiprocessors a wave of 528 tiles and narrower ones after it.
    sizes += [(500, 4248)] if device.type == "cuda" else []
    for m, n in sizes:
        problem = GemmProblem(m, n, 136, torch.float16, layout, paired=paired, pair_offset=n)
        body, combine = (silu_mul, glu) if paired else (silu_residual, with_residual)
        run(gemm_persistent, config, problem, device, body, combine)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param(gemm_skinny, SPLIT, id="skinny"),
        pytest.param(gemm_stream, STREAM_SPLIT, id="stream", marks=pytest.mark.gpu),
        pytest.param(gemm_stream, TOKENS_FIRST, id="stream-tokens-first", marks=pytest.mark.gpu),
    ],
)
def test_more_splits_than_depth(family: ModuleType, config: Any, device: torch.device) -> None:
    # Two of the four programs have nothing to sum; they must still count in.
    run(family, replace(config, split_k=4), GemmProblem(3, 64, 72, torch.float16), device, store, plain)


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 5), (2, 7, 1), (5, 3, 33)])
def test_simple_takes_tiny_sizes(size: tuple[int, int, int], device: torch.device) -> None:
    run(gemm_simple, SIMPLE, GemmProblem(*size, torch.float32), device, silu_residual, with_residual)


def test_simple_takes_any_strides(device: torch.device) -> None:
    problem = GemmProblem(11, 13, 21, torch.float32)
    x = torch.randn(21, 23)[:, 1::2].T.to(device)
    w = torch.randn(13, 63)[:, ::3].to(device)
    y, _ = poisoned(problem, device)
    gemm_simple.prepare(store, SIMPLE, problem)(x, w, (y, problem.n))
    check(y, x @ w.T, x.double() @ w.double().T)


@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_simple_batches(layout: str, device: torch.device) -> None:
    problem = GemmProblem(37, 20, 19, torch.float16, layout, batch=3)
    x = torch.randn(3, 37, 19).to(device, torch.float16)
    w = torch.randn(3, *problem.w_shape).to(device, torch.float16)
    y, buffer = poisoned(problem, device)
    gemm_simple.prepare(store, SIMPLE, problem)(x, w, (y, problem.n))
    check(y.view(3, 37, 20), reference(problem, x, w), reference(problem, x.double(), w.double()))
    assert buffer[-CANARY:].isnan().all()


def test_unaligned_operand_is_refused_by_name(device: torch.device) -> None:
    problem = GemmProblem(4, 64, 64, torch.float16)
    x = torch.randn(4 * 64 + 1).to(device, torch.float16)[1:].view(4, 64)
    w = torch.randn(64, 64).to(device, torch.float16)
    with pytest.raises(Unsupported, match="TMA descriptor of x"):
        gemm_skinny.prepare(store, SKINNY, problem)(x, w, (torch.empty(4, 64, dtype=x.dtype, device=device), 64))


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "config"), FAMILIES)
@pytest.mark.parametrize("size", LARGE)
def test_large_sizes(family: ModuleType, config: Any, size: tuple[int, int, int], device: torch.device) -> None:
    run(family, config, GemmProblem(*size, torch.bfloat16), device, silu_residual, with_residual)


def check_order(family: ModuleType, config: Any, problem: GemmProblem, device: torch.device) -> None:
    """Each product reads what the one before it wrote; an early read would repeat an older link of the chain."""
    x, w = operands(problem, device)
    links: dict[bool, list[torch.Tensor]] = {}
    for pdl in (False, True):
        launch = family.prepare(store, config, problem, pdl=pdl)
        links[pdl] = [x]
        for _ in range(12):
            links[pdl].append(torch.full_like(x, float("nan")))
        torch.cuda.synchronize()
        for source, sink in zip(links[pdl], links[pdl][1:], strict=False):
            launch(source, w, (sink, problem.n))
        torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(links[False], links[True], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "config"), [f for f in FAMILIES if f.id != "simple"])
def test_dependent_launch_keeps_the_order(family: ModuleType, config: Any, device: torch.device) -> None:
    check_order(family, config, GemmProblem(70, 512, 512, torch.bfloat16, w_given=True), device)
