"""Which ATen ops are taken apart while tracing, and by whose rule.

The core ATen decompositions of torch, less the ops that `define` lowers as they are: a SiLU stays one function in a
body, and a softmax is written by us in the order that suits one row in registers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, get_decompositions

aten = torch.ops.aten

# Lowered as they are, although torch would take them apart.
KEPT = (
    aten.silu,
    aten.addmm,
    aten.mm,
    aten.bmm,
    aten.baddbmm,
    aten.index_select,
    aten.embedding,
    aten.slice_scatter,
    aten.select_scatter,
    aten.sum,
    aten.std,
    aten.mean,
    aten.var,
    aten.var_mean,
    aten.split_with_sizes,
    aten.unbind,
    aten.stack,
    aten.triu,
    aten.tril,
    aten.sgn,
)

# Not core, but better as parts than as an op of its own.
TAKEN_APART = (
    aten._softmax,
    aten._log_softmax,
    aten.native_layer_norm,
    aten.addcmul,
    aten.addcdiv,
    aten.lerp,
    aten.t,
    aten.transpose,
    aten.rsub,
    aten.baddbmm,
    aten.logsumexp,
    aten.native_group_norm,
    aten.split,
    aten.hardswish,
    aten.hardsigmoid,
    aten.elu,
    aten.celu,
    aten.selu,
    aten.leaky_relu,
    aten.threshold,
    aten.hardtanh,
    aten.squeeze,
    aten.linalg_vector_norm,
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten._native_batch_norm_legit_functional,
    aten._batch_norm_with_update_functional,
    aten._batch_norm_no_update,
    aten.upsample_nearest2d,
    aten.upsample_bilinear2d,
    aten.upsample_trilinear3d,
    aten.upsample_bicubic2d,
    aten.grid_sampler_2d,
    aten.max_pool2d_with_indices_backward,
    aten.ldexp,
    aten.addmv,
    aten.dist,
    aten.round.decimals,
    aten.as_strided_copy,
    aten.narrow_copy,
    aten.permute_copy,
    aten.unbind_copy,
    aten.view_copy,
)


@functools.cache
def table() -> Mapping[Any, Callable[..., Any]]:
    """The decomposition table for tracing."""
    kept = {overload for packet in KEPT for overload in _overloads(packet)}
    rules = {op: rule for op, rule in core_aten_decompositions().items() if op not in kept}
    rules.update(get_decompositions(list(TAKEN_APART)))
    rules[aten.linalg_vector_norm.default] = _vector_norm(rules[aten.linalg_vector_norm.default])
    rules[aten.linspace.default] = _linspace(rules[aten.linspace.default])
    # Taken apart, what draws random numbers would draw others than eager does from the same seed.
    return {op: rule for op, rule in rules.items() if torch.Tag.nondeterministic_seeded not in op.tags}


def _vector_norm(rule: Callable[..., Any]) -> Callable[..., Any]:
    """torch's rule with dimensions counted from the front: that of torch 2.11 keeps one of size 1 counted from the
    back."""

    def norm(x: Any, ord: Any = 2, dim: Any = None, *rest: Any, **kwargs: Any) -> Any:
        dims = dim if dim is None else [d % max(x.dim(), 1) for d in ([dim] if isinstance(dim, int) else dim)]
        return rule(x, ord, dims, *rest, **kwargs)

    return norm


def _linspace(rule: Callable[..., Any]) -> Callable[..., Any]:
    """torch's rule, but for whole numbers what its kernels do: they cut both ends first (ATen's RangeFactories)."""

    def linspace(start: Any, end: Any, steps: int, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
        if dtype is None or dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or steps < 2:
            return rule(start, end, steps, dtype=dtype, device=device, **kwargs)
        start, end = int(start), int(end)
        wide = torch.float64 if torch.device(device or "cpu").type == "cpu" else torch.float32
        at, step = torch.arange(steps, dtype=wide, device=device), (end - start) / (steps - 1)
        return torch.where(at < steps // 2, start + step * at, end - step * (steps - 1 - at)).to(dtype)

    return linspace


def _overloads(packet: Any) -> list[Any]:
    return [getattr(packet, name) for name in packet.overloads()]
