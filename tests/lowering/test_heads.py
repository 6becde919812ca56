"""Rotations that join the product before them: halves of heads brought together, and what is not such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st

from .equal import odd, same

TOKENS, HEAD, HALF, K = 5, 32, 16, 48
Q, KV = 4, 2
WIDTH = (Q + 2 * KV) * HEAD


def turned(x: Any, cos: Any, sin: Any) -> Any:
    """The rotation of vLLM: cos and sin of half a head."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rotate_half(x: Any, cos: Any, sin: Any) -> Any:
    """The rotation of transformers: cos and sin of a whole head."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def twice(table: Any) -> Any:
    return torch.cat((table, table), -1)


def heads(x: Any, count: int) -> Any:
    return x.view(TOKENS, count, HEAD)


def split(qkv: Any) -> Any:
    return qkv.split([Q * HEAD, KV * HEAD, KV * HEAD], -1)


def qkv_rotated(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = split(x @ w.t())
    return turned(heads(q, Q), cos, sin), turned(heads(k, KV), cos, sin), heads(v, KV)


def looked_up(x: Any, w: Any, cache: Any, positions: Any) -> Any:
    cos, sin = cache.index_select(0, positions).unsqueeze(1).chunk(2, -1)
    return qkv_rotated(x, w, cos, sin)


def whole_heads_tables(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = split(x @ w.t())
    cos, sin = twice(cos), twice(sin)
    return rotate_half(heads(q, Q), cos, sin), rotate_half(heads(k, KV), cos, sin), heads(v, KV)


def product_returned_too(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    qkv = x @ w.t()
    q, k, _ = split(qkv)
    return turned(heads(q, Q), cos, sin), turned(heads(k, KV), cos, sin), qkv


def product_read_elsewhere(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    qkv = x @ w.t()
    q, _, v = split(qkv)
    return turned(heads(q, Q), cos, sin), heads(v, KV), qkv.sum(-1)


def q_alone(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, _ = split(x @ w.t())
    return turned(heads(q, Q), cos, sin), k.relu()


def v_changed_in_place(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = split(x @ w.t())
    v.mul_(2)
    return turned(heads(q, Q), cos, sin), turned(heads(k, KV), cos, sin), v


def with_bias_and_scale(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    qkv = torch.nn.functional.linear(x, w, x.new_ones(WIDTH))
    q, k, v = split(qkv)
    return turned(heads(q, Q), cos, sin) * 0.125, turned(heads(k, KV), cos, sin), v


def half_a_head_off(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    qkv = x @ w.t()
    q = qkv[:, HALF : HALF + Q * HEAD]
    return turned(q.reshape(TOKENS, Q, HEAD), cos, sin), qkv[:, -HEAD:]


def neighbours_turned(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    """The other rotation: each column with the one beside it."""
    q = (x @ w.t()).view(TOKENS, -1, HALF, 2)
    a, b = q[..., 0], q[..., 1]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def part_of_a_head(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q = heads((x @ w.t())[:, : Q * HEAD], Q)
    cos, sin = cos[..., : HALF // 2], sin[..., : HALF // 2]
    return torch.cat((turned(q[..., :HALF], cos, sin), q[..., HALF:]), -1)


def halves_kept(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    """The halves of two heads, each kept by itself: side by side they are as wide as a head, and are none."""
    q = torch.nn.functional.linear(x, w, x.new_ones(WIDTH))[:, HEAD : 3 * HEAD].view(TOKENS, 2, HEAD)
    a, b = q.chunk(2, -1)
    return a * cos - b * sin, b * cos + a * sin, turned(q, cos, sin)


def arguments(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [odd(TOKENS, K), odd(WIDTH, K, seed=1), odd(TOKENS, 1, HALF, seed=2), odd(TOKENS, 1, HALF, seed=3)]


def one_number_and_some_rows(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    qkv = x @ w.t()
    q, k, v = split(qkv)
    return turned(heads(q, Q), cos, sin), turned(heads(k, KV), cos, sin), qkv[1, 2], v[1:3]


def normed(x: Any, weight: Any, eps: float = 1e-6) -> Any:
    """A norm of each head as vLLM's native one computes it."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def normed_and_rotated(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    """As Qwen3 does: q and k by weights of their own."""
    q, k, v = split(x @ w.t())
    q, k = normed(heads(q, Q), w[0, :HEAD]), normed(heads(k, KV), w[1, :HEAD])
    return turned(q, cos, sin), turned(k, cos, sin), v


