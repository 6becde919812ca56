"""The parts models are made of, written op by op the way vLLM's native layers are, so that captured pieces look alike.

Tokens are flat: activations are [tokens, hidden]. Every module with tensors of its own says in `fills` how they are
drawn. Source of the forms: the native (uncompiled) layers of vLLM 0.10.0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from terrazzo.tools.models import fill
from terrazzo.tools.models.config import ModelConfig
from terrazzo.tools.models.fill import Fill

FP8 = torch.float8_e4m3fn


class Filled(nn.Module):
    """A module that owns tensors; `fills` maps each one's name to its rule."""

    def __init__(self) -> None:
        super().__init__()
        self.fills: dict[str, Fill] = {}

    def own(self, name: str, shape: tuple[int, ...], rule: Fill, *, dtype: torch.dtype | None = None) -> None:
        """Adds an uninitialised weight of the default (or given) dtype on the default device."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
        self.fills[name] = rule


class Linear(Filled):
    """x @ weight.T + bias; weight [out, in]."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.own("weight", (outputs, inputs), fill.matrix(inputs))
        if bias:
            self.own("bias", (outputs,), fill.around(0.0))
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class QuantisedLinear(Filled):
    """The same with a weight of eight-bit floats and a scale for each of its rows; what comes in is quantised row by
    row.

    Source of the form: vLLM 0.22.1, the native `QuantFP8` and the product of `Fp8LinearMethod`, by torch's own op.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.own("weight", (outputs, inputs), Fill("normal", (0.0, 1.0)), dtype=FP8)
        self.own("scale", (outputs,), Fill("constant", (inputs**-0.5,)), dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        largest = torch.finfo(FP8).max
        most = x.abs().max(dim=-1)[0].unsqueeze(-1).to(torch.float32)
        scale = (most / largest).clamp(min=1 / (largest * 512))
        small = (x.to(torch.float32) * scale.reciprocal()).clamp(-largest, largest).to(FP8)
        return torch._scaled_mm(
            small, self.weight.t(), scale, self.scale.unsqueeze(0), out_dtype=x.dtype, use_fast_accum=True
        )


class Embedding(Filled):
    """Rows of a table."""

    weight: Tensor

    def __init__(self, rows: int, width: int, std: float = 1.0) -> None:
        super().__init__()
        self.own("weight", (rows, width), Fill("normal", (0.0, std)))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids.long(), self.weight)


class RMSNorm(Filled):
    """RMSNorm over the last axis; with a residual, of the sum, which is returned as the new residual.

    The norm sees the sum in fp32; the residual is its rounding.
    """

    weight: Tensor

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.own("weight", (width,), fill.around(1.0))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        dtype = x.dtype
        x = x.to(torch.float32)
        if residual is not None:
            x = x + residual.to(torch.float32)
            residual = x.to(dtype)
        variance = x.pow(2).mean(dim=-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        x = x.to(dtype) * self.weight
        return x if residual is None else (x, residual)


class GemmaRMSNorm(Filled):
    """RMSNorm scaled by 1 + weight, all of it in fp32; the residual sum is rounded first."""

    weight: Tensor

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.own("weight", (width,), fill.around(0.0))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        dtype = x.dtype
        if residual is not None:
            x = x + residual
            residual = x
        x = x.float()
        variance = x.pow(2).mean(dim=-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        x = x * (1.0 + self.weight.float())
        x = x.to(dtype)
        return x if residual is None else (x, residual)


class LayerNorm(Filled):
    """LayerNorm over the last axis, with weight and bias."""

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.own("weight", (width,), fill.around(1.0))
        self.own("bias", (width,), fill.around(0.0))
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)


class Rotary(Filled):
    """Rotary embedding, neox form (halves, not pairs), from a cache of [positions, cos | sin]."""

    cos_sin_cache: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.register_buffer("cos_sin_cache", torch.empty(config.max_positions, config.head_dim))
        self.fills["cos_sin_cache"] = fill.rope(config)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = x.shape
        x = x.view(shape[0], -1, self.head_dim)
        cos = cos.unsqueeze(-2).to(x.dtype)
        sin = sin.unsqueeze(-2).to(x.dtype)
        x1, x2 = torch.chunk(x, 2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).reshape(shape)

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.flatten()
        cos, sin = self.cos_sin_cache.index_select(0, positions).chunk(2, dim=-1)
        return self.rotate(q, cos, sin), self.rotate(k, cos, sin)


class Attention(nn.Module):
    """The opaque attention between two pieces: it fills a buffer that the piece before allocated."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.config, self.layer_index = config, layer_index

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = self.config
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        q, out = q.view(-1, c.heads, c.head_dim), out.view(-1, c.heads, c.head_dim)
        k, v = k.view(-1, c.kv_heads, c.head_dim), v.view(-1, c.kv_heads, c.head_dim)
        torch.ops.terrazzo_models.attention(q, k, v, out, self.layer_index, scale=c.scale, soft_cap=c.soft_cap)
        return out.view(-1, c.q_size)


def silu_and_mul(x: Tensor) -> Tensor:
    """SiLU of the first half of the columns times the second half."""
    width = x.shape[-1] // 2
    return F.silu(x[..., :width]) * x[..., width:]


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """GELU (tanh form) of the first half of the columns times the second half."""
    width = x.shape[-1] // 2
    return F.gelu(x[..., :width], approximate="tanh") * x[..., width:]


def gelu_new(x: Tensor) -> Tensor:
    """GELU (tanh form), spelled out as GPT-2 spells it."""
    c = math.sqrt(2.0 / math.pi)
    return 0.5 * x * (1.0 + torch.tanh(c * (x + 0.044715 * torch.pow(x, 3.0))))
