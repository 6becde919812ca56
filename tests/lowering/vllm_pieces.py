"""What a piece of vLLM 0.22.1 is made of: its layers' native forms over stand-ins for its ops, as Dynamo captures them.

The stand-ins carry the names and schemas of vLLM's own ops, so that a piece made here reads like one made there. vLLM
itself is not needed.

Source: vLLM 0.22.1, `vllm/ir/ops/layernorm.py`, `vllm/model_executor/layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

IR = torch.library.Library("vllm_ir", "FRAGMENT")
IR.define("rms_norm(Tensor x, Tensor? weight, float epsilon, SymInt? variance_size=None) -> Tensor")
ARGUMENTS = "Tensor{} x, Tensor{} x_residual, Tensor? weight, float epsilon, SymInt? variance_size=None"
IR.define(f"fused_add_rms_norm({ARGUMENTS.format('', '')}) -> (Tensor, Tensor)")
IR.define(f"fused_add_rms_norm.maybe_inplace({ARGUMENTS.format('(a0!)', '(a1!)')}) -> (Tensor, Tensor)")


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    wide = x.to(torch.float32)
    part = wide if variance_size is None else wide[..., :variance_size]
    wide = wide * torch.rsqrt(part.pow(2).mean(dim=-1, keepdim=True) + epsilon)
    if weight is not None:
        wide = wide.to(weight.dtype) * weight
    return wide.to(x.dtype)


def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.float32) + x_residual.to(torch.float32)
    total = wide.to(x.dtype)
    part = wide if variance_size is None else wide[..., :variance_size]
    wide = wide * torch.rsqrt(part.pow(2).mean(dim=-1, keepdim=True) + epsilon)
    if weight is not None:
        wide = wide.to(weight.dtype) * weight
    return wide.to(x.dtype), total


def donating(x: Tensor, x_residual: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """As an implementation in place does it: the inputs are spoilt."""
    results = fused_add_rms_norm(x, x_residual, *others)
    x.fill_(float("nan"))
    x_residual.fill_(float("nan"))
    return results


for name, run in {
    "rms_norm": rms_norm,
    "fused_add_rms_norm": fused_add_rms_norm,
    "fused_add_rms_norm.maybe_inplace": donating,
}.items():
    IR.impl(name, run, "CompositeExplicitAutograd")
    IR._register_fake(name, fused_add_rms_norm if name.startswith("fused") else rms_norm)


C = torch.library.Library("_C", "FRAGMENT")
C.define("cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()")
FP8, LARGEST = torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max


def scaled_mm(out: Tensor, a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None) -> None:
    made = (a.float() @ b.float()) * b_scales.view(1, -1) * a_scales.view(-1, 1)
    out.copy_(made if bias is None else made + bias.float())


C.impl("cutlass_scaled_mm", scaled_mm, "CompositeExplicitAutograd")


class Quantised(nn.Module):
    """A linear layer of eight-bit floats, scales by token and by column, as vLLM's native form quantises its input."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.float().abs().amax(1) / LARGEST
        self.weight = nn.Parameter((weight.float() / scale[:, None]).to(FP8).t(), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        most, _ = x.abs().max(dim=-1)
        scale = (most.unsqueeze(-1).to(torch.float32) / LARGEST).clamp(min=1 / (LARGEST * 512))
        a = (x.to(torch.float32) * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(FP8)
        out = torch.empty((a.shape[0], self.weight.shape[1]), dtype=x.dtype, device=x.device)
        torch.ops._C.cutlass_scaled_mm(out, a, self.weight, scale, self.scale, None)
        return out


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return torch.ops.vllm_ir.rms_norm(x, self.weight.data, 1e-5, None)
        return torch.ops.vllm_ir.fused_add_rms_norm.maybe_inplace(x, residual, self.weight.data, 1e-5, None)


def rotated(x: Tensor, cos_sin: Tensor, heads: int, head: int) -> Tensor:
    """RoPE over whole heads; the part that passes by is empty."""
    shape = x.shape
    x = x.view(shape[0], -1, head)
    cos, sin = (part.unsqueeze(-2).to(x.dtype) for part in cos_sin.chunk(2, dim=-1))
    left, right = x[..., :head].chunk(2, dim=-1)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return torch.cat((turned, x[..., head:]), dim=-1).reshape(shape)


def quantised(model: Middle) -> Middle:
    """The same with linear layers of eight-bit floats."""
    for name, linear in model.linear.items():
        model.linear[name] = Quantised(linear.weight)
    return model


class Middle(nn.Module):
    """A decoder layer from behind its attention to the next one's."""

    def __init__(self, hidden: int, inner: int, heads: int, kv: int, head: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.kv, self.head = heads, kv, head
        sizes = {"o": (heads * head, hidden), "up": (hidden, 2 * inner), "down": (inner, hidden)}
        sizes["qkv"] = (hidden, (heads + 2 * kv) * head)
        self.linear = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        self.norms = nn.ModuleList(Norm(hidden) for _ in range(2))
        self.qk_norms = nn.ModuleList(Norm(head) for _ in range(2)) if qk_norm else None
        self.cos_sin = nn.Buffer(torch.randn(64, head))

    def forward(self, attended: Tensor, residual: Tensor, positions: Tensor) -> Any:
        x = self.linear["o"](attended.view(-1, self.heads * self.head))
        x, residual = self.norms[0](x, residual)
        x = self.linear["up"](x)
        half = x.shape[-1] // 2
        x = self.linear["down"](F.silu(x[..., :half]) * x[..., half:])
        x, residual = self.norms[1](x, residual)
        sizes = [self.heads * self.head, self.kv * self.head, self.kv * self.head]
        q, k, v = self.linear["qkv"](x).split(sizes, dim=-1)
        if self.qk_norms is not None:
            q, k = (
                n(y.view(*y.shape[:-1], -1, self.head)).view(y.shape)
                for n, y in zip(self.qk_norms, (q, k), strict=True)
            )
        cos_sin = self.cos_sin.index_select(0, positions.flatten())
        q, k = rotated(q, cos_sin, self.heads, self.head), rotated(k, cos_sin, self.kv, self.head)
        output = torch.empty(torch.Size((q.shape[0], self.heads * self.head)), dtype=q.dtype, device=q.device)
        return (
            q.view(-1, self.heads, self.head),
            k.view(-1, self.kv, self.head),
            v.view(-1, self.kv, self.head),
            output.view(-1, self.heads, self.head),
            residual,
        )


def captured(model: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """The graph that Dynamo hands to a backend, and the arguments that it is called with."""
    found: list[Any] = []

    def backend(graph: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            # Copies, as the run spoils what the piece gives away.
            found.append((graph, [a.detach().clone() if isinstance(a, Tensor) else a for a in args]))
            return graph(*args)

        return run

    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 0)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return found[0]