def normed_with_other_epsilons(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = split(x @ w.t())
    q, k = normed(heads(q, Q), w[0, :HEAD], 1e-2), torch.nn.functional.rms_norm(heads(k, KV), (HEAD,), eps=1e-6)
    return turned(q, cos, sin), turned(k, cos, sin), v


def k_normed_alone(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = split(x @ w.t())
    return turned(heads(q, Q), cos, sin), turned(normed(heads(k, KV), w[1, :HEAD]), cos, sin), v


def normed_by_three_weights(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = split(x @ w.t())
    parts = (heads(q, Q), heads(k, KV), heads(v, KV))
    return tuple(turned(normed(part, w[i, :HEAD]), cos, sin) for i, part in enumerate(parts))


def shared_heads_normed_by_two_weights(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    """Two values read the same heads, and others beside them."""
    qkv = x @ w.t()
    first, second = heads(qkv[:, : 4 * HEAD], 4), heads(qkv[:, 2 * HEAD : 6 * HEAD], 4)
    return turned(normed(first, w[0, :HEAD]), cos, sin), turned(normed(second, w[1, :HEAD]), cos, sin)


def normed_by_weights_of_each_head(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    """As Chameleon does: weights that differ from head to head."""
    q, k, v = split(x @ w.t())
    q, k = normed(heads(q, Q), w[:Q, :HEAD]), normed(heads(k, KV), w[:KV, :HEAD])
    return turned(q, cos, sin), turned(k, cos, sin), v


def normed_after_a_norm(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    """The product's own scale is a sum over rows."""
    return normed_and_rotated(normed((x @ w[:K].t()[:, :K]), w[0]), w, cos, sin)


def normed_after_it_is_rotated(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = split(x @ w.t())
    return normed(turned(heads(q, Q), cos, sin), w[0, :HEAD]), turned(heads(k, KV), cos, sin), v


def normed_by_all_heads(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    """As OLMo-2 does."""
    q, k, v = split(x @ w.t())
    return turned(heads(normed(q, w.new_ones(Q * HEAD)), Q), cos, sin), turned(heads(k, KV), cos, sin), v


def centred(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    """A layer norm of each head: the second sum is over what the first is subtracted from."""
    q, k, v = split(x @ w.t())
    return turned(torch.nn.functional.layer_norm(heads(q, Q), (HEAD,)), cos, sin), turned(heads(k, KV), cos, sin), v


def weighted_before_the_sum(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = split(x @ w.t())
    return turned(normed(heads(q, Q) * w[0, :HEAD], w[1, :HEAD]), cos, sin), turned(heads(k, KV), cos, sin), v


def scaled_by_another_heads_norm(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = split(x @ w.t())
    q = heads(q, Q)
    other = torch.rsqrt(q.float().pow(2).mean(-1, keepdim=True) + 1e-6).roll(1, 1)
    return turned((q * other).to(x.dtype), cos, sin), turned(heads(k, KV), cos, sin), v


def largest_of_each_head(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = split(x @ w.t())
    q = heads(q, Q)
    return turned(q - q.amax(-1, keepdim=True), cos, sin), turned(heads(k, KV), cos, sin), v


ONE = [qkv_rotated, whole_heads_tables, product_returned_too, with_bias_and_scale, q_alone, one_number_and_some_rows]
ONE += [normed_and_rotated, normed_with_other_epsilons, k_normed_alone, normed_by_three_weights]
ONE += [normed_by_weights_of_each_head, shared_heads_normed_by_two_weights]
MORE = [halves_kept, product_read_elsewhere, v_changed_in_place, half_a_head_off, neighbours_turned, part_of_a_head]
MORE += [normed_after_a_norm, normed_after_it_is_rotated, normed_by_all_heads, centred, weighted_before_the_sum]
MORE += [scaled_by_another_heads_norm, largest_of_each_head]


@pytest.mark.parametrize("fn", [*ONE, *MORE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_of_a_product(fn: Callable[..., Any], dtype: torch.dtype) -> None:
    piece = same(fn, *(a.to(dtype) for a in arguments()))
    [loaded] = piece.plans.values()
    kernels = [k for k in loaded.plan.schedule.launches() if k.family]
    if fn in ONE:
        [kernel] = kernels
        assert kernel.group.half == HALF and kernel.problem.halves == HALF
    if fn is product_read_elsewhere:
        assert kernels[0].group.half == HALF and len(kernels) > 1
    if fn in (half_a_head_off, neighbours_turned):
        assert not any(k.group.half for k in kernels)


def test_q_and_k_share_what_only_their_weights_tell_apart() -> None:
    [loaded] = same(normed_and_rotated, *arguments()).plans.values()
    assert loaded.plan.source.count("tl.where(") == 2, "one choice of weights for each half"
    assert loaded.plan.source.count("tl.rsqrt(") == loaded.plan.source.count("sum_of_heads(") == 1
    [loaded] = same(shared_heads_normed_by_two_weights, *arguments()).plans.values()
    assert "tl.where(" not in loaded.plan.source


@pytest.mark.parametrize("column", [2, HEAD, Q * HEAD - 1, Q * HEAD])
@pytest.mark.parametrize("size", [1e20, float("inf"), float("nan")])
def test_a_head_whose_squares_overflow_stays_alone(size: float, column: int) -> None:
    x, w, cos, sin = (a.to(torch.bfloat16) for a in arguments())
    w[column] *= size
    same(normed_and_rotated, x, w, cos, sin)


def one_key_head_first(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    qkv = x @ w.t()
    k, q = heads(qkv[:, :HEAD], 1), heads(qkv[:, HEAD : 4 * HEAD], 3)
    return turned(normed(k, w[0, :HEAD]), cos, sin), turned(normed(q, w[1, :HEAD]), cos, sin)


def test_one_head_beside_several_is_normed_with_them() -> None:
    [loaded] = same(one_key_head_first, *arguments()).plans.values()
    [kernel] = loaded.plan.schedule.launches()
    assert kernel.group.half == HALF


def test_looked_up_by_position() -> None:
    x, w, cos, sin = arguments()
    cache = torch.cat([cos, sin], -1).squeeze(1)
    piece = same(looked_up, x, w, cache, torch.tensor([3, 0, 4, 4, 1]))
    [loaded] = piece.plans.values()
    [kernel] = loaded.plan.schedule.launches()
    assert kernel.group.half == HALF
    # q and k are turned by the same angles, which are read once.
    assert len([load for load in kernel.group.loads if load.dtype == torch.float32]) == 2


def test_only_the_columns_that_the_caller_sees_of_a_product_are_stored() -> None:
    for fn, columns in ((qkv_rotated, KV * HEAD), (product_returned_too, WIDTH)):
        [loaded] = same(fn, *arguments()).plans.values()
        [kernel] = loaded.plan.schedule.launches()
        lows, highs = zip(
            *(s.offset.range for s in kernel.group.stores if s.value == kernel.group.contract.name), strict=True
        )
        assert max(highs) - min(lows) == (TOKENS - 1) * WIDTH + columns - 1


def one_number_too(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    qkv = x @ w.t()
    return turned(heads(split(qkv)[0], Q), cos, sin), qkv[0, 5], qkv[-1]


def a_wider_value_too(x: Any, w: Any, cos: Any, sin: Any, scales: Any) -> Any:
    """What the rotation reads and the caller gets as well, four times as wide as the product."""
    q, wide = x @ w.t(), scales.sin() * 2
    return turned(q.view(TOKENS, -1, HEAD), cos, sin) * wide[:, WIDTH : 2 * WIDTH].view(TOKENS, -1, HEAD), wide


def written_to_the_callers(x: Any, w: Any, cos: Any, sin: Any, memory: Any) -> Any:
    """All of the product stays in an argument, of which the product is a view; of itself the caller gets a part."""
    qkv = torch.mm(x, w.t(), out=memory.view(TOKENS, WIDTH))
    q, _, v = split(qkv)
    return turned(heads(q, Q), cos, sin), v


@pytest.mark.parametrize(
    ("fn", "more"),
    [(one_number_too, ()), (a_wider_value_too, (TOKENS, 4 * WIDTH)), (written_to_the_callers, (TOKENS * WIDTH,))],
)
def test_more_than_the_columns_that_are_rotated_is_seen(fn: Callable[..., Any], more: tuple[int, ...]) -> None:
    piece = same(fn, *arguments(), *([odd(*more, seed=5)] if more else []))
    [loaded] = piece.plans.values()
    assert any(k.group.half == HALF for k in loaded.plan.schedule.launches())


TREATMENTS = {
    "turned": "turned(heads({part}, {count}), cos, sin)",
    "turned as transformers does": "rotate_half(heads({part}, {count}), twice(cos), twice(sin))",
    "turned twice": "turned(turned(heads({part}, {count}), cos, sin), sin, cos)",
    "scaled by its token": "heads({part}, {count}) * cos.sum((1, 2), keepdim=True)",
    "an activation": "F.silu({part})",
    "another dtype": "heads({part}, {count}).to(torch.float16)",
    "a view": "heads({part}, {count})",
    "a part of a view": "{part}[:, 3:7]",
    "a norm of each head": "F.rms_norm(heads({part}, {count}), (HEAD,))",
    "a norm of each head, turned": "turned(F.rms_norm(heads({part}, {count}), (HEAD,), b[:HEAD], 1e-5), cos, sin)",
    "normed by other weights, turned": "turned(normed(heads({part}, {count}), w[1, :HEAD]), cos, sin)",
    "another norm, turned": "turned(normed(heads({part}, {count}), 1.5), cos, sin)",
    "the other half of each head": "heads({part}, {count}).roll(HALF, -1)",
    "nothing": "",
}  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.tuples(st.sampled_from(list(TREATMENTS)), st.integers(1, 3)), min_size=1, max_size=5),
    shift=st.sampled_from([0, 0, 0, HEAD, HALF, 5]),
    spare=st.sampled_from([0, 0, HEAD, HALF]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
)
def test_whatever_becomes_of_the_heads_of_a_product(
    parts: list[tuple[str, int]], shift: int, spare: int, dtype: torch.dtype, bias: bool
) -> None:
    """Columns of one product, in order, each run of heads with a fate of its own."""
    results, start = [], shift
    for treatment, count in parts:
        part = f"qkv[:, {start}:{start + count * HEAD}]"
        results.append(TREATMENTS[treatment].format(part=part, count=count))
        start += count * HEAD
    returned = [r for r in results if r]
    assume(returned)
    product = "F.linear(x, w, b)" if bias else "x @ w.t()"
    code = f"def fn(x, w, b, cos, sin):\n    qkv = {product}\n    return {', '.join(returned)},"
    note(code)
    scope = {**globals(), "F": torch.nn.functional}
    exec(code, scope)
    width = start + spare
    args = [odd(TOKENS, K), odd(width, K, seed=1), odd(width, seed=4), *arguments()[2:]]
    same(scope["fn"], *(a.to(dtype) for a in args))
