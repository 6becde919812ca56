"""The opaque ops of the models: `terrazzo_models::attention` (where a model is cut) and `terrazzo_models::experts`.

Both are simple torch on purpose: they stand for what a serving engine brings itself, and terrazzo never compiles them.
Neither reads a device value on the host, so both can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ATTENTION = "terrazzo_models.attention"
EXPERTS = "terrazzo_models.experts"

_LIBRARY = torch.library.Library("terrazzo_models", "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, int layer_index, *, "
    "float? scale=None, float soft_cap=0.0) -> ()"
)
_LIBRARY.define("experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor gate_up, Tensor down) -> Tensor")


def _attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, layer_index: int, *, scale: float | None = None, soft_cap: float = 0.0
) -> None:
    """Causal attention of all tokens as one sequence, written into `out`.

    Args:
        q, out: [tokens, heads, head_dim]; `out` is overwritten.
        k, v: [tokens, kv_heads, head_dim], any row stride; kv_heads divides heads.
        layer_index: which layer calls; a cache would need it, this one has none.
        scale: factor on the scores, head_dim ** -0.5 by default.
        soft_cap: if not 0, scores become soft_cap * tanh(scores / soft_cap).
    """
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    if not soft_cap:
        out.copy_(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1))
        return
    scores = (q.float() @ k.float().transpose(1, 2)) * (scale if scale is not None else q.shape[-1] ** -0.5)
    scores = soft_cap * torch.tanh(scores / soft_cap)
    future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    out.copy_((weights @ v.float()).transpose(0, 1))


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, layer_index: int, *, scale: float | None = None, soft_cap: float = 0.0
) -> None:
    return None


def _experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sum over each token's experts of weight * down(silu(gate(x)) * up(x)), every expert run on every token.

    Args:
        x: [tokens, hidden]. topk_weights: [tokens, k] float32. topk_ids: [tokens, k] int32.
        gate_up: [experts, 2 * intermediate, hidden], gate rows first. down: [experts, hidden, intermediate].

    Returns:
        [tokens, hidden] in x's dtype, summed in fp32 in the order of the experts.
    """
    experts, width = gate_up.shape[0], gate_up.shape[1] // 2
    share = torch.zeros(x.shape[0], experts, dtype=torch.float32, device=x.device)
    share = share.scatter(1, topk_ids.long(), topk_weights.float())
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in range(experts):
        h = F.linear(x, gate_up[e])
        total += share[:, e, None] * F.linear(F.silu(h[:, :width]) * h[:, width:], down[e])
    return total.to(x.dtype)


def _experts_fake(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(x)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("attention", _attention, _device)
    _LIBRARY.impl("experts", _experts, _device)
torch.library.register_fake(ATTENTION.replace(".", "::"), _attention_fake, lib=_LIBRARY)
torch.library.register_fake(EXPERTS.replace(".", "::"), _experts_fake, lib=_LIBRARY)
