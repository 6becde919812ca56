"""What a program means beyond its values: mutation, aliasing, structure, symbolic sizes, numbers known at run time.

Everything here goes through Dynamo, as users' programs do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from terrazzo.runtime.backend import terrazzo
from terrazzo.runtime.compiled import CompiledPiece
from terrazzo.runtime.floats import LIMIT

from .equal import DEVICE, compare, copied, odd


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recording:
    """The backend, remembering the pieces it made."""

    def __init__(self) -> None:
        self.pieces: list[CompiledPiece] = []

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        made = terrazzo(graph, example_inputs)
        self.pieces.append(made)
        return made

    def summaries(self) -> str:
        return "; ".join(p.summary() for p in self.pieces)


def through_dynamo(
    fn: Callable[..., Any], *calls: tuple[Any, ...], dynamic: bool = False, itself: bool = False
) -> Recording:
    """Asserts that every call of the compiled function does what the function does: results, mutation, aliasing.

    Args:
        fn: the function.
        calls: argument lists, in order.
        dynamic: as for `torch.compile`.
        itself: whether some op is expected to run as itself.
    """
    backend = Recording()
    compiled = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)
    for args in calls:
        ours, theirs = copied(args), copied(args)
        with torch.no_grad():
            got, wanted = compiled(*ours), fn(*theirs)
        compare((got, ours), (wanted, theirs), close=True)
    summary = backend.summaries()
    assert "as the graph it was" not in summary, summary
    assert itself or " 0 ops" in summary or not summary, summary
    assert itself or not any(f" {n} ops" in summary for n in range(1, 9)), summary
    return backend


def mutates_input(x: Any) -> Any:
    x.add_(1)
    return x * 2


def returns_one_memory(x: Any) -> Any:
    y = x + 1
    return y, y.view(3, 2), y, y.detach(), y.contiguous(), y[:, 0]


def mutates_view_of_input(x: Any) -> Any:
    x[1:, ::2].mul_(3)
    return x.sum()


def mutates_after_reading(x: Any, y: Any) -> Any:
    kept = x + 0
    x.copy_(y)
    y.zero_()
    return kept, x - y


def swaps(x: Any, y: Any) -> None:
    z = x.clone()
    x.copy_(y)
    y.copy_(z)


def writes_through_a_view_of_a_temporary(x: Any) -> Any:
    z = torch.zeros_like(x)
    z.t()[0] = x[:, 1]
    z[1].fill_(7)
    return z, z.view(-1)[3:5]


def returns_views_of_each_other(x: Any) -> Any:
    y = x.relu()
    return y, y[0], y.t(), y.view(-1)


def returns_inputs(x: Any, y: Any) -> Any:
    return y, x, x[1:], x.t(), y + 1, y


def returns_an_input_mutated(x: Any) -> Any:
    x.mul_(2)
    return x, x[0]


def writes_a_slice_of_an_input(x: Any, y: Any) -> Any:
    x[2:4, 1:3] = y
    x[:, 0] += 1
    return x.amax(1)


def writes_by_mask(x: Any) -> Any:
    x[x > 0] = 0.5
    x.masked_fill_(x < -1, -1)
    return x


def expands(x: Any) -> Any:
    return x.sum(0).expand(3, 5), x[:1].expand(4, 5), (x + 1)[:, :1].expand(-1, 4)


def transposes(x: Any) -> Any:
    return (x + 1).t(), x.t() * 2, x.t().contiguous(), (x.t() + 1).flatten()


def nests(x: Any) -> Any:
    return {"a": [x + 1, None, (x * 2, 3)], "b": (), "c": None, "d": "text", "e": True, "f": 2.5}


def same_twice(x: Any) -> Any:
    y = x * 3
    return y, y, y.view(-1), (y, [y])


def nothing(x: Any) -> None:
    return None


def splits(x: Any) -> Any:
    a, b, c = x.split([1, 2, 2], 1)
    return a, b + c, c


def pads_a_chunk(x: Any) -> Any:
    a, b = (x * 2).chunk(2, 1)
    return torch.cat([b, a], 1), a.shape[1]


def view_of_view(x: Any) -> Any:
    y = (x + 1).view(5, 4)[1:].t()[::2]
    y.mul_(2)
    return y, y.reshape(-1)


def writes_in_a_loop(x: Any) -> Any:
    for i in range(x.shape[0]):
        x[i] += i
    return x


def accumulates(x: Any, y: Any) -> Any:
    out = torch.empty_like(x)
    torch.add(x, y, out=out)
    out -= 1
    return out


FIXED: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (mutates_input, (odd(3, 4),)),
    (mutates_input, (odd(8, 6)[::2, 1::2],)),
    (mutates_input, (odd(0, 4),)),
    (mutates_input, (odd(4, 6).t(),)),
    (mutates_view_of_input, (odd(4, 5),)),
    (mutates_after_reading, (odd(3, 4), odd(3, 4, seed=1))),
    (swaps, (odd(3, 4), odd(3, 4, seed=1))),
    (writes_through_a_view_of_a_temporary, (odd(4, 4),)),
    (returns_views_of_each_other, (odd(3, 4),)),
    (returns_inputs, (odd(3, 4), odd(2))),
    (returns_an_input_mutated, (odd(3, 4),)),
    (writes_a_slice_of_an_input, (odd(5, 4), odd(2, 2))),
    (expands, (odd(4, 5),)),
    (transposes, (odd(4, 5),)),
    (transposes, (odd(4, 10)[:, ::2],)),
    (nests, (odd(3),)),
    (same_twice, (odd(3, 2),)),
    (nothing, (odd(3),)),
    (splits, (odd(3, 5),)),
    (pads_a_chunk, (odd(3, 6),)),
    (view_of_view, (odd(4, 5),)),
    (writes_in_a_loop, (odd(3, 2),)),
    (accumulates, (odd(3, 2), odd(3, 2))),
    (lambda x: x, (odd(3),)),
    (lambda x, y: (y, None, x), (odd(3), odd(2))),
    (lambda x: x.view(2, 3)[1], (odd(6),)),
    (lambda x: (x.detach(), x.clone(), x.alias() if hasattr(x, "alias") else x), (odd(3),)),
    (lambda x: (x[:], x.view(3, 1)[:, 0], x.expand(3), x, x.contiguous(), x.squeeze()), (odd(3),)),
    (returns_one_memory, (odd(3, 2),)),
    (lambda x: torch.ones(3, device=x.device), (odd(3),)),
    (lambda x: x.t()[1:].add(1), (odd(4, 5),)),
    (lambda x: x.view(torch.int32) & 255, (odd(3),)),
    (lambda x: (x.half(), x.bfloat16(), x.double(), x.bool()), (odd(5),)),
]


@pytest.mark.parametrize(("fn", "args"), FIXED)
def test_fixed_shapes(fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    through_dynamo(fn, args, itself="int32" in fn.__code__.co_names)


def test_a_result_that_is_a_view_of_an_input_is_another_tensor() -> None:
    x, weight = odd(3, 4), torch.nn.Parameter(odd(3, 4))
    compiled = torch.compile(lambda x, w: (x.view(3, -1), w.detach()), backend=Recording())
    with torch.no_grad():
        view, detached = compiled(x, weight)
    view.unsqueeze_(0)
    assert x.shape == (3, 4) and type(detached) is torch.Tensor and not detached.requires_grad


def top_one(x: Any) -> Any:
    scores = x / 1.7
    least = torch.topk(scores, 1, -1)[0]
    return torch.softmax(scores.masked_fill(scores < least, float("-inf")), -1)


def writes_before_it_sorts(x: Any) -> Any:
    x.div_(1.7)
    return (x >= torch.topk(x, 1, -1)[0]).sum(1), (x.gather(1, x.argsort(stable=True)) - x.sort(1)[0]).abs().amax()


def top_one_of_a_cast(x: Any) -> Any:
    scores = ((x - x.sum(-1, keepdim=True)) / 1.7).float()
    least = torch.topk(scores, 1)[0]
    return torch.softmax(scores.masked_fill(scores < least, float("-inf")), -1).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_an_op_that_runs_as_itself_saw_is_what_others_compare_with_its_results(dtype: torch.dtype) -> None:
    scores = torch.tensor([[3.0, 1.0], [5.0, 1.0], [7.0, 1.0], [10.0, 1.0]], dtype=dtype)
    through_dynamo(top_one, (scores,), itself=True)
    through_dynamo(writes_before_it_sorts, (scores,), itself=True)
    through_dynamo(top_one_of_a_cast, (odd(64, 40, dtype=dtype),), itself=True)


def test_writes_by_mask() -> None:
    through_dynamo(writes_by_mask, (odd(4, 5),), itself=True)


def two_views_of_one_storage() -> tuple[Any, ...]:
    base = odd(12)
    return base[:6], base[6:]


def test_inputs_that_share_storage() -> None:
    def fn(a: Any, b: Any) -> Any:
        a.add_(1)
        return a + b

    through_dynamo(fn, two_views_of_one_storage())


def test_an_input_given_twice() -> None:
    x = odd(3, 4)

    def fn(a: Any, b: Any) -> Any:
        a.mul_(2)
        return a + b

    through_dynamo(fn, (x, x))


def test_several_symbols() -> None:
    calls = [
        (odd(a, b), odd(b, c, seed=1))
        for a, b, c in [(3, 5, 7), (4, 16, 2), (1, 5, 7), (3, 1, 1), (0, 4, 3), (13, 11, 6)]
    ]
    through_dynamo(lambda x, y: (x @ y, (x * 2).sum(0), x.shape[0] * 2, x.reshape(-1)), *calls, dynamic=True)


def test_sizes_in_the_values() -> None:
    calls = [(odd(n, 6),) for n in (3, 8, 1, 0, 5)]
    through_dynamo(
        lambda x: (x / max(x.shape[0], 1), x.new_full((x.shape[0],), x.shape[0]), x.mean(1)), *calls, dynamic=True
    )
    through_dynamo(lambda x: torch.arange(x.shape[0], device=x.device) + x[:, 0], *calls, dynamic=True)


def test_padding_to_a_multiple() -> None:
    calls = [(odd(n, 2),) for n in (3, 8, 5)]
    through_dynamo(lambda x: torch.nn.functional.pad(x, (0, 0, 0, (-x.shape[0]) % 4)), *calls, dynamic=True)


def test_sizes_decide_the_branch() -> None:
    calls = [(odd(n, 4),) for n in (3, 40, 9)]
    through_dynamo(lambda x: x * 2 if x.shape[0] > 10 else x.sum(0), *calls, dynamic=True)


def numbers(*values: float) -> list[tuple[Any, ...]]:
    return [(odd(3, 4), v) for v in values]


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, eps: (x * eps, x + eps * 2, x - (eps + 1) / 4, eps - x),
        lambda x, s: torch.rsqrt(x.pow(2).mean(1, keepdim=True) + s) * x,
        lambda x, s: x * s**2 + s**-0.5,
        lambda x, s: x.clamp(-s, s),
        lambda x, s: torch.full_like(x, s),
        lambda x, s: torch.where(x > s, x, s),
    ],
)
def test_numbers_known_at_run_time(fn: Callable[..., Any]) -> None:
    # More values than floats are compiled for: the last calls read the number when they run.
    values = (0.5, 2.25, 1e-6, 0.75, 3.0, 0.125)
    assert len(values) > LIMIT + 1
    through_dynamo(fn, *numbers(*values), dynamic=True, itself=True)


def test_integers_known_at_run_time() -> None:
    through_dynamo(lambda x, n: x * n + n // 2, *[(odd(3, 4), v) for v in (3, 8, 11)], dynamic=True)
    through_dynamo(lambda x, n: x[:, n:] * 2, *[(odd(3, 9), v) for v in (3, 4, 7)], dynamic=True)


def test_numbers_returned() -> None:
    through_dynamo(lambda x, s: (x * s, s * 2 + 1), *numbers(0.25, 0.5, 0.75, 1.5, 2.0, 3.0), dynamic=True, itself=True)


def test_a_module_with_buffers() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 5)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.register_buffer("mean", torch.zeros(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            self.calls += 1
            self.mean.lerp_(y.mean(0), 0.25)
            return y - self.mean

    torch.manual_seed(1)
    ours, theirs = Counting().to(DEVICE), Counting().to(DEVICE)
    theirs.load_state_dict(ours.state_dict())
    compiled = torch.compile(ours, backend=terrazzo)
    for seed in range(3):
        x = odd(4, 6, seed=seed).to(DEVICE)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), theirs(x))
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    assert int(ours.calls) == 3


def test_two_runs_are_bitwise_equal() -> None:
    backend = Recording()
    fn = torch.compile(lambda x, w: torch.softmax(x @ w, 1).sum(0), backend=backend)
    x, w = odd(9, 40).to(DEVICE), odd(40, 21).to(DEVICE)
    with torch.no_grad():
        assert torch.equal(fn(x, w), fn(x, w))


@pytest.mark.parametrize(
    "fn", [lambda x: x.view(torch.int32), torch.view_as_complex, lambda x: (x.view(torch.int64)[1:], x + 1)]
)
def test_memory_of_an_input_returned_as_another_dtype(fn: Callable[..., Any]) -> None:
    through_dynamo(fn, (odd(12)[2:].view(5, 2),), itself=True)


def test_views_that_conjugate_are_no_geometry() -> None:
    x = torch.complex(odd(3, 4), odd(3, 4, seed=1))
    through_dynamo(lambda x: (x.conj() * 2, x.conj().imag * 1, (x * 2).t().conj()), (x,), itself=True)


def test_ranges_of_integers_from_floats_drop_fractions_first() -> None:
    through_dynamo(lambda x: torch.arange(0.1, -7.9, -4.0, dtype=torch.int64, device=x.device) + x[:2], (odd(2),))


def test_places_counted_from_the_start_of_the_storage() -> None:
    fn = lambda x: (torch.as_strided(x, (2, 2), (1, 2), 1) * 2, x + 1)  # noqa: E731
    through_dynamo(fn, (odd(8),), (odd(12)[4:],), (odd(10)[2:],))
    through_dynamo(lambda x: torch.as_strided(x, (2, 2), (1, 2), 1), (odd(8),), (odd(12)[4:],), (odd(10)[2:],))
    through_dynamo(lambda x: torch.as_strided(x, (2, 2), (1, 2)) * 2, (odd(8),), (odd(12)[4:],))
