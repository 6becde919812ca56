"""Llama (also Qwen3), Mixtral, Gemma 2 and GPT-2 as plain modules: `forward(input_ids, positions) -> hidden states`.

Only the body of the model stands here, as it is the body that a serving engine compiles: no head, no sampling.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from terrazzo.lowering.errors import UserError
from terrazzo.tools.models.config import ModelConfig
from terrazzo.tools.models.fill import Fill, draw, matrix
from terrazzo.tools.models.layers import (
    FP8,
    Attention,
    Embedding,
    Filled,
    GemmaRMSNorm,
    LayerNorm,
    Linear,
    QuantisedLinear,
    RMSNorm,
    Rotary,
    gelu_new,
    gelu_tanh_and_mul,
    silu_and_mul,
)


class SelfAttention(nn.Module):
    """qkv, optional q/k norm, RoPE, attention, o."""

    def __init__(self, c: ModelConfig, layer_index: int, rotary: Rotary) -> None:
        super().__init__()
        self.c, self.rotary = c, rotary
        self.qkv_proj = Linear(c.hidden, c.q_size + 2 * c.kv_size)
        self.o_proj = Linear(c.q_size, c.hidden)
        self.attention = Attention(c, layer_index)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.norm_eps), RMSNorm(c.head_dim, c.norm_eps)

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        c = self.c
        q, k, v = self.qkv_proj(hidden).split([c.q_size, c.kv_size, c.kv_size], dim=-1)
        if c.qk_norm:
            q = self.q_norm(q.view(*q.shape[:-1], c.heads, c.head_dim)).view(q.shape)
            k = self.k_norm(k.view(*k.shape[:-1], c.kv_heads, c.head_dim)).view(k.shape)
        q, k = self.rotary(positions, q, k)
        return self.o_proj(self.attention(q, k, v))


class GatedMLP(nn.Module):
    """down(act(gate) * up), gate and up in one weight."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(c.hidden, 2 * c.intermediate)
        self.down_proj = Linear(c.intermediate, c.hidden)
        self.activation = gelu_tanh_and_mul if c.family == "gemma2" else silu_and_mul

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_up_proj(hidden)))


