"""What arithmetic means where compilers like to differ from eager: overflow, truth values, memory beyond 2^31 elements,
elements that share memory, pieces that see each other's writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from terrazzo.runtime.backend import terrazzo
from terrazzo.runtime.compiled import CompiledPiece

from .equal import DEVICE, compare, copied, odd, same, traced

INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def extremes(dtype: torch.dtype) -> torch.Tensor:
    info = torch.iinfo(dtype)
    return torch.tensor([info.min, info.min + 1, 0, 1, 3, info.max - 1, info.max], dtype=dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_wrap_around(dtype: torch.dtype) -> None:
    x = extremes(dtype)
    same(lambda x, y: (x + y, x - y, x * y, x * 7, x + 100), x[:, None], x)
    same(lambda x: (-x, x.abs(), ~x, x**2, x**3, x.square(), x << 1), x)
    same(lambda x: (x.sum(), x.prod(), x.cumsum(0), x.cumprod(0), x.amax(), x.amin(), x.argmax(), x.argmin()), x)
    same(lambda x: (x.sum(dtype=torch.int32), x.to(torch.int8), x.to(torch.uint8), x.to(torch.int16), x.bool()), x)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_wrap_around_after_a_bound(dtype: torch.dtype) -> None:
    """A number as the bound makes no wider integer of the element."""
    x = torch.tensor([0, 1, 2, 100, 127], dtype=dtype)
    low = 0 if dtype == torch.uint8 else -1
    same(lambda x: ((x.clamp(low, 120) * 3 + 100).float(), (x.clamp(min=5) + 125).sum(), x.clamp(max=99) << 2), x)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_quotients_of_integers_have_eagers_signs(dtype: torch.dtype) -> None:
    # The smallest by -1 has no quotient: eager stops the process.
    x, y = extremes(dtype)[1:, None], torch.tensor([-7, -3, -2, 1, 2, 3, 100]).to(dtype)
    same(lambda x, y: (x // y, x % y, torch.div(x, y, rounding_mode="trunc"), torch.fmod(x, y), x / y), x, y)
    same(lambda x: (x // 3, x % 3, x // -3, x % -3, 100 // (x | 1), torch.remainder(100, x | 1)), x)


def test_truth_values_are_no_numbers() -> None:
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    same(lambda a, b: (a + b, a * b, a & b, a | b, a ^ b, ~a, a == b, a < b, a >= b, a.logical_not()), a, b)
    same(lambda a, b: (a + 1, a * 2, a / 2, a + 0.5, a // 2, a.sum(), a.prod(), a.cumsum(0), -(a + 0)), a, b)
    same(lambda a, b: (a.amax(), a.min(), a.any(), a.all(), torch.maximum(a, b), torch.minimum(a, b)), a, b)
    same(lambda a, b: (a.to(torch.int8) << 1, a.float().mean(), torch.where(a, 2, b), a.float() - b.float()), a, b)


def test_numbers_of_0_dimensions_do_not_promote_those_with_some() -> None:
    half, single, double = odd(3, dtype=torch.float16), odd(dtype=torch.float32), odd(dtype=torch.float64)
    same(lambda h, s, d: (h + s, h * d, s + d, torch.where(h > s, h, s), torch.maximum(s, d)), half, single, double)
    same(lambda i, s: (i + s, i * 2.5, i / 2, i > s, i.add(1, alpha=2)), odd(3, dtype=torch.int32), single)
    same(lambda i, j: (i + j, i * j, i // 2), odd(3, dtype=torch.int8), odd(dtype=torch.int64))


def test_zeros_keep_their_signs() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -1.0])
    same(lambda x: (-x, x * -1, x.abs(), x + 0, x.round(), x.trunc()), x, exact=True, zeros=True)
    same(
        lambda x: (x / -1, x.sqrt(), torch.copysign(x, -x), x.flip(0) * 0, torch.fmod(x, 1)), x, exact=True, zeros=True
    )


BEYOND = 2**31 + 64


def big() -> torch.Tensor:
    """More elements than 32 bits count; zeros that no one has touched take no memory."""
    x = torch.zeros(BEYOND, dtype=torch.int8, device=DEVICE)
    x[-16:] = torch.arange(16, device=DEVICE)
    return x


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[-10:] * 2,
        lambda x: (x[-16:].flip(0) + x[:16], x[-16:].sum()),
        lambda x: x[: 65536 * 32768].view(65536, 32768)[65533:, ::8192].sum(0) + x[-4:],
        lambda x: x.as_strided((3, 4), (2**30, 5), 20) + x.as_strided((3, 4), (2**29, 1), 2**30 + 60),
    ],
)
def test_offsets_beyond_32_bits(fn: Any) -> None:
    x = big()
    compare(CompiledPiece(traced(fn, 1), [x])(x), fn(x), close=True)


def test_rows_beyond_32_bits() -> None:
    table = big()[: 65537 * 32767].view(65537, 32767)
    table[65530:] = 3
    rows = torch.tensor([65536, 0, 65533, 7], device=DEVICE)
    fn = lambda t, i: (t[i].sum(1), torch.nn.functional.embedding(i, t).amax(1), t[-1, :5] * 2)  # noqa: E731
    compare(CompiledPiece(traced(fn, 2), [table, rows])(table, rows), fn(table, rows), close=True)


def test_elements_that_share_memory_are_read_as_often_as_they_appear() -> None:
    windows = odd(12).unfold(0, 4, 1)
    same(lambda x: (x * 2, x.sum(1), x.t() + 1, x @ x.t(), x.cumsum(0)), windows)
    same(lambda x: (x + x.t(), x.softmax(1)), odd(5)[None].expand(5, 5))


def test_a_later_piece_sees_what_an_earlier_one_wrote() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> Any:
        x.add_(1)
        view = x[1:]
        torch._dynamo.graph_break()
        view.mul_(2)
        y.copy_(x)
        torch._dynamo.graph_break()
        return x + y, view

    torch._dynamo.reset()
    ours, theirs = copied([odd(4, 3), odd(4, 3)]), copied([odd(4, 3), odd(4, 3)])
    with torch.no_grad():
        got, wanted = torch.compile(fn, backend=terrazzo)(*ours), fn(*theirs)
    compare((got, ours), (wanted, theirs), close=True)
    torch._dynamo.reset()


def test_sizes_that_are_products_of_symbols() -> None:
    torch._dynamo.reset()
    fn = lambda x, y: (x.flatten()[: y.numel()] * 2, x.view(-1, x.shape[0] * 2), y.repeat(2).sum() / x.numel())  # noqa: E731
    compiled = torch.compile(fn, backend=terrazzo, dynamic=True)
    for a, b in [(3, 8), (4, 6), (5, 4), (1, 2), (7, 2)]:
        x, y = odd(a, b).to(DEVICE), odd(2).to(DEVICE)
        with torch.no_grad():
            compare(compiled(x, y), fn(x, y), close=True)
    torch._dynamo.reset()
