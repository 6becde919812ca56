"""Readers of one value that are no neighbours: fused for the bytes or the launch they share, or segments of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from terrazzo.lowering.fuse import LONGEST_ROW

from .equal import odd, same


def residual_and_norm(x: Any, residual: Any, weight: Any) -> Any:
    """Of what no product of ours computes: an all-reduce, experts, a quantised product."""
    wide = x.float() + residual.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight, wide.to(x.dtype)


@pytest.mark.parametrize("tokens", [2, 16, 128])
def test_a_residual_is_stored_by_the_norm_that_reads_the_same(tokens: int) -> None:
    args = [odd(tokens, 256, seed=seed, dtype=torch.bfloat16) for seed in (0, 1)]
    [loaded] = same(residual_and_norm, *args, odd(256, seed=2, dtype=torch.bfloat16)).plans.values()
    assert len(loaded.plan.schedule.launches()) == 1


def test_maps_of_the_same_shape_stay_segments() -> None:
    """Readers of one value that could share a launch as they are."""
    [loaded] = same(lambda x: (x.sin(), x.cos()), odd(16, 64)).plans.values()
    [launch] = loaded.plan.schedule.launches()
    assert len(launch.segments) == 2


LAUNCHES: dict[str, tuple[Any, tuple[torch.Tensor, ...], int]] = {
    "columns are no rows of memory": (lambda x: (x.sum(0), x * 2), (odd(64, 32),), 2),
    "a long row": (lambda x: (torch.softmax(x, -1), torch.tanh(x)), (odd(2, LONGEST_ROW + 1),), 2),
    "one number of all": (lambda x: (x.amax(), torch.tanh(x)), (odd(40, 512),), 2),
    "a weight that both read": (lambda a, b, w: ((a * w).sum(-1), b.tanh() * w), (odd(9, 64), odd(5, 64), odd(64)), 2),
    "several maps": (lambda x: (x.sum(-1), x.sin(), x.cos() * 2), (odd(9, 64),), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_what_is_stored_by_a_reduction_beside_it(name: str) -> None:
    fn, args, launches = LAUNCHES[name]
    [loaded] = same(fn, *args).plans.values()
    assert len(loaded.plan.schedule.launches()) == launches


def around(x: Any, w: Any) -> Any:
    """What is early and what is late read the same, and something between them feeds the late one."""
    early = torch.softmax(x, -1)
    scaled = w * 2
    after = (early * w).sum(0)
    between = torch.sort(scaled, -1)[0]
    return early, after, x + between


@pytest.mark.parametrize("shape", [(16, 256), (64, 512), (1024, 1024)])
def test_no_fusion_closes_a_cycle_around_what_lies_between(shape: tuple[int, int]) -> None:
    same(around, odd(*shape), odd(*shape, seed=1), itself=True)


def test_many_readers_of_one_value() -> None:
    def norms(x: Any) -> Any:
        return [x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + i) for i in range(1, 13)] + [x + i for i in range(12)]

    [loaded] = same(norms, odd(16, 256)).plans.values()
    assert len(loaded.plan.schedule.launches()) > 1