class MixtureMLP(Filled):
    """A router in plain ops and opaque experts."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.per_token = c.experts_per_token
        self.gate = Linear(c.hidden, c.experts)
        self.own("w13", (c.experts, 2 * c.intermediate, c.hidden), matrix(c.hidden))
        self.own("w2", (c.experts, c.hidden, c.intermediate), matrix(c.intermediate))

    def forward(self, hidden: Tensor) -> Tensor:
        scores = torch.softmax(self.gate(hidden).float(), dim=-1)
        weights, ids = torch.topk(scores, self.per_token, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return torch.ops.terrazzo_models.experts(hidden, weights, ids.to(torch.int32), self.w13, self.w2)


class LlamaLayer(nn.Module):
    """Pre-norm attention and MLP; the residual travels beside the hidden states."""

    def __init__(self, c: ModelConfig, layer_index: int, rotary: Rotary) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden, c.norm_eps)
        self.self_attn = SelfAttention(c, layer_index, rotary)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.norm_eps)
        self.mlp = MixtureMLP(c) if c.experts else GatedMLP(c)

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions, hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class GemmaLayer(nn.Module):
    """As Llama's, with a norm after attention and MLP as well as before."""

    def __init__(self, c: ModelConfig, layer_index: int, rotary: Rotary) -> None:
        super().__init__()
        self.input_layernorm = GemmaRMSNorm(c.hidden, c.norm_eps)
        self.self_attn = SelfAttention(c, layer_index, rotary)
        self.post_attention_layernorm = GemmaRMSNorm(c.hidden, c.norm_eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(c.hidden, c.norm_eps)
        self.mlp = GatedMLP(c)
        self.post_feedforward_layernorm = GemmaRMSNorm(c.hidden, c.norm_eps)

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.post_attention_layernorm(self.self_attn(positions, hidden))
        hidden, residual = self.pre_feedforward_layernorm(hidden, residual)
        return self.post_feedforward_layernorm(self.mlp(hidden)), residual


class RotaryModel(Filled):
    """Llama, Qwen3, Mixtral, Gemma 2: embedding, layers, final norm."""

    def __init__(self, c: ModelConfig, layers: int) -> None:
        super().__init__()
        gemma = c.family == "gemma2"
        self.embed_tokens = Embedding(c.vocab, c.hidden, std=c.hidden**-0.5 if gemma else 1.0)
        if gemma:
            self.register_buffer("normalizer", torch.empty((), dtype=torch.float32))
            self.fills["normalizer"] = Fill("constant", (c.hidden**0.5,))
        else:
            self.normalizer = None
        rotary = Rotary(c)
        layer, norm = (GemmaLayer, GemmaRMSNorm) if gemma else (LlamaLayer, RMSNorm)
        self.layers = nn.ModuleList(layer(c, i, rotary) for i in range(layers))
        self.norm = norm(c.hidden, c.norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        if self.normalizer is not None:
            hidden = hidden * self.normalizer
        residual = None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        hidden, _ = self.norm(hidden, residual)
        return hidden


class GPT2Layer(nn.Module):
    """LayerNorm, biases everywhere, GELU; the residual is added where it is needed."""

    def __init__(self, c: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(c.hidden, c.norm_eps), LayerNorm(c.hidden, c.norm_eps)
        self.c_attn = Linear(c.hidden, 3 * c.hidden, bias=True)
        self.attention = Attention(c, layer_index)
        self.c_proj = Linear(c.hidden, c.hidden, bias=True)
        self.c_fc = Linear(c.hidden, c.intermediate, bias=True)
        self.mlp_proj = Linear(c.intermediate, c.hidden, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = self.c_attn(self.ln_1(hidden)).chunk(3, dim=-1)
        hidden = self.c_proj(self.attention(q, k, v)) + hidden
        return hidden + self.mlp_proj(gelu_new(self.c_fc(self.ln_2(hidden))))


class GPT2Model(nn.Module):
    """GPT-2: token and position embeddings, layers, final LayerNorm."""

    def __init__(self, c: ModelConfig, layers: int) -> None:
        super().__init__()
        self.wte = Embedding(c.vocab, c.hidden)
        self.wpe = Embedding(c.max_positions, c.hidden, std=0.1)
        self.h = nn.ModuleList(GPT2Layer(c, i) for i in range(layers))
        self.ln_f = LayerNorm(c.hidden, c.norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self.wte(input_ids) + self.wpe(positions)
        for layer in self.h:
            hidden = layer(hidden)
        return self.ln_f(hidden)


def skeleton(c: ModelConfig, layers: int, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The model with uninitialised tensors: on 'meta' it costs no memory. Of eight bits are the layers' weights alone.

    Raises:
        UserError: GPT-2 in eight bits, whose layers have biases.
    """
    if dtype == FP8 and c.family == "gpt2":
        raise UserError(f"{c.name} in fp8", "its layers are not quantised here", stage="models", remedy="Take another.")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if dtype == FP8 else dtype)
    try:
        with torch.device(device):
            model = (GPT2Model if c.family == "gpt2" else RotaryModel)(c, layers).eval()
            return _quantised(model) if dtype == FP8 else model
    finally:
        torch.set_default_dtype(before)


def _quantised(model: nn.Module) -> nn.Module:
    """The model with the matrices of its attention and MLP in eight bits."""
    for module in [m for m in model.modules() if isinstance(m, (SelfAttention, GatedMLP))]:
        for name, linear in [*module.named_children()]:
            if isinstance(linear, Linear):
                outputs, inputs = linear.weight.shape
                setattr(module, name, QuantisedLinear(inputs, outputs))
    return model


def fills(model: nn.Module) -> dict[str, Fill]:
    """Each own tensor's rule by qualified name."""
    return {
        f"{path}.{name}" if path else name: rule
        for path, module in model.named_modules()
        if isinstance(module, Filled)
        for name, rule in module.fills.items()
    }


def initialize(model: nn.Module, seed: int) -> nn.Module:
    """Draws every tensor by its rule, in place; equal seeds give equal models on equal devices."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for index, (name, rule) in enumerate(sorted(fills(model).items())):
            t = tensors[name]
            generator = torch.Generator(t.device).manual_seed(seed * 1_000_003 + index)
            t.copy_(draw(rule, tuple(t.shape), t.stride(), t.dtype, t.device, generator))
    return model
