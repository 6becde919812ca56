"""Readers of one value that are no neighbours: fused for the bytes or the launch they share, or segments of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
