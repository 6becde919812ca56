"""Eight-bit floats as models quantise to them: kernels store and load them, and compute in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from terrazzo.kernels.target import Target
from terrazzo.lowering.intake import Examples
from terrazzo.lowering.options import Options
from terrazzo.lowering.pipeline import plan, trace
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.tools.oracle import check

from .equal import DEVICE, copied, odd, same, traced

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


def by_token(x: Any, made: torch.dtype = FP8) -> tuple[Any, Any]:
    """As vLLM does it natively: a scale for each row."""
    scale = (x.abs().max(dim=-1)[0].unsqueeze(-1).to(torch.float32) / LARGEST).clamp(min=1 / (LARGEST * 512))
    return (x.to(torch.float32) * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(made), scale


def by_group(x: Any, made: torch.dtype = FP8) -> tuple[Any, Any]:
    """A scale for every eight columns."""
    groups = x.view(-1, x.shape[-1] // 8, 8)
    scale = (groups.abs().max(dim=-1, keepdim=True)[0].float() / LARGEST).clamp(min=1 / (LARGEST * 512))
    return (groups / scale).clamp(-LARGEST, LARGEST).to(made).view(x.shape), scale.squeeze(-1)


def by_tensor(x: Any, scale: Any, made: torch.dtype = FP8) -> Any:
    return (x.to(torch.float32) * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(made)


def normed(x: Any, residual: Any, weight: Any, made: torch.dtype = FP8) -> tuple[Any, Any, Any]:
    wide = x.float() + residual.float()
    scaled = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight
    return *by_token(scaled, made), wide.to(x.dtype)


def gated(x: Any, made: torch.dtype = FP8) -> tuple[Any, Any]:
    gate, up = x.chunk(2, -1)
    return by_token(torch.nn.functional.silu(gate) * up, made)


ROWS = odd(16, 24, dtype=torch.bfloat16)
SMALL = (odd(16, 24) * 20).to(FP8)

QUANTISED: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "a scale a token": (by_token, (ROWS,)),
    "a scale a group": (by_group, (ROWS,)),
    "one scale": (by_tensor, (ROWS, torch.tensor([0.037]))),
    "after a norm": (normed, (ROWS, odd(16, 24, seed=1, dtype=torch.bfloat16), odd(24, seed=2, dtype=torch.bfloat16))),
    "after a gate": (gated, (odd(16, 48, dtype=torch.bfloat16),)),
}  # fmt: skip
PIECES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "loaded": (lambda x: x.to(torch.bfloat16) * 2, (SMALL,)),
    "there and back": (lambda x: x.to(FP8).float() + 1, (odd(16, 24),)),
    "from whole numbers": (lambda x: (x.to(torch.int32).to(FP8), (x > 0).to(FP8)), (odd(16, 24) * 9,)),
    "from fp64": (lambda x: x.double().to(FP8), (odd(16, 24) * 9,)),
    "to others": (lambda x: (x.to(torch.int32), x.to(torch.float16), x.double(), x.bool()), (SMALL,)),
    "moved": (lambda x: (torch.cat((x, x), 1), x.t().contiguous(), x[1:, ::2].clone()), (SMALL,)),
    "chosen": (lambda x, y: torch.where(x.float() > y, x, y.to(FP8)), (SMALL, odd(16, 24, seed=3))),
    "a product of what was loaded": (lambda x, w: x.float() @ w.float().t(), (SMALL, SMALL[:3])),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISED)
def test_what_is_quantised_errs_no_more_than_eager(name: str) -> None:
    """Against what is computed in fp64 and not rounded to eight bits: two sides of a tie are as good."""
    fn, args = QUANTISED[name]
    args = tuple(copied(args))
    piece = CompiledPiece(traced(fn, len(args)), args)
    ours, theirs = (made if isinstance(made, tuple) else (made,) for made in (piece(*args), fn(*args)))
    exact = fn(*(arg.double() for arg in args), made=torch.float64)
    for mine, eager, value in zip(ours, theirs, exact if isinstance(exact, tuple) else (exact,), strict=True):
        assert mine.dtype == eager.dtype
        check(mine.float(), eager.float(), value)
    [loaded] = piece.plans.values()
    [kernel] = loaded.plan.schedule.launches()
    assert kernel.family, "it joins what computes the values"


@pytest.mark.parametrize("name", PIECES)
def test_what_is_moved_and_cast_is_what_eager_makes(name: str) -> None:
    fn, args = PIECES[name]
    same(fn, *args)


def test_every_value_rounds_as_eager_rounds_it() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    every = every[every.isfinite()].sort()[0]
    between = (every[1:] + every[:-1]) / 2
    values = torch.cat([every, between, between.nextafter(every[1:]), between.nextafter(every[:-1])])
    same(lambda x: x.to(FP8), values, exact=True)
    piece = same(lambda x: x.to(FP8), torch.tensor([torch.nan, 1.0]))
    # Beyond the largest, Triton saturates, and eager does in some versions; what quantises clamps before.
    assert piece(torch.tensor([1e9, -1e9], device=DEVICE)).float().tolist() == [LARGEST, -LARGEST]


@pytest.mark.parametrize(("device", "ours"), [("h100", True), ("a100", False)])
def test_where_kernels_do_not_know_them_the_cast_is_an_op_of_its_own(device: str, ours: bool) -> None:
    graph = traced(by_token, 1)
    made = plan(trace(graph, Examples.of(graph, (ROWS,))), {}, Options(Target.named(device)))
    assert [not k.family for k in made.schedule.launches()].count(True) == (not ours)
    assert ("float8e4nv" in made.source) == ours


def test_constants() -> None:
    same(
        lambda x: (torch.ones_like(x), torch.full_like(x, -2.5), torch.zeros_like(x)),
        torch.zeros(4).to(FP8),
        exact=True,
    )
