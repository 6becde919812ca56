"""Ops that move elements, and matrix products, against eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from terrazzo.runtime.compiled import CompiledPiece

from .equal import DEVICE, copied, odd, same, traced

HALF = torch.bfloat16


def test_cat() -> None:
    same(lambda a, b: torch.cat([a, b]), odd(3, 5), odd(2, 5))
    same(lambda a, b: torch.cat([a, b], -1), odd(3, 5), odd(3, 1))
    same(lambda a, b, c: torch.cat([a, b, c], 1), odd(3, 5), odd(3, 0), odd(3, 7))
    same(lambda a, b: torch.cat([a, b], 1), torch.empty(0), odd(3, 7))
    same(lambda a, b: torch.cat([a, b]), odd(3, dtype=HALF), odd(2))
    same(lambda a, b, c: torch.cat([a, b, c]), odd(3, dtype=torch.int64), odd(2, dtype=torch.bool), odd(2, dtype=HALF))
    same(lambda a, b: torch.cat([a.t(), b[:, ::2], a.t()], 1), odd(3, 5), odd(5, 6))
    same(lambda a: torch.cat([a]), odd(3))
    same(lambda a, b: torch.cat([a, b]), odd(0, 5), odd(0, 5))
    same(lambda a, b: torch.cat([a.exp(), b.sin(), a], 1).sum(1), odd(3, 5), odd(3, 4))
    same(lambda a, b: (torch.hstack([a, b]), torch.vstack([a, a]), torch.dstack([a, a])), odd(3, 5), odd(3, 2))


def test_stack() -> None:
    for dim in (0, 1, 2, -1):
        same(lambda a, b, dim=dim: torch.stack([a, b, a], dim), odd(3, 5), odd(3, 5, seed=1))
    same(lambda a, b: torch.stack([a, b]), odd(1)[0], odd(2)[1])
    same(lambda a: torch.stack([a, a]), odd(0, 3))
    same(lambda a: torch.stack([a], -1), odd(2, 3))
    same(lambda a, b: torch.stack([a, b]), odd(3, dtype=torch.int32), odd(3, dtype=torch.int32))


@pytest.mark.parametrize(
    "amounts", [(1, 2), (0, 3, 2, 0), (-1, 2), (-1, -2), (2, -1, -1, 1), (-2, 0, 0, 0), (0, 0), (-5, 0), (1, -1)]
)
def test_pad(amounts: tuple[int, ...]) -> None:
    same(lambda x: F.pad(x, amounts, value=3.5), odd(4, 5))
    same(lambda x: F.pad(x * 2, amounts), odd(4, 5, dtype=torch.int64))


def test_pad_of_odd_things() -> None:
    same(lambda x: F.pad(x, (1, 1), value=True), odd(4, dtype=torch.bool))
    same(lambda x: F.pad(x, (2, 1)), odd(0))
    same(lambda x: F.pad(x, (2, 1), value=float("-inf")), odd(2, 0, dtype=HALF))
    same(lambda x: F.pad(x, (1, 1), mode="reflect"), odd(2, 5))
    same(lambda x: F.pad(x, (1, 2), mode="replicate"), odd(2, 5))
    same(lambda x: F.pad(x, (1, 2), mode="circular"), odd(2, 5), itself=False)


@pytest.mark.parametrize(
    ("start", "end", "step", "size"),
    [
        (0, 4, 1, 4),
        (2, 100, 1, 5),
        (1, 7, 2, 3),
        (0, 7, 3, 3),
        (-3, -1, 1, 2),
        (-100, 2, 1, 2),
        (5, 2, 1, 0),
        (6, 7, 4, 1),
    ],
)
def test_slice_scatter(start: int, end: int, step: int, size: int) -> None:
    same(lambda x, y: torch.slice_scatter(x, y, 1, start, end, step), odd(3, 7), odd(3, size))
    same(lambda x, y: torch.slice_scatter(x, y, 0, start, end, step), odd(7, 2), odd(size, 2))

    def written(x: Any, y: Any) -> Any:
        x = x * 1
        x[:, start:end:step].copy_(y)
        return x

    same(written, odd(3, 7), odd(3, size))


def test_select_scatter_and_diagonals() -> None:
    same(lambda x, y: torch.select_scatter(x, y, 1, -1), odd(3, 4), odd(3))
    same(lambda x, y: torch.select_scatter(x, y, -2, 1), odd(3, 4), odd(4))
    same(lambda x: (x.triu(), x.tril(), x.triu(1), x.tril(-2)), odd(4, 5))
    same(lambda x: (x.triu(-1), x.tril(2)), odd(2, 3, 4))
    same(lambda x: x.diagonal() * 2, odd(4, 5))


def test_moving() -> None:
    same(lambda x: (x.flip(0), x.flip(-1, 0), x.roll(2, 1), x.roll((1, -2), (0, 1)), x.roll(3)), odd(4, 5))
    same(lambda x: (x.repeat(2, 3), x.repeat(2, 1, 2), x.repeat(0, 1), x.tile(2)), odd(2, 3))
    same(lambda x: (x.repeat_interleave(2), x.repeat_interleave(3, dim=1)), odd(2, 3))
    same(lambda x: x.unfold(0, 3, 2) * 1, odd(9))
    same(lambda x: tuple(x.chunk(3, 1)[i] * 2 for i in range(3)), odd(2, 7))
    same(lambda x: tuple(x.split([1, 0, 4], 1)[i] + 1 for i in range(3)), odd(2, 5))
    same(lambda x: tuple(x.unbind(1)[i] + 1 for i in range(3)), odd(2, 3))
    same(lambda x: x.permute(2, 0, 1).reshape(4, 6) + 1, odd(2, 3, 4))
    same(lambda x: x.transpose(0, 1).contiguous().view(-1), odd(2, 3))
    same(lambda x: x.expand(3, 2, 4).reshape(6, 4).neg(), odd(2, 1))
    same(lambda x: x[None, :, None].squeeze(2).movedim(0, 1) * 3, odd(4))
    same(lambda x: x.to(memory_format=torch.channels_last) + 1, odd(2, 3, 4, 5))
    same(lambda x: F.pixel_shuffle(x, 2), odd(1, 8, 2, 3))
    same(lambda x: x.clone(), odd(3, 4).t())
    same(lambda x: (x[..., 0, None] + x[..., -1:], x[1:, ::3] - x[:-1, 1::3]), odd(3, 5))


def test_indices() -> None:
    x, i = odd(5, 7), torch.tensor([4, 0, -1, 2, -5])
    same(lambda x, i: (x[i], x[:, i], x[i, i]), x, i)
    same(lambda x, i: x[i[:, None], i[None, :]], x, i)
    same(lambda x, i: x[i, :, i], odd(5, 3, 5), i, itself=True)
    same(lambda x, i: x[:, i, i], odd(3, 5, 5), i.to(torch.int32))
    same(lambda x, i: x.index_select(1, i), x, torch.tensor([0, 6, 6, 3]))
    same(lambda x, i: x.index_select(0, i), odd(5), torch.tensor(3))
    same(
        lambda x, i: (x.gather(1, i), x.take_along_dim(i, 1)), x, torch.tensor([[0, 6], [3, 3], [1, 2], [5, 5], [6, 0]])
    )
    same(lambda x, i: x.gather(0, i), x, torch.empty(0, 7, dtype=torch.int64))
    same(lambda x, i: x.take(i), x, torch.tensor([[0, 34], [-1, 3]]))
    same(lambda w, i: F.embedding(i, w), x, torch.tensor([[0, 4], [3, 3], [1, 2]]))
    same(lambda w, i: F.embedding(i, w, padding_idx=0) * 2, x.to(HALF), torch.tensor([4, 0, 0], dtype=torch.int32))
    same(lambda w, i: F.embedding(i, w), x, torch.empty(0, 3, dtype=torch.int64))
    # Where tensors are on the CPU, eager reads the indices to check them.
    same(lambda i: F.one_hot(i, 5) * 2, torch.tensor([0, 4, 2]), itself=DEVICE.type == "cpu")
    same(lambda x, i: x[i] + x.exp()[i].sum(-1, keepdim=True), x, i)


def test_writing_by_index() -> None:
    i = torch.tensor([3, 0, -1])
    same(lambda x, i, y: x.index_put((i,), y), odd(5, 2), i, odd(3, 2))
    same(lambda x, i, y: x.index_add(0, i, y), odd(5, 2), i % 5, odd(3, 2))
    same(lambda x, i, y: x.scatter(0, i, y), odd(5, 2), torch.tensor([[4, 0]]), odd(1, 2))
    same(lambda x, i, y: x.scatter_add(0, i, y), odd(5, 2), torch.tensor([[4, 0]]), odd(1, 2))
    same(lambda x, i: x.index_fill(0, i, 7.0), odd(5, 2), i % 5)


def test_making() -> None:
    same(lambda x: torch.arange(7, device=x.device) + x, odd(7))
    same(lambda x: torch.arange(3, 12, 2, device=x.device) * x[0], odd(1))
    same(lambda x: torch.arange(5, -4, -3, device=x.device) * x[0], odd(1, dtype=torch.int64))
    same(lambda x: torch.arange(0.5, 3.0, 0.7, device=x.device) * x[0], odd(1), exact=True)
    same(lambda x: torch.arange(2.0, 5, dtype=torch.float64, device=x.device) * x[0], odd(1))
    same(lambda x: torch.linspace(-1, 2, 7, device=x.device) * x, odd(7))
    same(lambda x: (torch.full_like(x, 2.5), torch.zeros_like(x), torch.ones_like(x, dtype=torch.bool)), odd(3, 2))
    same(lambda x: (x.new_full((2, 3), 7), x.new_zeros(0, 2), torch.full((), 3, device=x.device)), odd(3, dtype=HALF))
    same(lambda x: torch.full_like(x, 2.7, dtype=torch.int64) + torch.full_like(x, -1, dtype=torch.uint8), odd(3))
    same(lambda x: torch.eye(3, 4, device=x.device) * x, odd(4))
    same(lambda x: torch.exp(torch.full((3,), 0.5, device=x.device)) // 0.25 + x, odd(3))
    same(lambda x: torch.meshgrid(x, x + 1, indexing="ij"), odd(3))
    same(lambda x: torch.full((2,), float("nan"), device=x.device).maximum(x), odd(2))
    same(lambda x: (torch.tensor(3.0, device=x.device) * x, torch.tensor([1, 2], device=x.device) + x), odd(2))


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 17, 33), (5, 64, 32), (7, 1, 3), (33, 48, 1), (0, 8, 4), (4, 8, 0)])
def test_products(dtype: torch.dtype, m: int, k: int, n: int) -> None:
    a, b, bias = odd(m, k, dtype=dtype), odd(k, n, dtype=dtype, seed=1), odd(n, dtype=dtype, seed=2)
    same(lambda a, b: a @ b, a, b)
    same(lambda a, w, c: F.linear(a, w, c), a, b.t().contiguous(), bias)
    same(lambda a, b, c: torch.addmm(c, a, b, alpha=0.5, beta=2), a, b, bias)


def test_products_of_odd_operands() -> None:
    same(lambda a, b: a.t() @ b.t(), odd(17, 5), odd(9, 17))
    same(lambda a, b: a[:, ::2] @ b[1:, 3:], odd(5, 18), odd(10, 9))
    same(lambda a, b: a.expand(4, 8) @ b, odd(8), odd(8, 3))
    same(lambda a, b: (a @ b).relu().t() + 1, odd(5, 8), odd(8, 3))
    same(lambda a, b: torch.mm(a, b), odd(5, 0), odd(0, 3))
    same(lambda a, b: (a.exp() @ b, a @ b.sum(1)), odd(5, 8), odd(8, 3))
    same(lambda a, b: a @ b, odd(3, 4, 8), odd(8, 5))
    same(lambda a, b: a @ b, odd(8), odd(8, 5))
    same(lambda a, b: a @ b, odd(8), odd(8))
    same(lambda a, b: a @ b, odd(2, 3, 8), odd(2, 8, 5))
    if DEVICE.type == "cpu":  # eager has no product of integers on a GPU
        same(lambda a, b: a @ b, odd(3, 8, dtype=torch.int64), odd(8, 5, dtype=torch.int64))
    same(lambda a, b: a @ b, odd(3, 8, dtype=torch.float64), odd(8, 5, dtype=torch.float64))
    same(lambda c, a, b: torch.baddbmm(c, a, b), odd(2, 3, 5), odd(2, 3, 8), odd(2, 8, 5))
    same(lambda a, b: torch.outer(a, b), odd(3), odd(5))
    same(lambda a, b: torch.einsum("ij,jk->ki", a, b), odd(3, 4), odd(4, 5))


PASSING: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "topk": (lambda x: x.topk(3, -1), (odd(4, 7),)),
    "sort": (lambda x: x.exp().sort(1), (odd(4, 7),)),
    "cummax": (lambda x: x.cummax(1)[0] * 2, (odd(4, 7),)),
    "conv2d": (lambda x, w: F.conv2d(x, w).relu(), (odd(1, 2, 5, 5), odd(3, 2, 3, 3))),
    "sdpa": (lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), (odd(1, 2, 5, 8),)),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x) * 1j), (odd(3, 2),)),
    "polar": (lambda x: torch.polar(x.abs(), x).abs() + 1, (odd(3),)),
    "float8": (lambda x: (x * 2).to(torch.float8_e5m2).to(torch.float32) + 1, (odd(9),)),
    "bmm": (lambda a: torch.bmm(a * 2, a) + 1, (odd(2, 90, 90),)),
    "einsum": (lambda a: torch.einsum("bij,bkj->bik", a, a), (odd(2, 90, 90),)),
    "bag": (lambda w, i: F.embedding_bag(i, w, mode="sum"), (odd(5, 4), torch.tensor([[0, 1], [4, 4]]))),
    "bits": (lambda x: x.view(torch.int32) + 1, (odd(3),)),
    "narrow_bits": (lambda x: x.view(torch.int16) + 1, (odd(3),)),
    "int8 mm": (lambda a, b: torch._int_mm(a, b), (odd(17, 8, dtype=torch.int8), odd(8, 8, dtype=torch.int8))),
    "tensor split": (lambda x: x.exp().tensor_split(3), (odd(7),)),
}
OURS_ALL_THE_SAME = {"tensor split"}


@pytest.mark.parametrize("name", PASSING)
def test_what_no_kernel_covers_runs_as_itself(name: str) -> None:
    fn, args = PASSING[name]
    same(fn, *args, itself=name not in OURS_ALL_THE_SAME)


@pytest.mark.parametrize("fn", [lambda x: x[x > 0], lambda x: x.nonzero() + 1, lambda x: x.unique() + 1])
def test_shapes_that_depend_on_data_leave_the_graph_as_it_was(fn: Callable[..., Any]) -> None:
    args = copied([odd(9)])
    piece = CompiledPiece(traced(fn, 1), args)
    assert torch.equal(piece(*args), fn(*args))
    assert piece.summary().startswith("runs as the graph it was: ")


def test_dropout_in_eval_is_nothing() -> None:
    same(lambda x: F.dropout(x, 0.5, training=False) * 2, odd(5))


def test_indices_are_numbers_of_64_bits() -> None:
    same(lambda x: torch.arange(5, device=x.device) * 3_000_000_000 + x, odd(5, dtype=torch.int64))
    same(lambda x: torch.arange(0, 15_000_000_000, 3_000_000_000, device=x.device) + x, odd(5, dtype=torch.int64))
    same(lambda x: (torch.arange(5, device=x.device) << 40) * x, odd(5, dtype=torch.int64))
    same(lambda x: torch.where(x > 0, torch.arange(5, device=x.device), -(2**62)), odd(5))


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.int64, torch.int32, torch.float64])
def test_small_products_that_no_gemm_takes(dtype: torch.dtype) -> None:
    if DEVICE.type == "cuda" and not dtype.is_floating_point:
        pytest.skip("eager has no product of integers on a GPU")
    a, b = odd(2, 3, 4, dtype=dtype), odd(2, 4, 5, dtype=dtype)
    same(lambda a, b: torch.bmm(a, b) + 1, a, b)
    same(lambda c, a, b: torch.baddbmm(c, a, b, alpha=2, beta=3), odd(3, 5, dtype=dtype), a, b)
    same(lambda a, b: a @ b[0], a, b)
    same(lambda a, b: torch.bmm(a[:, :, :0], b[:, :0]), a, b)
    if not dtype.is_floating_point or dtype == torch.float64:
        same(lambda a, b: a[0] @ b[0], a, b)
        same(lambda c, a, b: torch.addmm(c, a[0], b[0], alpha=2), odd(5, dtype=dtype), a, b)
    same(lambda a, b: torch.mm(a[0, :, :0], b[0, :0]), a, b)
    same(lambda c, a, b: torch.addbmm(c, a, b, alpha=2, beta=3), odd(3, 5, dtype=dtype), a, b)
    same(lambda c, a, b: torch.addmv(c, a[0], b[0, :, 0], alpha=2), odd(3, dtype=dtype), a, b)
    same(lambda a, b: (a[0] @ b[0, :, 0], torch.dot(a[0, 0], b[0, :, 0])), a, b)


def test_sums_inside_an_op_are_not_rounded() -> None:
    for fn, rounds in ((lambda c, a, b: torch.addmm(c, a, b), False), (lambda c, a, b: (a @ b).relu() + c, True)):
        piece = same(fn, odd(8), odd(5, 8), odd(8, 8))
        (loaded,) = piece.plans.values()
        assert [k.problem.rounds for k in loaded.plan.schedule.launches()] == [rounds]


def test_picking_from_a_single_number() -> None:
    same(lambda x, i: (x.index_select(0, i), torch.gather(x, 0, i)), odd(), torch.tensor([0]))
    same(lambda x, i: (x.index_select(0, i), torch.gather(x, 0, i)), odd(), torch.tensor(0))


def test_copies_of_views() -> None:
    same(lambda x: torch.view_copy(x, (6, 2)), odd(3, 4))
    same(lambda x: (torch.permute_copy(x, (1, 0)), torch.narrow_copy(x, 1, 1, 2)), odd(3, 4))
    same(lambda x: (torch.unbind_copy(x, 1), torch.as_strided_copy(x, (2, 2), (1, 3))), odd(3, 4))


@pytest.mark.parametrize(("start", "end", "steps"), [(4.3, 1, 50), (-3.5, 3.5, 8), (10, 2.5, 6), (0, 7, 1), (1, 5, 0)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_steps_between_two_ends(dtype: torch.dtype, start: float, end: float, steps: int) -> None:
    if dtype == torch.uint8:
        start = abs(start)
    same(lambda x: torch.linspace(start, end, steps, dtype=dtype, device=x.device) + x, odd(1, dtype=dtype))


def test_parts_of_a_join_taken_in_another_order() -> None:
    # Written out, an index's quotient and remainder become the bounded index that both are of.
    def fn(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turned = torch.cat([y[:, 5:], y[:, :5]], 1)
        other = turned.reshape(8, 5).t().reshape(5, 8)
        return x - torch.cat([other[:, :6], turned[:, 6:]], 1).amax(1, keepdim=True), other

    same(fn, odd(5, 8), odd(5, 8, seed=1))
