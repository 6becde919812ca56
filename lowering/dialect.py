"""Calls of other projects that a piece may hold, and what they mean in torch's own ops.

Found by name, so that none of those projects need be installed. A call becomes its meaning before the piece is traced:

    vllm_ir::<op>                       one of the definitions below, or, where there is none, the op itself
    vllm_ir::<op>.maybe_inplace         the same: its inputs are given away and not used after it
    torch._C._autograd._get_data_attr   `parameter.data`: the parameter's memory, without its history
    prims::fma                          a product and a sum, which torch 2.13's Dynamo makes of `addcdiv_` and the like

Norms are in fp32 and rounded once, at the end. The native implementations round once more, to the weight's dtype before
the product with it. With that rounding the log-probabilities of Llama-3.1-8B cut to 4 layers were 1.45 times as far
from vLLM's without compilation as Inductor's are (H100, bf16, 2026-11-25); that neither vLLM's kernels nor Inductor
round there is inferred from such distances, not read in their code.
Source: vLLM 0.22.1, `vllm/ir/ops/layernorm.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def meaning(target: Any) -> Callable[..., Any] | None:
    """What to call instead of a graph's `call_function` target; None for the target itself."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _by_name(target)
    if getattr(target, "__name__", "") == "_get_data_attr" and target.__module__ == "torch._C._autograd":
        return Tensor.detach
    return None


def _by_name(target: Any) -> Callable[..., Any] | None:
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    space, _, name = packet._qualified_op_name.partition("::")
    if (space, name) == ("prims", "fma"):
        return _fma
    if space != "vllm_ir":
        return None
    if name in _DEFINITIONS:
        return _DEFINITIONS[name]
    return packet.default if getattr(target, "_overloadname", "default") == "maybe_inplace" else None


def _fma(a: Tensor, b: Any, c: Tensor) -> Tensor:
    return a * b + c


def _normed(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None) -> Tensor:
    """Root-mean-square norm of fp32 rows; the variance is that of their first `variance_size` elements."""
    part = x if variance_size is None else x[..., :variance_size]
    x = x * torch.rsqrt(part.pow(2).mean(dim=-1, keepdim=True) + epsilon)
    return x if weight is None else x * weight.to(torch.float32)


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    return _normed(x.to(torch.float32), weight, epsilon, variance_size).to(x.dtype)


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    total = x.to(torch.float32) + x_residual.to(torch.float32)
    return _normed(total, weight, epsilon, variance_size).to(x.dtype), total.to(x.dtype)


_DEFINITIONS: dict[str, Callable[..., Any]] = {"rms_norm": _rms_norm, "fused_add_rms_norm": _fused_add_rms_norm}
