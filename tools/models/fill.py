"""What an input holds: how a weight, an activation or an index tensor is drawn, as data that can be stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from terrazzo.lowering.errors import UserError
from terrazzo.tools.models.config import ModelConfig


@dataclass(frozen=True)
class Fill:
    """One rule. `kind` and the meaning of `values`:

    'normal'   (mean, std)
    'below'    (bound,): random integers in [0, bound)
    'arange'   (bound,): 0, 1, 2, ... modulo bound
    'constant' (value,)
    'rope'     (theta, factor, low, high, original): the cos/sin cache; factor 1 means unscaled
    """

    kind: str
    values: tuple[float, ...]


# What a value between two pieces holds when nothing says more: any index in range is 0 or 1.
ACTIVATION = Fill("normal", (0.0, 1.0))
INDICES = Fill("below", (2.0,))


def matrix(fan_in: int) -> Fill:
    """A weight matrix that keeps the scale of its input: std 1 / sqrt(fan_in)."""
    return Fill("normal", (0.0, fan_in**-0.5))


def around(mean: float) -> Fill:
    """A norm's weight or a bias: near its neutral value, but never equal to it, so that leaving it out shows."""
    return Fill("normal", (mean, 0.1))


def rope(config: ModelConfig) -> Fill:
    """The rotary cache of a model."""
    s = config.rope_scaling
    scaling = (s.factor, s.low_freq_factor, s.high_freq_factor, float(s.original_max_positions)) if s else (1.0,) * 4
    return Fill("rope", (config.rope_theta, *scaling))


def draw(
    fill: Fill,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
) -> Tensor:
    """A tensor of that shape (elements), stride (elements) and dtype, filled by the rule; `generator` is on `device`.

    Raises:
        UserError: the rule is unknown.
    """
    out = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    if fill.kind == "normal" and dtype.itemsize == 1:
        # No such numbers are drawn in eight bits.
        return out.copy_(draw(fill, shape, stride, torch.float32, device, generator))
    if fill.kind == "normal":
        mean, std = fill.values
        return out.normal_(mean, std, generator=generator)
    if fill.kind == "below":
        return out.random_(0, int(fill.values[0]), generator=generator)
    if fill.kind == "arange":
        return out.copy_((torch.arange(out.numel(), device=device) % int(fill.values[0])).view(shape))
    if fill.kind == "constant":
        return out.fill_(fill.values[0])
    if fill.kind == "rope":
        return out.copy_(_rope_cache(fill.values, shape, device))
    raise UserError(f"fill {fill.kind!r}", "no such rule", stage="models", remedy="See Fill for the rules.")


def _rope_cache(values: tuple[float, ...], shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """[positions, rotary_dim] fp32: cosines, then sines.

    Source: RoPE (Su et al., 2021); the frequency scaling as described with the Llama 3.1 release.
    """
    theta, factor, low, high, original = values
    positions, rotary_dim = shape
    inverse = theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim)
    if factor != 1.0:
        wavelength = 2 * math.pi / inverse
        keep = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
        inverse = inverse * (keep + (1 - keep) / factor)
    angles = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * inverse
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
