"""vLLM's product of eight-bit floats: a kernel of ours for few tokens, the op itself elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from terrazzo.kernels.target import Target
from terrazzo.lowering.errors import UserError
from terrazzo.lowering.intake import Examples
from terrazzo.lowering.options import Options
from terrazzo.lowering.pipeline import plan, trace
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.runtime.lowered import planned_range
from terrazzo.tools.models import pieces
from terrazzo.tools.piece_check import check_sizes

from . import vllm_pieces
from .equal import DEVICE, compare, copied, odd, traced
from .vllm_pieces import FP8, captured, quantised

BF16 = torch.bfloat16


def product(x: Any, w: Any, x_scales: Any, w_scales: Any, bias: Any = None, dtype: torch.dtype = BF16) -> Any:
    """W is [N, K], as it is stored."""
    out = torch.empty((x.shape[0], w.shape[0]), dtype=dtype, device=x.device)
    torch.ops._C.cutlass_scaled_mm(out, x, w.t(), x_scales, w_scales, bias)
    return out


def operands(m: int, n: int = 48, k: int = 64) -> list[Any]:
    return [(odd(m, k) * 3).to(FP8), (odd(n, k, seed=1) * 3).to(FP8), odd(m, 1, seed=2).abs(), odd(n, seed=3).abs()]


ONE = torch.tensor([0.037])


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("m", [1, 7, 128])
@pytest.mark.parametrize("scales", ["each", "rows", "columns", "one", "a column of columns"])
def test_scales_of_rows_and_columns(scales: str, m: int, dtype: torch.dtype) -> None:
    x, w, rows, columns = operands(m)
    given = {
        "each": (rows, columns),
        "rows": (rows, ONE),
        "columns": (ONE, columns),
        "one": (ONE, ONE[0]),
        "a column of columns": (rows, columns[:, None]),
    }[scales]
    args = copied([x, w, *given])
    piece = CompiledPiece(traced(lambda *a: product(*a, dtype=dtype), 4), args)
    exact = (args[0].double() @ args[1].double().t()) * args[2].double().view(-1, 1) * args[3].double().view(1, -1)
    compare(piece(*args), product(*args, dtype=dtype), exact)
    assert piece.summary().endswith("1 kernels, 0 ops as themselves")


# One step, many, the last one short; K in parts; all multiprocessors and few.
DEEP = [(1, 512, 8192), (7, 4096, 4112), (16, 512, 8208), (64, 1024, 4096), (100, 2048, 8192), (128, 4096, 14336)]


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [*DEEP, (128, 6144, 4096)])
def test_deep_products(m: int, n: int, k: int) -> None:
    args = copied(operands(m, n, k))
    piece = CompiledPiece(traced(product, 4), args)
    exact = (args[0].double() @ args[1].double().t()) * args[3].double() * args[2].double()
    compare(piece(*args), product(*args), exact)
    [loaded] = piece.plans.values()
    assert [kernel.family for kernel in loaded.plan.schedule.launches()] == ["gemm_stream"]


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), DEEP)
def test_deep_pairs(m: int, n: int, k: int) -> None:
    def fn(x: Any, w: Any, rows: Any, columns: Any) -> Any:
        gate, up = product(x, w, rows, columns).float().chunk(2, 1)
        return (torch.nn.functional.silu(gate) * up).bfloat16()

    args = copied(operands(m, 2 * n, k))
    args[2] /= k**0.5
    piece = CompiledPiece(traced(fn, 4), args)
    exact = (args[0].double() @ args[1].double().t()) * args[3].double() * args[2].double()
    gate, up = exact.chunk(2, 1)
    compare(piece(*args), fn(*args), torch.nn.functional.silu(gate) * up)
    assert piece.summary().endswith("1 kernels, 0 ops as themselves")


def test_a_bias_joins_and_what_follows_is_the_epilogue() -> None:
    def fn(x: Any, w: Any, rows: Any, columns: Any, bias: Any, residual: Any) -> Any:
        return torch.relu(product(x, w, rows, columns, bias)) + residual

    args = copied([*operands(7), odd(48, seed=4, dtype=BF16), odd(7, 48, seed=5, dtype=BF16)])
    piece = CompiledPiece(traced(fn, 6), args)
    x, w, rows, columns, bias, residual = (a.double() for a in args)
    exact = torch.relu((x @ w.t()) * rows * columns + bias) + residual
    compare(piece(*args), fn(*args), exact)
    assert piece.summary() == "fixed: 1 kernels, 0 ops as themselves"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"m": 129}, "more than 128 tokens"),
        ({"k": 40}, "do not begin at multiples of 16"),
    ],
)
def test_elsewhere_it_is_itself(change: dict[str, int], why: str) -> None:
    args = copied(operands(**{"m": 7} | change))
    piece = CompiledPiece(traced(product, 4), args)
    compare(piece(*args), product(*args))
    [loaded] = piece.plans.values()
    assert piece.summary().endswith("0 kernels, 1 ops as themselves") and why in loaded.plan.themselves[0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x, w, bias: (x[:, 8:72], w[:, 8:72], bias), "do not begin at multiples of 16"),
        (lambda x, w, bias: (x.t().contiguous().t()[:, :64], w[:, :64], bias), "do not lie along the depth"),
        (lambda x, w, bias: (x[:, :0], w[:, :0], bias), "are empty"),
        (lambda x, w, bias: (x, w, bias[:1]), "its bias is"),
        (lambda x, w, bias: (x, w, bias[None] * x.float().mean(1, keepdim=True).bfloat16()), "its bias is"),
        (lambda x, w, bias: (x, w, bias.double()), "its bias is"),
    ],
)
def test_operands_that_its_kernel_is_not_for(change: Any, why: str) -> None:
    def fn(x: Any, w: Any, rows: Any, columns: Any, bias: Any) -> Any:
        x, w, bias = change(x, w, bias)
        return product(x, w, rows, columns, bias)

    args = copied([*operands(7, k=80), odd(48, seed=4, dtype=BF16)])
    piece = CompiledPiece(traced(fn, 5), args)
    compare(piece(*args), fn(*args))
    [loaded] = piece.plans.values()
    assert any("cutlass_scaled_mm" in reason and why in reason for reason in loaded.plan.themselves)


def test_rows_that_lie_apart_are_read_where_they_are() -> None:
    def fn(x: Any, w: Any, rows: Any, columns: Any) -> Any:
        return product(x[:, 16:80], w[:, :64], rows, columns)

    args = copied(operands(7, k=96))
    piece = CompiledPiece(traced(fn, 4), args)
    exact = (args[0][:, 16:80].double() @ args[1][:, :64].double().t()) * args[2].double() * args[3].double()
    compare(piece(*args), fn(*args), exact)
    assert piece.summary().endswith("1 kernels, 0 ops as themselves")


def test_large_scales_of_rows_meet_small_ones_of_columns_first() -> None:
    x, w, rows, columns = operands(7)
    args = copied([x, w, torch.full_like(rows, 1e37), torch.full_like(columns, 1e-35)])
    assert (args[0].float() @ args[1].float().t() * args[2]).isinf().any()
    piece = CompiledPiece(traced(product, 4), args)
    exact = (args[0].double() @ args[1].double().t()) * args[3].double() * args[2].double()
    compare(piece(*args), product(*args), exact)
    assert exact.abs().max() < 1e6


@pytest.mark.parametrize("same", ["scales", "bias"])
def test_what_is_written_and_read_is_the_ops_affair(same: str) -> None:
    def fn(x: Any, w: Any, rows: Any, out: Any) -> Any:
        scales, bias = (out, None) if same == "scales" else (rows[:1], out)
        torch.ops._C.cutlass_scaled_mm(out, x, w.t(), rows, scales, bias)
        return out

    x, w, rows, _ = operands(1)
    args = copied([x, w, rows, odd(1, 48, seed=6) * 500])
    theirs = copied(args)
    piece = CompiledPiece(traced(fn, 4), args)
    compare(piece(*args), fn(*theirs), close=True)
    assert piece.summary().endswith("1 ops as themselves")


def test_scales_in_another_dtype_are_the_ops_affair() -> None:
    x, w, rows, columns = copied(operands(7))
    args = [x, w, rows.double(), columns]
    piece = CompiledPiece(traced(product, 4), args)
    compare(piece(*args), product(*args))
    [loaded] = piece.plans.values()
    assert "its scales are" in loaded.plan.themselves[0]


@pytest.mark.parametrize(("device", "families"), [("h200", ["gemm_stream"]), ("b200", [""]), ("a100", [""])])
def test_devices(device: str, families: list[str]) -> None:
    args = operands(16, 4096, 4096)
    graph = traced(product, 4)
    made = plan(trace(graph, Examples.of(graph, args)), {}, Options(Target.named(device)))
    assert [k.family for k in made.schedule.launches() if k.group.kind != "item"] == families


def test_a_range_is_cut_where_few_tokens_end() -> None:
    model = quantised(vllm_pieces.Middle(64, 96, 4, 2, 32, False).to(BF16).requires_grad_(False)).to(DEVICE)
    attended, residual = odd(40, 4, 32, dtype=BF16).to(DEVICE), odd(40, 64, dtype=BF16, seed=1).to(DEVICE)
    graph, _ = captured(model, attended, residual, torch.arange(40, device=DEVICE))
    found = planned_range(graph, Examples.of(graph, None), 1, 8192, Options(Target.named("h200")))
    themselves = {r.hi: r.plan.facts.foreign for r in found if r.plan is not None}
    assert 128 in themselves and all(count == (0 if hi <= 128 else 4) for hi, count in themselves.items())


def torchs(x: Any, w: Any, x_scales: Any, w_scales: Any, bias: Any = None, fast: bool = True) -> Any:
    return torch._scaled_mm(x, w.t(), x_scales, w_scales, bias, None, BF16, fast)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("m", [1, 7, 128])
def test_torchs_own_op(m: int, biased: bool) -> None:
    x, w, rows, columns = operands(m)
    bias = [odd(48, seed=4, dtype=BF16)] * biased
    args = copied([x, w, rows, columns[None], *bias])
    piece = CompiledPiece(traced(torchs, len(args)), args)
    exact = (args[0].double() @ args[1].double().t()) * args[2].double() * args[3].double()
    compare(piece(*args), torchs(*args), exact + (args[4].double() if biased else 0))
    assert piece.summary().endswith("1 kernels, 0 ops as themselves")


def test_torchs_own_op_where_it_sums_more_exactly() -> None:
    x, w, rows, columns = operands(7)
    args = copied([x, w, rows, columns[None]])
    piece = CompiledPiece(traced(lambda *a: torchs(*a, fast=False), 4), args)
    compare(piece(*args), torchs(*args, fast=False))
    [loaded] = piece.plans.values()
    assert "more exactly" in loaded.plan.themselves[0]


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-8b", "mixtral-8x7b"])
def test_models_whose_layers_are_quantised(name: str) -> None:
    piece = pieces(name, tiny=True, dtype=FP8, device=DEVICE)[1]
    assert [r.failures for r in check_sizes(piece, (1, 7, 130), DEVICE)] == [[]] * 3
    # A token's weights are half those of bf16.
    wide = pieces(name, tiny=True, device=DEVICE)[1]
    assert piece.flops(4) == wide.flops(4) and piece.weight_bytes() < wide.weight_bytes()


def test_gpt2_is_not_quantised() -> None:
    with pytest.raises(UserError, match="fp8"):
        pieces("gpt2", tiny=True, dtype=FP8)
