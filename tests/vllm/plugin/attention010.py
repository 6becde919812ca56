"""An attention backend for vLLM 0.10.0 without a cache: causal attention over the tokens of the call."""

from __future__ import annotations

from typing import Any

import torch
from vllm.attention.backends.abstract import AttentionBackend, AttentionImpl


class CausalImpl(AttentionImpl):
    """Treats the tokens given as one sequence from its start."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, *others: Any) -> None:
        self.heads, self.head_size, self.scale, self.kv_heads = num_heads, head_size, scale, num_kv_heads

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output=None, output_scale=None):
        """Write the attention of `query` [T, H, D] over `key` and `value` [T, KV, D] into `output` [T, H, D]."""
        scores = torch.einsum("qhd,khd->hqk", query, self.for_each_head(key)) * self.scale
        tokens = scores.shape[-1]
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return output.copy_(torch.einsum("hqk,khd->qhd", weights, self.for_each_head(value)))

    def for_each_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(self.heads // self.kv_heads, dim=1)


class CausalBackend(AttentionBackend):
    """What vLLM's attention layer asks for; there is no cache, so nothing else is ever called."""

    accept_output_buffer = True
    get_impl_cls = staticmethod(lambda: CausalImpl)
    get_name = staticmethod(lambda: "TORCH_SDPA")
    get_metadata_cls = get_state_cls = get_builder_cls = staticmethod(lambda: None)
    get_kv_cache_shape = staticmethod(lambda *sizes: (0,))
    swap_blocks = copy_blocks = staticmethod(lambda *blocks: None)
